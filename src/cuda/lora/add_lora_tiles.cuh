// What add_lora_tiles.cu is made of: the rings of units, the sums over K, their exchange, the way through y.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"

namespace punica::cuda::fused_lora::tiles {

inline constexpr int kRows = 64;
inline constexpr int kWarps = 8;  // that compute, and as many that copy
inline constexpr int kThreads = 2 * 32 * kWarps;
inline constexpr int kRanks = 64;  // of a pass, at most
inline constexpr int kStrip = 64;  // columns of y
inline constexpr int kGroups = kRows / 8;
inline constexpr int kMaxUnits = 12;  // of a ring
#ifdef TILES_OLD_ORDER
inline constexpr int kLeaves = 16;
#else
inline constexpr int kLeaves = 64;  // of pieces of K: see add_lora_ring.cuh
#endif

// What a pass takes x for: the ranks of one slice or of several, in tiles of 16.
struct Pass {
  int begin, end;  // slices
  int tiles;
  int slice_of[kRanks / 16];
  int rank_of[kRanks / 16];  // the tile's first one
};

struct RingBarriers {
  uint64_t full[kMaxUnits], empty[kMaxUnits];
};

struct Shared {
  RingBarriers weights[kWarps], rows[kWarps];  // of teams; of warps
  uint64_t received;                           // the sums of the others
  uint64_t drained;                            // the others have read what they received
  Work<kRows> work;
  TileScratch<2 * kWarps> scratch;
  int num_passes;
  Pass passes[kMaxLoraSlices];
  float up[kRanks / 16][kRows];  // float16, of a slice of the pass: see row_exponent()
};
inline constexpr size_t kHeadBytes = (sizeof(Shared) + 127) / 128 * 128;
inline constexpr size_t kMostShared = 227 * 1024;

#ifndef TILES_PARTS
#define TILES_PARTS 2
#endif
#ifndef TILES_W
#define TILES_W 2
#endif
#ifndef TILES_W4
#define TILES_W4 7
#endif
#ifndef TILES_R
#define TILES_R 12
#endif
// kT: tiles of 16 ranks of a pass, at most.
template <int kT, int kClusterBits>
struct Shape {
  static constexpr int kBlocks = 1 << kClusterBits;
  static constexpr int kBlockChains = kChains >> kClusterBits;
  // Warps of a team share weights and take a part of the rows each.
  static constexpr int kRowParts = std::max(kT == 1 ? TILES_PARTS : 2, kWarps / kBlockChains);
  static constexpr int kTeams = kWarps / kRowParts;
  static constexpr int kTeamChains = kBlockChains / kTeams;  // one after the other
  static constexpr int kWarpRows = kRows / kRowParts;
  static constexpr int kWarpUnits = kWarpRows / 16;
  static constexpr int kTileFours = kGroups * 32;  // of four sums, of a tile of ranks
  static constexpr size_t kPartBytes = size_t{16} * kTeams * kT * kTileFours;
  static constexpr size_t kReceiveBytes = size_t{16} * (kBlocks - 1) * kT * kTileFours;
  static constexpr int kWeightUnits = kT == 4 ? TILES_W4 : kT == 2 ? 4 : TILES_W;
  static constexpr size_t kWeightBytes = size_t{kUnitBytes} * kTeams * kWeightUnits;
  static constexpr int kRowUnits =
      std::min<int>(TILES_R, (kMostShared - kHeadBytes - kPartBytes - kReceiveBytes - kWeightBytes) /
                                 (size_t{kUnitBytes} * kWarps));
  static constexpr size_t kSharedBytes =
      kHeadBytes + kPartBytes + kReceiveBytes + kWeightBytes + size_t{kUnitBytes} * kWarps * kRowUnits;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Tiles of a slice in a pass: what its last product of the expand reads is there.
__device__ __forceinline__ int padded_tiles(int rank) { return rank <= 16 ? 1 : (rank + 31) / 32 * 2; }

template <int kT>
__device__ __forceinline__ void plan(Shared* shared) {
  const Work<kRows>& work = shared->work;
  int number = 0;
  for (int s = 0; s < work.num_slices; ++number) {
    Pass& pass = shared->passes[number];
    pass.begin = s;
    int tiles = 0;
    for (; s < work.num_slices; ++s) {
      const int more = padded_tiles(work.slices[s].rank);
      if (tiles + more > kT) break;
      for (int i = 0; i < more; ++i) {
        pass.slice_of[tiles + i] = s;
        pass.rank_of[tiles + i] = 16 * i;
      }
      tiles += more;
    }
    pass.end = s;
    pass.tiles = tiles;
  }
  shared->num_passes = number;
}

// A ring of units in shared memory, from the side of one that fills or reads it.
template <int kUnits>
struct Ring {
  uint32_t units, barriers;
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty() const {
    return barriers + static_cast<uint32_t>(offsetof(RingBarriers, empty)) + 8 * slot;
  }
  __device__ __forceinline__ uint32_t unit() const { return units + slot * kUnitBytes; }
  __device__ __forceinline__ void wait_full() const { hopper::barrier_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { hopper::barrier_wait(empty(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++slot == kUnits) slot = 0, parity ^= 1;
  }
  // By a whole warp that has read it.
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(empty());
    advance();
  }
};

// Where a piece of 16 bytes of a unit of B lies: 64, 32 or 16 rows of 2, 4 or 8 pieces.
template <int kRowBits>
__device__ __forceinline__ int place_b(int row, int piece) {
  if constexpr (kRowBits == 3) return row * 8 + (piece ^ (row >> 3 & 1) << 2);
  if constexpr (kRowBits == 2) return (row * 4 + piece) ^ (row >> 3 & 1) << 2;
  return (row * 2 + piece) ^ (row >> 3 & 3) << 1;
}
// And of y, 16 rows of 8 pieces.
__device__ __forceinline__ int place_y(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

struct Block {
  const Args& args;
  Shared& shared;
  float4* parts;  // of the sums, of teams: [team][tile][group of rows][lane]; in the first one's place: v
  float4* receive;
  uint32_t weights, weight_barriers;  // rings
  uint32_t rows, row_barriers;
  int rank;  // in the cluster
  int team, part, lane;
};

// ---- Warps that copy -----------------------------------------------------------------------------------------------

template <class T, class S>
struct Producer {
  const Block& b;
  Ring<S::kWeightUnits> weights = {b.weights, b.weight_barriers};
  Ring<S::kRowUnits> rows = {b.rows, b.row_barriers};
  int turn = b.part;  // 0: the team's next unit of weights is for this warp

  // The team's next unit, of A or B, of which `rows` rows and `columns` elements of each are there, perhaps none; zeros
  // elsewhere.
  template <class PlaceOf>
  __device__ __forceinline__ void copy_weights(const T* from, int64_t stride, int row_bits, int rows, int columns,
                                               PlaceOf place_of) {
    if constexpr (S::kRowParts > 1) {
      if (turn != 0) {
        --turn;
        weights.advance();
        return;
      }
      turn = S::kRowParts - 1;
    }
    weights.wait_empty();
    const uint32_t to = weights.unit();
    const int row = b.lane >> row_bits, piece = b.lane & ((1 << row_bits) - 1), step = 32 >> row_bits;
    const int count = min(max(columns - 8 * piece, 0), 8);
    from += row * stride + 8 * piece;
    if (((reinterpret_cast<uintptr_t>(from) | 2 * stride) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = i * step + row < rows && count > 0;
        copy_async_16(to + 16 * place_of(i * step + row, piece), valid ? from : b.args.x, valid ? 2 * count : 0);
        from += step * stride;
      }
      hopper::barrier_arrive_copies(weights.full());
    } else {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from), i * step + row < rows ? count : 0);
        asm volatile(
            "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16 * place_of(i * step + row, piece)),
            "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
            : "memory");
        from += step * stride;
      }
      hopper::barrier_arrive(weights.full());
    }
    weights.advance();
  }

  // The lane's part of rows first .. first + 15 of x or y: `from` is its column of row 0.
  template <class PlaceOf>
  __device__ __forceinline__ void copy_rows(const T* from, int64_t stride, int first, bool inside, bool zeros,
                                            PlaceOf place_of) {
    rows.wait_empty();
    const uint32_t to = rows.unit();
    const int row = b.lane / 8, piece = b.lane % 8, count = b.shared.work.count - first - row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < count) {
        const uint32_t at = to + 16 * place_of(row + 4 * i, piece);
        if (inside) {
          copy_async_16(at, from + b.shared.work.rows[first + row + 4 * i] * stride, 16);
        } else if (zeros) {
          copy_async_16(at, b.args.x, 0);
        }
      }
    }
    hopper::barrier_arrive_copies(rows.full());
    rows.advance();
  }

  __device__ __forceinline__ void run() {
    const Args& args = b.args;
    const Work<kRows>& work = b.shared.work;
    const int h_in = args.h_in, first_row = b.part * S::kWarpRows;
    const int units = min((work.count - first_row + 15) / 16, S::kWarpUnits);
    const int piece = b.lane % 8;
#pragma unroll 1
    for (int p = 0; p < b.shared.num_passes; ++p) {
      const Pass& pass = b.shared.passes[p];
#pragma unroll 1
      for (int i = 0; i < S::kTeamChains; ++i) {
        const int chain = (b.rank * S::kTeams + b.team) * S::kTeamChains + i;
        // Leaf after leaf.
#pragma unroll 1
        for (int leaf = chain, n = chain; leaf < kLeaves && n * kPiece < h_in;) {
          const int k = n * kPiece;
          n += kLeaves;
          if (n * kPiece >= h_in) leaf += kChains, n = leaf;
#pragma unroll 1
          for (int j = 0; j < pass.tiles; ++j) {
            const Slice& s = work.slices[pass.slice_of[j]];
            const int first = pass.rank_of[j];
            copy_weights(static_cast<const T*>(s.a) + int64_t{first} * h_in + k, h_in, 3, s.rank - first, h_in - k,
                         [](int row, int piece) { return place<3>(row, piece); });
          }
          const T* const x = static_cast<const T*>(args.x) + k + 8 * piece;
#pragma unroll 1
          for (int u = 0; u < units; ++u) {
            copy_rows(x, args.x_stride, first_row + 16 * u, k + 8 * piece < h_in, true,
                      [](int row, int piece) { return place<3>(row, piece); });
          }
        }
      }
#pragma unroll 1
      for (int i = pass.begin; i < pass.end; ++i) {
        const Slice& s = work.slices[i];
        const int bits = s.rank <= 16 ? 1 : s.rank <= 32 ? 2 : 3, unit_rows = 128 >> bits;
#pragma unroll 1
        for (int c = (b.rank * S::kTeams + b.team) * kStrip; c < s.width; c += S::kBlocks * S::kTeams * kStrip) {
#pragma unroll 1
          for (int row = 0; row < kStrip; row += unit_rows) {
            copy_weights(static_cast<const T*>(s.b) + (c + row) * s.b_stride, s.b_stride, bits, s.width - c - row,
                         s.rank, [bits](int row, int piece) {
                           return bits == 3   ? place_b<3>(row, piece)
                                  : bits == 2 ? place_b<2>(row, piece)
                                              : place_b<1>(row, piece);
                         });
          }
          const T* const y = static_cast<const T*>(args.y) + s.begin + c + 8 * piece;
#pragma unroll 1
          for (int u = 0; u < units; ++u) {
            copy_rows(y, args.y_stride, first_row + 16 * u, c + 8 * piece < s.width, false,
                      [](int row, int piece) { return place_y(row, piece); });
          }
        }
      }
    }
    copy_wait<0>();
  }
};

// ---- Warps that compute --------------------------------------------------------------------------------------------

template <class T, class S, int kT>
struct Consumer {
  static constexpr int kWarpGroups = 2 * S::kWarpUnits;  // of eight rows
  using Sums = float[kT][kWarpGroups][4];

  const Block& b;
  Ring<S::kWeightUnits> weights = {b.weights, b.weight_barriers};
  Ring<S::kRowUnits> rows = {b.rows, b.row_barriers};

  // A tile of A of a piece, as products take it.
  __device__ __forceinline__ void read_a(uint32_t (&a)[4][4]) {
    const int g = b.lane / 4, t = b.lane % 4;
    weights.wait_full();
    const uint32_t upper_at = weights.unit() + 16 * place<3>(g, t), lower_at = weights.unit() + 16 * place<3>(g + 8, t);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 upper = load_shared_16(upper_at ^ 64 * c), lower = load_shared_16(lower_at ^ 64 * c);
      a[2 * c][0] = upper.x, a[2 * c][1] = lower.x, a[2 * c][2] = upper.y, a[2 * c][3] = lower.y;
      a[2 * c + 1][0] = upper.z, a[2 * c + 1][1] = lower.z, a[2 * c + 1][2] = upper.w, a[2 * c + 1][3] = lower.w;
    }
    weights.release(b.lane);
  }
  // 16 rows of x: of rows g and g + 8.
  __device__ __forceinline__ void read_x(uint4 (&x)[2][2]) {
    const int g = b.lane / 4, t = b.lane % 4;
    rows.wait_full();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      x[0][c] = load_shared_16((rows.unit() + 16 * place<3>(g, t)) ^ 64 * c);
      x[1][c] = load_shared_16((rows.unit() + 16 * place<3>(g + 8, t)) ^ 64 * c);
    }
    rows.release(b.lane);
  }
  // Adds the products of 16 ranks and 16 rows; kAlone: as a sum of their own.
  template <bool kAlone>
  __device__ __forceinline__ void multiply(float (*sums)[4], const uint32_t (&a)[4][4], const uint4 (&x)[2][2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float alone[4] = {};
      float (&to)[4] = kAlone ? alone : sums[h];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        mma_m16n8k16<T>(to, a[2 * c], {x[h][c].x, x[h][c].y});
        mma_m16n8k16<T>(to, a[2 * c + 1], {x[h][c].z, x[h][c].w});
      }
      if constexpr (kAlone) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[h][e] += alone[e];
      }
    }
  }

  template <bool kAlone>
  __device__ __forceinline__ void add_piece(Sums& sums, int units, int tiles) {
    if constexpr (kT == 1) {
      uint32_t a[4][4];
      read_a(a);
#pragma unroll
      for (int i = 0; i < S::kWarpUnits; ++i) {
        if (i < units) {
          uint4 x[2][2];
          read_x(x);
          multiply<kAlone>(&sums[0][2 * i], a, x);
        }
      }
    } else {
      uint4 x[S::kWarpUnits][2][2];
#pragma unroll
      for (int i = 0; i < S::kWarpUnits; ++i) {
        if (i < units) read_x(x[i]);
      }
#pragma unroll
      for (int j = 0; j < kT; ++j) {
        if (j < tiles) {
          uint32_t a[4][4];
          read_a(a);
#pragma unroll
          for (int i = 0; i < S::kWarpUnits; ++i) {
            if (i < units) multiply<kAlone>(&sums[j][2 * i], a, x[i]);
          }
        }
      }
    }
  }

  // The sums over K of a chain and rows.
  __device__ __forceinline__ void add_chain(Sums& sums, int chain, int units, int tiles) {
    const int h_in = b.args.h_in;
    if (h_in <= kLeaves * kPiece) {
#pragma unroll 1
      for (int p = chain; p * kPiece < h_in; p += kChains) add_piece<true>(sums, units, tiles);
    } else {
#pragma unroll 1
      for (int leaf = chain; leaf < kLeaves; leaf += kChains) {
        Sums of_leaf = {};
#pragma unroll 1
        for (int p = leaf; p * kPiece < h_in; p += kLeaves) add_piece<false>(of_leaf, units, tiles);
#pragma unroll
        for (int j = 0; j < kT; ++j) {
#pragma unroll
          for (int i = 0; i < kWarpGroups; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[j][i][e] += of_leaf[j][i][e];
          }
        }
      }
    }
  }

  // Those of the team to shared memory.
  __device__ __forceinline__ void shrink(const Pass& pass, int units) {
#pragma unroll 1
    for (int c = 0; c < S::kTeamChains; ++c) {
      Sums sums = {};
      add_chain(sums, (b.rank * S::kTeams + b.team) * S::kTeamChains + c, units, pass.tiles);
      static_assert(S::kTeamChains <= 2, "neighbours of a balanced tree");
#pragma unroll
      for (int j = 0; j < kT; ++j) {
#pragma unroll
        for (int i = 0; i < kWarpGroups; ++i) {
          float4* const to = b.parts + ((b.team * kT + j) * kGroups + b.part * kWarpGroups + i) * 32 + b.lane;
          float4 sum = {sums[j][i][0], sums[j][i][1], sums[j][i][2], sums[j][i][3]};
          if (c > 0) sum.x += to->x, sum.y += to->y, sum.z += to->z, sum.w += to->w;
          *to = sum;
        }
      }
    }
    hopper::named_barrier_sync(1, 32 * kWarps);
  }

  template <int kCount>
  static __device__ __forceinline__ float4 add_neighbours(float4 (&v)[kCount]) {
#pragma unroll
    for (int width = 1; width < kCount; width *= 2) {
#pragma unroll
      for (int w = 0; w < kCount; w += 2 * width) {
        v[w].x += v[w + width].x, v[w].y += v[w + width].y, v[w].z += v[w + width].z, v[w].w += v[w + width].w;
      }
    }
    return v[0];
  }

  // v of a pass, as pairs of numbers, from the sums of all blocks. A warp has a group of eight rows, a lane of each tile
  // ranks g and g + 8 of rows 2t and 2t + 1. `number`: of passes before.
  __device__ __forceinline__ void exchange(const Pass& pass, int number) {
    Shared& shared = b.shared;
    const int g = b.lane / 4, t = b.lane % 4, group = b.team * S::kRowParts + b.part;
    const uint32_t barrier = shared_address(&shared.received);
    float4 own[kT];
    if (number == 0) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // the others are there
    } else {
      hopper::barrier_wait(shared_address(&shared.drained), (number - 1) & 1);
    }
    if (threadIdx.x == 0) hopper::barrier_expect(barrier, static_cast<int>(S::kReceiveBytes));
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      const int i = (j * kGroups + group) * 32 + b.lane;
      float4 v[S::kTeams];
#pragma unroll
      for (int w = 0; w < S::kTeams; ++w) v[w] = b.parts[w * kT * S::kTileFours + i];
      own[j] = add_neighbours(v);
#pragma unroll
      for (int other = 1; other < S::kBlocks; ++other) {
        const uint32_t peer = b.rank ^ other;
        hopper::store_async(
            hopper::remote_address(shared_address(b.receive + (other - 1) * kT * S::kTileFours + i), peer), own[j],
            hopper::remote_address(barrier, peer));
      }
    }
    hopper::barrier_wait(barrier, number & 1);
    float values[kT][4];
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      const int i = (j * kGroups + group) * 32 + b.lane;
      // In the order of distance: the tree of neighbours, seen from this block.
      float4 v[S::kBlocks];
      v[0] = own[j];
#pragma unroll
      for (int other = 1; other < S::kBlocks; ++other) v[other] = b.receive[(other - 1) * kT * S::kTileFours + i];
      const float4 sum = add_neighbours(v);
      values[j][0] = sum.x, values[j][1] = sum.y, values[j][2] = sum.z, values[j][3] = sum.w;
    }
    __syncwarp();  // v takes the place of parts that this warp alone has read
    if (number + 1 < shared.num_passes) {
      if (b.lane > 0 && b.lane < S::kBlocks) {
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         hopper::remote_address(shared_address(&shared.drained), b.rank ^ b.lane))
                     : "memory");
      }
    }
    float down[kT][2];
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      if (j < pass.tiles) {
        const int rest = shared.work.slices[pass.slice_of[j]].rank - pass.rank_of[j] - g;
        if (rest <= 0) values[j][0] = values[j][1] = 0;
        if (rest <= 8) values[j][2] = values[j][3] = 0;
      }
      down[j][0] = down[j][1] = 1;
    }
    if constexpr (std::is_same_v<T, __half>) {
      // The power of two that float16 needs is of the row and slice.
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float largest[kT];
#pragma unroll
        for (int j = 0; j < kT; ++j) {
          const float first = values[j][e], second = values[j][2 + e];
          largest[j] = fmaxf(isfinite(first) ? fabsf(first) : 0.0f, isfinite(second) ? fabsf(second) : 0.0f);
#pragma unroll
          for (int step = 4; step < 32; step *= 2) {
            largest[j] = fmaxf(largest[j], __shfl_xor_sync(0xffffffffu, largest[j], step));
          }
        }
#pragma unroll
        for (int j = 0; j < kT; ++j) {
          if (j < pass.tiles) {
            float of_slice = 0;
#pragma unroll
            for (int i = 0; i < kT; ++i) {
              if (i < pass.tiles && pass.slice_of[i] == pass.slice_of[j]) of_slice = fmaxf(of_slice, largest[i]);
            }
            const int exponent = row_exponent(of_slice);
            down[j][e] = down_scale(exponent);
            if (g == 0 && pass.rank_of[j] == 0) {
              shared.up[pass.slice_of[j] - pass.begin][8 * group + 2 * t + e] = up_scale(exponent);
            }
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      if (j < pass.tiles) {
        const int first_tile = j - pass.rank_of[j] / 16;
        const bool one = shared.work.slices[pass.slice_of[j]].rank <= 16;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int k = pass.rank_of[j] + g + 8 * h;
          // The product, and in it the lane, that take rank k.
          const int product = one ? first_tile : first_tile + k / 32 * 2 + k % 8 / 4;
          const int to_lane = one ? k / 4 : k % 32 / 8;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint16_t* const to =
                reinterpret_cast<uint16_t*>(b.parts + (product * kGroups + group) * 32 + (2 * t + e) * 4 + to_lane) + k % 4;
            split<T>(values[j][2 * h + e] * down[j][e], to, to + 4);
          }
        }
      }
    }
    hopper::named_barrier_sync(1, 32 * kWarps);
  }

  // kChunks of 32 ranks, 0 standing for a half one: of B of a strip, as products take it. Rows g and g + 8 of product j
  // are outputs 8g + 2j and 8g + 2j + 1.
  template <int kChunks, int kProducts>
  __device__ __forceinline__ void read_b(uint32_t (&w)[4][kProducts][4]) {
    constexpr int kRowBits = kChunks + 1;  // log2 of the pieces of a row
    constexpr int kUnitRows = 128 >> kRowBits;
    const int g = b.lane / 4, t = b.lane % 4;
    Ring<S::kWeightUnits> last = weights;
#pragma unroll
    for (int u = 0; u < kStrip / kUnitRows; ++u) {
      last.wait_full();
      last.advance();
    }
    int slot = weights.slot + 8 * g / kUnitRows;
    slot = slot >= S::kWeightUnits ? slot - S::kWeightUnits : slot;
    const uint32_t from = weights.units + slot * kUnitBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = (8 * g) % kUnitRows + 2 * j + h;
        if constexpr (kChunks == 0) {
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                       : "=r"(w[j][0][h]), "=r"(w[j][0][2 + h])
                       : "r"(from + 16 * place_b<1>(row, t / 2) + t % 2 * 8)
                       : "memory");
        } else {
#pragma unroll
          for (int q = 0; q < kChunks; ++q) {
            const uint4 words = load_shared_16(from + 16 * place_b<kRowBits>(row, 4 * q + t));
            w[j][2 * q][h] = words.x, w[j][2 * q][2 + h] = words.y;
            w[j][2 * q + 1][h] = words.z, w[j][2 * q + 1][2 + h] = words.w;
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kStrip / kUnitRows; ++u) weights.release(b.lane);
  }

  template <int kChunks>
  __device__ __forceinline__ void expand(const Slice& s, int first_tile, int slice_of_pass, int units) {
    static_assert(kChunks <= 2);
    constexpr int kProducts = kChunks == 0 ? 1 : 2 * kChunks;
    const int g = b.lane / 4, t = b.lane % 4, count = b.shared.work.count;
    const uint32_t v =
        shared_address(b.parts) + 16 * ((first_tile * kGroups + b.part * kWarpGroups) * 32 + b.lane);
    const uint32_t y_at = 16 * place_y(2 * t, g);
#pragma unroll 1
    for (int c = (b.rank * S::kTeams + b.team) * kStrip; c < s.width; c += S::kBlocks * S::kTeams * kStrip) {
      uint32_t w[4][kProducts][4];
      read_b<kChunks>(w);
      T* const y = static_cast<T*>(b.args.y) + s.begin + c + 8 * g;
      const bool inside = c + 8 * g < s.width;
#pragma unroll 1
      for (int u = 0; u < units; ++u) {
        float sums[2][4][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
            const uint4 pair = load_shared_16(v + 512 * (p * kGroups + 2 * u + h));
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[h][j], w[j][p], {pair.x, pair.y});
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[h][j], w[j][p], {pair.z, pair.w});
          }
        }
        rows.wait_full();
        uint4 old[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          old[h][0] = load_shared_16(rows.unit() + y_at + 1024 * h);
          old[h][1] = load_shared_16((rows.unit() + y_at + 1024 * h + 128) ^ 16);
        }
        rows.release(b.lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = b.part * S::kWarpRows + 16 * u + 8 * h + 2 * t + e;
            float factor = s.scale;
            if constexpr (std::is_same_v<T, __half>) factor *= b.shared.up[slice_of_pass][row];
            const uint32_t words[4] = {old[h][e].x, old[h][e].y, old[h][e].z, old[h][e].w};
            uint32_t after[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float2 before;
              if constexpr (std::is_same_v<T, __half>) {
                before = __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
              } else {
                before = {__uint_as_float(words[j] << 16), __uint_as_float(words[j] & 0xffff0000u)};
              }
              after[j] = pack<T>(fmaf(factor, sums[h][j][e], before.x), fmaf(factor, sums[h][j][2 + e], before.y));
            }
            if (row < count && inside) {
              asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y + b.shared.work.rows[row] *
                                                                                     b.args.y_stride),
                           "r"(after[0]), "r"(after[1]), "r"(after[2]), "r"(after[3])
                           : "memory");
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    Shared& shared = b.shared;
    const int units = min((shared.work.count - b.part * S::kWarpRows + 15) / 16, S::kWarpUnits);
#pragma unroll 1
    for (int p = 0; p < shared.num_passes; ++p) {
      const Pass& pass = shared.passes[p];
      if (p > 0) hopper::named_barrier_sync(1, 32 * kWarps);  // v is used no more
      shrink(pass, units);
      exchange(pass, p);
      int tile = 0;
#pragma unroll 1
      for (int i = pass.begin; i < pass.end; ++i) {
        const Slice& s = shared.work.slices[i];
        const int tiles = padded_tiles(s.rank);
        if (tiles == 1) {
          expand<0>(s, tile, i - pass.begin, units);
        } else if (tiles == 2) {
          if constexpr (kT >= 2) expand<1>(s, tile, i - pass.begin, units);
        } else {
          if constexpr (kT >= 4) expand<2>(s, tile, i - pass.begin, units);
        }
        tile += tiles;
      }
    }
  }
};

#endif

}  // namespace punica::cuda::fused_lora::tiles
