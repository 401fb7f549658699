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
inline constexpr int kWarps = 16;     // that compute
inline constexpr int kCopyWarps = 4;  // each for four of them, a quad
inline constexpr int kThreads = 32 * (kWarps + kCopyWarps);
inline constexpr int kRanks = 64;  // of a pass, at most
inline constexpr int kStrip = 64;  // columns of y
inline constexpr int kGroups = kRows / 8;
inline constexpr int kMaxUnits = 8;  // of a ring
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
  RingBarriers weights[kCopyWarps], rows[kCopyWarps];  // of quads
  uint64_t received;                           // the sums of the others
  uint64_t drained;                            // the others have read what they received
  Work<kRows> work;
  TileScratch<kWarps + kCopyWarps> scratch;
  int64_t x_at[kRows], y_at[kRows];  // bytes from row 0
  int num_passes;
  Pass passes[kMaxLoraSlices];
  float up[kRanks / 16][kRows];  // float16, of a slice of the pass: see row_exponent()
};
inline constexpr size_t kHeadBytes = (sizeof(Shared) + 127) / 128 * 128;
inline constexpr size_t kMostShared = 227 * 1024;

#ifndef TILES_R
#define TILES_R 4
#endif
// kT: tiles of 16 ranks of a pass, at most.
template <int kT, int kClusterBits>
struct Shape {
  static constexpr int kBlocks = 1 << kClusterBits;
  static constexpr int kBlockChains = kChains >> kClusterBits;
  // Warps of a team share weights and take a part of the rows each. A quad has one or two teams.
  static constexpr int kRowParts = kT == 4 || kClusterBits == 2 ? 4 : 2;
  static constexpr int kTeams = kWarps / kRowParts;
  static constexpr int kQuadTeams = 4 / kRowParts;
  static constexpr int kTeamChains = kBlockChains / kTeams;  // one after the other
  static constexpr int kWarpUnits = kRows / 16 / kRowParts;  // of 16 rows, `kRowParts` units apart
  static constexpr int kTileFours = kGroups * 32;            // of four sums, of a tile of ranks
  static constexpr size_t kPartBytes = size_t{16} * kTeams * kT * kTileFours;
  static constexpr size_t kReceiveBytes = size_t{16} * (kBlocks - 1) * kT * kTileFours;
  static constexpr int kWeightUnits = kT == 4 ? 5 : kT == 2 ? 3 : 2;
  static constexpr size_t kWeightBytes = size_t{kUnitBytes} * kTeams * kWeightUnits;
  // A stage of rows has a unit for each warp of the quad.
  static constexpr int kRowStages =
      std::min<int>(TILES_R, (kMostShared - kHeadBytes - kPartBytes - kReceiveBytes - kWeightBytes) /
                                 (size_t{kUnitBytes} * kWarps));
  static constexpr size_t kSharedBytes =
      kHeadBytes + kPartBytes + kReceiveBytes + kWeightBytes + size_t{kUnitBytes} * kWarps * kRowStages;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Tiles of a slice in a pass: what its last product of the expand reads is there.
__device__ __forceinline__ int padded_tiles(int rank) { return rank <= 16 ? 1 : (rank + 31) / 32 * 2; }

template <int kT>
__device__ __forceinline__ void plan(Shared* shared) {
  const Work<kRows>& work = shared->work;
  if (work.num_slices == 1) {
    Pass& pass = shared->passes[0];
    pass.begin = 0, pass.end = 1;
    pass.tiles = padded_tiles(work.slices[0].rank);
#pragma unroll
    for (int i = 0; i < kT; ++i) pass.slice_of[i] = 0, pass.rank_of[i] = 16 * i;
    shared->num_passes = 1;
    return;
  }
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
template <int kUnits, int kBytes>
struct Ring {
  uint32_t units, barriers;
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty() const {
    return barriers + static_cast<uint32_t>(offsetof(RingBarriers, empty)) + 8 * slot;
  }
  __device__ __forceinline__ uint32_t unit() const { return units + slot * kBytes; }
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

// Units of 16 rows that a warp takes; of the last one there may be fewer rows, or none.
template <class S>
__device__ __forceinline__ int warp_units(int count) {
  return (count + 16 * S::kRowParts - 1) / (16 * S::kRowParts);
}

struct Block {
  const Args& args;
  Shared& shared;
  float4* parts;  // of the sums, of teams: [team][tile][group of rows][lane]; in the first one's place: v
  float4* receive;
  uint32_t weights, weight_barriers;  // rings
  uint32_t rows, row_barriers;
  int rank;  // in the cluster
  int team, quad_team, part, in_quad, lane;  // quad_team: the first of the quad
  uint32_t zero;
};

// ---- Warps that copy -----------------------------------------------------------------------------------------------

template <class T, class S>
struct Producer {
  const Block& b;
  Ring<S::kWeightUnits, kUnitBytes * S::kQuadTeams> weights = {b.weights, b.weight_barriers};
  Ring<S::kRowStages, 4 * kUnitBytes> rows = {b.rows, b.row_barriers};

  // The next unit of each team of the quad, of A or B, of which `rows` rows and `columns` elements of each are there,
  // perhaps none; zeros elsewhere. That of the second team is `more_rows` and `more_columns` behind.
  template <class PlaceOf>
  __device__ __forceinline__ void copy_weights(const T* from, int64_t stride, int row_bits, int rows, int columns,
                                               int more_rows, int more_columns, PlaceOf place_of) {
    weights.wait_empty();
    const int row = b.lane >> row_bits, piece = b.lane & ((1 << row_bits) - 1), step = 32 >> row_bits;
    from += row * stride + 8 * piece;
    rows -= row, columns -= 8 * piece;
    const bool aligned = ((reinterpret_cast<uintptr_t>(from) | 2 * stride) & 15) == 0;
#pragma unroll
    for (int team = 0; team < S::kQuadTeams; ++team) {
      const uint32_t to = weights.unit() + team * kUnitBytes;
      const int count = min(max(columns - team * more_columns, 0), 8), end = rows - team * more_rows;
      const T* at = from + team * (more_rows * stride + more_columns);
      if (aligned) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = i * step < end && count > 0;
          copy_async_16(to + 16 * place_of(i * step + row, piece), valid ? at : b.args.x, valid ? 2 * count : 0);
          at += step * stride;
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(at), i * step < end ? count : 0);
          asm volatile(
              "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16 * place_of(i * step + row, piece)),
              "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
              : "memory");
          at += step * stride;
        }
      }
    }
    if (aligned) {
      hopper::barrier_arrive_copies(weights.full());
    } else {
      hopper::barrier_arrive(weights.full());
    }
    weights.advance();
  }

  // A stage of x or y, of 16 rows each way for the warps of the quad: `from` is the lane's column of row 0, row_at what
  // is behind it, `columns` those that are there. The second team has the 64 columns behind.
  template <class PlaceOf>
  __device__ __forceinline__ void copy_rows(const T* from, const int64_t* row_at, int first, int columns, bool zeros,
                                            PlaceOf place_of) {
    rows.wait_empty();
    const int row = b.lane / 8, piece = b.lane % 8, count = b.shared.work.count - first - row;
    row_at += first + row;
#pragma unroll
    for (int i = 0; i < 4 * S::kRowParts; ++i) {
      if (4 * i < count) {
        const char* const at = reinterpret_cast<const char*>(from) + row_at[4 * i];
#pragma unroll
        for (int team = 0; team < S::kQuadTeams; ++team) {
          const uint32_t to =
              rows.unit() + (team * S::kRowParts + i / 4) * kUnitBytes + 16 * place_of(row + i % 4 * 4, piece);
          if (team * 64 < columns) {
            copy_async_16(to, at + team * 128, 16);
          } else if (zeros) {
            copy_async_16(to, b.args.x, 0);
          }
        }
      }
    }
    hopper::barrier_arrive_copies(rows.full());
    rows.advance();
  }

  __device__ __forceinline__ void run() {
    const Args& args = b.args;
    const Work<kRows>& work = b.shared.work;
    const int h_in = args.h_in, units = warp_units<S>(work.count), piece = b.lane % 8;
#pragma unroll 1
    for (int p = 0; p < b.shared.num_passes; ++p) {
      const Pass& pass = b.shared.passes[p];
#pragma unroll 1
      for (int i = 0; i < S::kTeamChains; ++i) {
        const int chain = (b.rank * S::kTeams + b.quad_team) * S::kTeamChains + i;
        // Leaf after leaf.
#pragma unroll 1
        for (int leaf = chain, n = chain; leaf < kLeaves && n * kPiece < h_in;) {
          const int k = n * kPiece;
          n += kLeaves;
          if (n * kPiece >= h_in) leaf += kChains, n = leaf;
          const T* const x = static_cast<const T*>(args.x) + k + 8 * piece;
#pragma unroll 1
          for (int u = 0; u < units; ++u) {
            copy_rows(x, b.shared.x_at, 16 * u * S::kRowParts, h_in - k - 8 * piece, true,
                      [](int row, int piece) { return place<3>(row, piece); });
          }
#pragma unroll 1
          for (int j = 0; j < pass.tiles; ++j) {
            const Slice& s = work.slices[pass.slice_of[j]];
            const int first = pass.rank_of[j];
            copy_weights(static_cast<const T*>(s.a) + int64_t{first} * h_in + k, h_in, 3, s.rank - first, h_in - k, 0,
                         kPiece, [](int row, int piece) { return place<3>(row, piece); });
          }
        }
      }
#pragma unroll 1
      for (int i = pass.begin; i < pass.end; ++i) {
        const Slice& s = work.slices[i];
        const int bits = s.rank <= 16 ? 1 : s.rank <= 32 ? 2 : 3, unit_rows = 128 >> bits;
#pragma unroll 1
        for (int c = (b.rank * S::kTeams + b.quad_team) * kStrip; c < s.width; c += S::kBlocks * S::kTeams * kStrip) {
#pragma unroll 1
          for (int row = 0; row < kStrip; row += unit_rows) {
            copy_weights(static_cast<const T*>(s.b) + (c + row) * s.b_stride, s.b_stride, bits, s.width - c - row,
                         s.rank, kStrip, 0, [bits](int row, int piece) {
                           return (row << bits | piece) ^ (bits == 1 ? (row >> 3 & 3) << 1 : (row >> 3 & 1) << 2);
                         });
          }
          const T* const y = static_cast<const T*>(args.y) + s.begin + c + 8 * piece;
#pragma unroll 1
          for (int u = 0; u < units; ++u) {
            copy_rows(y, b.shared.y_at, 16 * u * S::kRowParts, s.width - c - 8 * piece, false,
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
  // The first of a unit's two groups of rows.
  __device__ __forceinline__ int group_of(int unit) const { return 2 * (unit * S::kRowParts + b.part); }

  const Block& b;
  Ring<S::kWeightUnits, kUnitBytes * S::kQuadTeams> weights = {b.weights, b.weight_barriers};
  Ring<S::kRowStages, 4 * kUnitBytes> rows = {b.rows, b.row_barriers};

  // Four neighbouring registers that a product takes come from two loads. A move that the compiler does not see through
  // puts them together once; otherwise it does so before each product.
  __device__ __forceinline__ uint32_t moved(uint32_t word) const {
    uint32_t result;
    asm volatile("xor.b32 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(b.zero));
    return result;
  }

  // A tile of A of a piece, as products take it.
  __device__ __forceinline__ void read_a(uint32_t (&a)[4][4]) {
    const int g = b.lane / 4, t = b.lane % 4;
    weights.wait_full();
    const uint32_t unit = weights.unit() + b.in_quad / S::kRowParts * kUnitBytes;
    const uint32_t upper_at = unit + 16 * place<3>(g, t), lower_at = unit + 16 * place<3>(g + 8, t);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 upper = load_shared_16(upper_at ^ 64 * c), lower = load_shared_16(lower_at ^ 64 * c);
      a[2 * c][0] = moved(upper.x), a[2 * c][1] = moved(lower.x);
      a[2 * c][2] = moved(upper.y), a[2 * c][3] = moved(lower.y);
      a[2 * c + 1][0] = moved(upper.z), a[2 * c + 1][1] = moved(lower.z);
      a[2 * c + 1][2] = moved(upper.w), a[2 * c + 1][3] = moved(lower.w);
    }
    weights.release(b.lane);
  }
  __device__ __forceinline__ uint32_t rows_unit() const { return rows.unit() + b.in_quad * kUnitBytes; }
  // 16 rows of x: of rows g and g + 8.
  __device__ __forceinline__ void read_x(uint4 (&x)[2][2]) {
    const int g = b.lane / 4, t = b.lane % 4;
    rows.wait_full();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      x[0][c] = load_shared_16((rows_unit() + 16 * place<3>(g, t)) ^ 64 * c);
      x[1][c] = load_shared_16((rows_unit() + 16 * place<3>(g + 8, t)) ^ 64 * c);
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
    // What there is least of stays in registers.
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
      // The second team of a quad adds zeros where it has no piece.
      add_chain(sums, (b.rank * S::kTeams + b.quad_team) * S::kTeamChains + c, units, pass.tiles);
      static_assert(S::kTeamChains <= 2, "neighbours of a balanced tree");
#pragma unroll
      for (int j = 0; j < kT; ++j) {
#pragma unroll
        for (int i = 0; i < kWarpGroups; ++i) {
          float4* const to =
              b.parts + ((b.team * kT + j) * kGroups + group_of(i / 2) + i % 2) * 32 + b.lane;
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

  // v of a pass, as pairs of numbers, from the sums of all blocks. A warp has a group of eight rows; a lane has of each tile
  // ranks g and g + 8 of rows 2t and 2t + 1. `number`: of passes before.
  __device__ __forceinline__ void exchange(const Pass& pass, int number, int group) {
    Shared& shared = b.shared;
    const int g = b.lane / 4, t = b.lane % 4;
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
  }

  // Of B of a strip what products j take, of kChunks of 32 ranks, 0 standing for a half one: rows g and g + 8 of it are
  // outputs 8g + 2j and 8g + 2j + 1. `from`: the lane's unit.
  template <int kChunks, int kProducts>
  __device__ __forceinline__ void read_b(uint32_t (&w)[kProducts][4], uint32_t from, int j) const {
    constexpr int kRowBits = kChunks + 1;  // log2 of the pieces of a row
    const int g = b.lane / 4, t = b.lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (8 * g) % (128 >> kRowBits) + 2 * j + h;
      if constexpr (kChunks == 0) {
        uint2 words;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(words.x), "=r"(words.y)
                     : "r"(from + 16 * place_b<1>(row, t / 2) + t % 2 * 8)
                     : "memory");
        w[0][h] = moved(words.x), w[0][2 + h] = moved(words.y);
      } else {
#pragma unroll
        for (int q = 0; q < kChunks; ++q) {
          const uint4 words = load_shared_16(from + 16 * place_b<kRowBits>(row, 4 * q + t));
          w[2 * q][h] = moved(words.x), w[2 * q][2 + h] = moved(words.y);
          w[2 * q + 1][h] = moved(words.z), w[2 * q + 1][2 + h] = moved(words.w);
        }
      }
    }
  }

  template <int kChunks>
  __device__ __forceinline__ void expand(const Slice& s, int first_tile, int slice_of_pass, int units) {
    static_assert(kChunks <= 2);
    constexpr int kProducts = kChunks == 0 ? 1 : 2 * kChunks;
    constexpr int kUnitRows = 64 >> kChunks, kUnits = kStrip / kUnitRows;
    constexpr bool kInRegisters = kProducts <= 2;  // B of a strip
    const int g = b.lane / 4, t = b.lane % 4, count = b.shared.work.count;
    const uint32_t v = shared_address(b.parts) + 16 * (first_tile * kGroups * 32 + b.lane);
    const uint32_t y_at = 16 * place_y(2 * t, g);
#pragma unroll 1
    for (int of_quad = (b.rank * S::kTeams + b.quad_team) * kStrip; of_quad < s.width;
         of_quad += S::kBlocks * S::kTeams * kStrip) {
      const int c = of_quad + (b.team - b.quad_team) * kStrip;  // may be behind the end
      auto last = weights;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        last.wait_full();
        last.advance();
      }
      int slot = weights.slot + 8 * g / kUnitRows;
      slot = slot >= S::kWeightUnits ? slot - S::kWeightUnits : slot;
      const uint32_t from =
          weights.units + (slot * S::kQuadTeams + b.in_quad / S::kRowParts) * kUnitBytes;
      uint32_t w[kInRegisters ? 4 : 1][kProducts][4];
      if constexpr (kInRegisters) {
#pragma unroll
        for (int j = 0; j < 4; ++j) read_b<kChunks>(w[j], from, j);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) weights.release(b.lane);
      }
      char* const y = static_cast<char*>(b.args.y) + sizeof(T) * (s.begin + c + 8 * g);
      const bool inside = c + 8 * g < s.width;
#pragma unroll 1
      for (int u = 0; u < units; ++u) {
        uint4 pairs[2][kProducts];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
            pairs[h][p] = load_shared_16(v + 512 * (p * kGroups + group_of(u) + h));
          }
        }
        rows.wait_full();
        uint32_t words[2][2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint4 four = load_shared_16((rows_unit() + y_at + 1024 * h + 128 * e) ^ 16 * e);
            words[h][e][0] = four.x, words[h][e][1] = four.y, words[h][e][2] = four.z, words[h][e][3] = four.w;
          }
        }
        rows.release(b.lane);
        float factors[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            factors[h][e] = s.scale;
            if constexpr (std::is_same_v<T, __half>) {
              factors[h][e] *= b.shared.up[slice_of_pass][8 * (group_of(u) + h) + 2 * t + e];
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (!kInRegisters) read_b<kChunks>(w[0], from, j);
          const auto& of_j = w[kInRegisters ? j : 0];
          float sums[2][4] = {};
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
#pragma unroll
            for (int h = 0; h < 2; ++h) mma_m16n8k16<T>(sums[h], of_j[p], {pairs[h][p].x, pairs[h][p].y});
#pragma unroll
            for (int h = 0; h < 2; ++h) mma_m16n8k16<T>(sums[h], of_j[p], {pairs[h][p].z, pairs[h][p].w});
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              uint32_t& word = words[h][e][j];
              float2 before;
              if constexpr (std::is_same_v<T, __half>) {
                before = __half22float2(*reinterpret_cast<const __half2*>(&word));
              } else {
                before = {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
              }
              word = pack<T>(fmaf(factors[h][e], sums[h][e], before.x), fmaf(factors[h][e], sums[h][2 + e], before.y));
            }
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = 8 * (group_of(u) + h) + 2 * t + e;
            const uint32_t (&after)[4] = words[h][e];
            if (row < count && inside) {
              asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y + b.shared.y_at[row]), "r"(after[0]),
                           "r"(after[1]), "r"(after[2]), "r"(after[3])
                           : "memory");
            }
          }
        }
      }
      if constexpr (!kInRegisters) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) weights.release(b.lane);
      }
    }
  }

  __device__ __forceinline__ void run() {
    Shared& shared = b.shared;
    const int units = warp_units<S>(shared.work.count);
#pragma unroll 1
    for (int p = 0; p < shared.num_passes; ++p) {
      const Pass& pass = shared.passes[p];
      if (p > 0) hopper::named_barrier_sync(1, 32 * kWarps);  // v is used no more
      shrink(pass, units);
      const int warp = b.team * S::kRowParts + b.part;
      if (warp < kGroups) exchange(pass, p, warp);
      hopper::named_barrier_sync(1, 32 * kWarps);  // v is there
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
