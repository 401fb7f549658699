// add_lora of float16 and bfloat16 on sm_90 for many rows an adapter, ranks up to 64: x is read once, y read and
// written once, v in between on chip. The arithmetic is that of add_lora_ring.cuh, term by term.
//
// A cluster of two blocks serves a tile of up to 64 rows of a segment. First x moves: each of a block's eight warps has
// one of the sixteen chains of pieces of K, and a ring of units of 2 KiB in shared memory that it alone fills
// (cp.async) and reads: for each piece those of A, which go to registers, then those of x, 16 rows each. So the ranks
// of all slices, as long as they are 64 in all, take x once. Then the chains' sums meet in shared memory (over the
// rings), and the blocks' sums in that of both. Then y moves: a warp takes strips of 64 columns; it has B of a strip in
// registers, and what y holds of the next strip on the way to where that of this one was.
#include <algorithm>
#include <climits>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"
#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::fused_lora {
namespace {

constexpr int kRows = 64;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnits = 10;                   // of a warp's ring
constexpr int kRanks = 64;                   // of a pass, at most
constexpr int kTiles = kRanks / 16;          // of 16 ranks
[[maybe_unused]] constexpr int kStrip = 64;  // columns of y
// From here on the tiles of this kernel fill the device.
constexpr int64_t kManyRows = 2048;
[[maybe_unused]] constexpr int kGroups = kRows / 8;  // of eight rows, the columns of a product

// What a pass takes x for: the ranks of one slice or of several.
struct Pass {
  int begin, end;  // slices
  int tiles;       // of 16 ranks
  int slice_of[kTiles];
  int rank_of[kTiles];  // the tile's first one
};

struct TilesShared {
  uint64_t received[2];
  Work<kRows> work;
  TileScratch<kWarps> scratch;
  Pass pass;
  float up[kTiles][kRows];  // float16, of a slice of the pass: see row_exponent()
  alignas(16) float receive[2][kRows * kRanks];
  alignas(16) uint16_t high[kRows * (kRanks + 32)];
  alignas(16) uint16_t low[kRows * (kRanks + 32)];
};
constexpr size_t kHeadBytes = (sizeof(TilesShared) + 127) / 128 * 128;
constexpr size_t kSharedBytes = kHeadBytes + size_t{kUnitBytes} * kUnits * kWarps;
// Floats from row to row of the chains' sums: the stores of a warp meet no bank twice.
__host__ __device__ constexpr int part_pitch(int tiles) { return 16 * tiles + 4; }
static_assert(kWarps * kRows * part_pitch(kTiles) * 4 <= kUnitBytes * kUnits * kWarps);
static_assert(kSharedBytes <= 227 * 1024);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Tiles of a slice in a pass: what its last product of the expand reads is there.
__device__ __forceinline__ int padded_tiles(int rank) { return rank <= 16 ? 1 : (rank + 31) / 32 * 2; }

// The next slices from `begin` on that fit.
template <int kT>
__device__ __forceinline__ void plan_pass(const Work<kRows>& work, int begin, Pass* pass) {
  pass->begin = begin;
  int tiles = 0, s = begin;
  for (; s < work.num_slices; ++s) {
    const int more = padded_tiles(work.slices[s].rank);
    if (tiles + more > kT) break;
    for (int i = 0; i < more; ++i) {
      pass->slice_of[tiles + i] = s;
      pass->rank_of[tiles + i] = 16 * i;
    }
    tiles += more;
  }
  pass->end = s;
  pass->tiles = tiles;
}

// Floats from row to row of v's high and of its low numbers, likewise.
template <int kT>
inline constexpr int kPitch = kT == 4 ? 96 : 16 * kT;

template <class T>
struct Block {
  const Args& args;
  TilesShared& shared;
  uint32_t ring;  // of the warp
  float* parts;
  int rank, warp, lane;  // rank: in the cluster
};

// The sums over K of a pass, to shared memory.
template <class T, int kT>
__device__ __forceinline__ void shrink(const Block<T>& b) {
  const Args& args = b.args;
  const Work<kRows>& work = b.shared.work;
  const Pass& pass = b.shared.pass;
  const int g = b.lane / 4, t = b.lane % 4;
  const int chain = b.rank * kWarps + b.warp, h_in = args.h_in;
  const int length = ((h_in + kPiece - 1) / kPiece - chain + kChains - 1) >> kChainBits;
  const int tiles = pass.tiles, groups = (work.count + 15) / 16;

  int fill_m = 0, fill_unit = 0, fill_slot = 0;
  const auto start = [&] {
    if (fill_m < length) {
      const int k = (fill_m * kChains + chain) * kPiece;
      const uint32_t to = b.ring + fill_slot * kUnitBytes;
      if (fill_unit < tiles) {
        const Slice& s = work.slices[pass.slice_of[fill_unit]];
        const int first = pass.rank_of[fill_unit];
        const T* const a = static_cast<const T*>(s.a);
        copy_unit<T, 3>(to, a + int64_t{first} * h_in + k, h_in, s.rank - first, h_in - k,
                        reinterpret_cast<uintptr_t>(a) % 16 == 0, args.x, b.lane);
      } else {
        const int row = (fill_unit - tiles) * 16 + b.lane / 8, piece = b.lane % 8;
        const T* const x = static_cast<const T*>(args.x) + k + 8 * piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = row + 4 * i < work.count && k + 8 * piece < h_in;
          const T* const from = x + work.rows[valid ? row + 4 * i : 0] * args.x_stride;
          copy_async_16(to + 16 * place<3>(b.lane / 8 + 4 * i, piece), valid ? from : args.x, valid ? 16 : 0);
        }
      }
      if (++fill_unit == tiles + groups) fill_unit = 0, ++fill_m;
    }
    copy_commit();
    fill_slot = fill_slot + 1 == kUnits ? 0 : fill_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kUnits; ++i) start();

  float sums[kT][kGroups][4] = {};
  int slot = 0;
  // Of the units that are on their way the first `count` have come.
  const auto arrived = [&](int count) {
    switch (count) {
      case 1:
        copy_wait<kUnits - 1>();
        break;
      case 2:
        copy_wait<kUnits - 2>();
        break;
      case 3:
        copy_wait<kUnits - 3>();
        break;
      case 4:
        copy_wait<kUnits - 4>();
        break;
      case 5:
        copy_wait<kUnits - 5>();
        break;
      case 6:
        copy_wait<kUnits - 6>();
        break;
      default:
        copy_wait<kUnits - 8>();
    }
    __syncwarp();
  };
  const auto unit_at = [&](int i) { return b.ring + (slot + i < kUnits ? slot + i : slot + i - kUnits) * kUnitBytes; };
#pragma unroll 1
  for (int m = 0; m < length; ++m) {
    // 32 rows at a time, so that A is read from shared memory twice and takes few registers.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (2 * half >= groups) break;
      arrived(tiles + min(2 * half + 2, groups));
      uint4 x[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t from = unit_at(tiles + 2 * half + i / 2);
#pragma unroll
        for (int c = 0; c < 2; ++c) x[i][c] = load_shared_16(from + 16 * place<3>(i % 2 * 8 + g, 4 * c + t));
      }
#pragma unroll
      for (int j = 0; j < kT; ++j) {
        if (j < tiles) {
          const uint32_t from = unit_at(j);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const uint4 upper = load_shared_16(from + 16 * place<3>(g, 4 * c + t));
            const uint4 lower = load_shared_16(from + 16 * place<3>(g + 8, 4 * c + t));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float (&sum)[4] = sums[j][4 * half + i];
              mma_m16n8k16<T>(sum, {upper.x, lower.x, upper.y, lower.y}, {x[i][c].x, x[i][c].y});
              mma_m16n8k16<T>(sum, {upper.z, lower.z, upper.w, lower.w}, {x[i][c].z, x[i][c].w});
            }
          }
        }
      }
    }
    __syncwarp();  // all lanes have read
    slot = slot + tiles + groups < kUnits ? slot + tiles + groups : slot + tiles + groups - kUnits;
#pragma unroll 1
    for (int i = 0; i < tiles + groups; ++i) start();
  }
  copy_wait<0>();
  __syncthreads();  // the rings are used no more
  constexpr int kPartPitch = part_pitch(kT);
#pragma unroll
  for (int j = 0; j < kT; ++j) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float* const to = b.parts + (b.warp * kRows + 8 * group + 2 * t) * kPartPitch + 16 * j + g;
      to[0] = sums[j][group][0], to[8] = sums[j][group][2];
      to[kPartPitch] = sums[j][group][1], to[kPartPitch + 8] = sums[j][group][3];
    }
  }
}

// v of a pass, from the chains' sums of both blocks, as pairs of numbers. `number`: of passes before.
template <class T, int kT>
__device__ __forceinline__ void exchange(const Block<T>& b, int number) {
  constexpr int kPartPitch = part_pitch(kT), kFours = 4 * kT;  // of ranks, of a row
  constexpr int kEach = kRows * kFours / kThreads;
  TilesShared& shared = b.shared;
  const int buffer = number & 1;
  const uint32_t barrier = shared_address(&shared.received[buffer]), peer = b.rank ^ 1;
  __syncthreads();  // all sums are there
  if (number == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0) hopper::barrier_expect(barrier, kRows * kFours * 16);
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kFours, four = at % kFours;
    float* const from = b.parts + row * kPartPitch + 4 * four;
    float4 v[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v[w] = *reinterpret_cast<const float4*>(from + w * kRows * kPartPitch);
#pragma unroll
    for (int width = 1; width < kWarps; width *= 2) {
#pragma unroll
      for (int w = 0; w < kWarps; w += 2 * width) {
        v[w].x += v[w + width].x, v[w].y += v[w + width].y, v[w].z += v[w + width].z, v[w].w += v[w + width].w;
      }
    }
    *reinterpret_cast<float4*>(from) = v[0];  // for this thread, below
    hopper::store_async(hopper::remote_address(shared_address(&shared.receive[buffer][4 * at]), peer), v[0],
                        hopper::remote_address(barrier, peer));
  }
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(number >> 1 & 1)
        : "memory");
  } while (done == 0);
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kFours, four = at % kFours;
    const float4 own = *reinterpret_cast<const float4*>(b.parts + row * kPartPitch + 4 * four);
    const float4 other = *reinterpret_cast<const float4*>(&shared.receive[buffer][4 * at]);
    float v[4] = {own.x + other.x, own.y + other.y, own.z + other.z, own.w + other.w};
    const int tile = four / 4;
    const bool used = tile < shared.pass.tiles;
    const int slice = used ? shared.pass.slice_of[tile] : 0;
    const int rest = used ? shared.work.slices[slice].rank - shared.pass.rank_of[tile] - four % 4 * 4 : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = e < rest ? v[e] : 0.0f;
    if constexpr (std::is_same_v<T, __half>) {
      // The power of two that float16 needs is of the row and slice.
      float largest = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) largest = fmaxf(largest, isfinite(v[e]) ? fabsf(v[e]) : 0.0f);
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      // Over the tiles of the slice.
      float of_slice = largest;
#pragma unroll
      for (int j = 0; j < kT; ++j) {
        const float of_tile = __shfl_sync(0xffffffffu, largest, (b.lane & ~(kFours - 1)) + 4 * j);
        if (j < shared.pass.tiles && used && shared.pass.slice_of[j] == slice) of_slice = fmaxf(of_slice, of_tile);
      }
      const int exponent = row_exponent(of_slice);
      const float down = down_scale(exponent);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] *= down;
      if (used && four % 4 == 0 && shared.pass.rank_of[tile] == 0) {
        shared.up[slice - shared.pass.begin][row] = up_scale(exponent);
      }
    }
    ushort4 high, low;
    split<T>(v[0], &high.x, &low.x);
    split<T>(v[1], &high.y, &low.y);
    split<T>(v[2], &high.z, &low.z);
    split<T>(v[3], &high.w, &low.w);
    *reinterpret_cast<ushort4*>(&shared.high[row * kPitch<kT> + 4 * four]) = high;
    *reinterpret_cast<ushort4*>(&shared.low[row * kPitch<kT> + 4 * four]) = low;
  }
  __syncthreads();
}

// What y holds of a strip, of the lane: columns 8g .. 8g + 7 of rows 2t and 2t + 1 of each group.
using Held = bgmv::Words<4>[kGroups][2];

template <class T>
__device__ __forceinline__ T* y_at(const Block<T>& b, const Slice& s, int row, int strip) {
  return static_cast<T*>(b.args.y) + b.shared.work.rows[row] * b.args.y_stride + s.begin + strip * kStrip +
         b.lane / 4 * 8;
}

template <class T>
__device__ __forceinline__ void load_y(const Block<T>& b, const Slice& s, int group, int strip,
                                       bgmv::Words<4> (&held)[2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 8 * group + 2 * (b.lane % 4) + e;
    const bool there = row < b.shared.work.count && strip * kStrip + b.lane / 4 * 8 < s.width;
    held[e] = bgmv::load_if(there, y_at(b, s, there ? row : 0, strip));
  }
}

// kChunks of 32 ranks, 0 standing for a half one: of B, the lane's part of output rows 8g + 2j + h of a strip.
template <class T, int kChunks>
struct Strip {
  static constexpr int kParts = kChunks == 0 ? 1 : kChunks;
  static constexpr int kWords = kChunks == 0 ? 2 : 4;
  bgmv::Words<kWords> parts[kParts][4][2];

  __device__ __forceinline__ void load(const Slice& s, int strip, int lane) {
    const int g = lane / 4, k = lane % 4 * 2 * kWords;
    const bool aligned = reinterpret_cast<uintptr_t>(s.b) % 16 == 0 && s.b_stride % 8 == 0;
    const T* from = static_cast<const T*>(s.b) + (int64_t{strip} * kStrip + 8 * g) * s.b_stride + k;
    const int rows = s.width - strip * kStrip - 8 * g;
    if (aligned && s.rank == 32 * kChunks + (kChunks == 0 ? 16 : 0)) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int c = 0; c < kParts; ++c) {
            parts[c][j][h] = {};
            if (2 * j + h < rows) parts[c][j][h] = *reinterpret_cast<const bgmv::Words<kWords>*>(from + 32 * c);
          }
          from += s.b_stride;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int c = 0; c < kParts; ++c) {
            const int count = 2 * j + h < rows ? min(max(s.rank - 32 * c - k, 0), 2 * kWords) : 0;
            const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from + 32 * c), count);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < kWords; ++i) parts[c][j][h].values[i] = words[i];
          }
          from += s.b_stride;
          __syncwarp();  // one after the other: all at once take too many registers
        }
      }
    }
  }
};

// A slice: first_rank is that of its v in the pass. `held` has come for the warp's first strip, and goes on to the next
// slice's, `then`, if there is one.
template <class T, int kT, int kChunks>
__device__ __forceinline__ void expand(const Block<T>& b, const Slice& s, int first_rank, int slice_of_pass, Held& held,
                                       const Slice* then) {
  TilesShared& shared = b.shared;
  const int g = b.lane / 4, t = b.lane % 4, count = shared.work.count;
  const int first = b.rank * kWarps + b.warp;
  const uint32_t v_at = (g * kPitch<kT> + first_rank) * 2 + t * (kChunks == 0 ? 8 : 16);
  const uint32_t high_at = shared_address(shared.high) + v_at, low_at = shared_address(shared.low) + v_at;
  Strip<T, kChunks> weights;
  if (first * kStrip < s.width) weights.load(s, first, b.lane);
#pragma unroll 1
  for (int strip = first; strip * kStrip < s.width; strip += 2 * kWarps) {
    const bool more = (strip + 2 * kWarps) * kStrip < s.width;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (8 * group >= count) break;
      float sums[4][4] = {};
      constexpr int kRowBytes = 8 * kPitch<kT> * 2;
      if constexpr (kChunks == 0) {
        uint2 high, low;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(high.x), "=r"(high.y)
                     : "r"(high_at + group * kRowBytes));
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low.x), "=r"(low.y) : "r"(low_at + group * kRowBytes));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& w = weights.parts[0][j];
          const uint32_t a[4] = {w[0].values[0], w[1].values[0], w[0].values[1], w[1].values[1]};
          mma_m16n8k16<T>(sums[j], a, {high.x, high.y});
          mma_m16n8k16<T>(sums[j], a, {low.x, low.y});
        }
      } else {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint4 high = load_shared_16(high_at + group * kRowBytes + 64 * c);
          const uint4 low = load_shared_16(low_at + group * kRowBytes + 64 * c);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const auto& w = weights.parts[c][j];
            const uint32_t a0[4] = {w[0].values[0], w[1].values[0], w[0].values[1], w[1].values[1]};
            const uint32_t a1[4] = {w[0].values[2], w[1].values[2], w[0].values[3], w[1].values[3]};
            mma_m16n8k16<T>(sums[j], a0, {high.x, high.y});
            mma_m16n8k16<T>(sums[j], a0, {low.x, low.y});
            mma_m16n8k16<T>(sums[j], a1, {high.z, high.w});
            mma_m16n8k16<T>(sums[j], a1, {low.z, low.w});
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * group + 2 * t + e;
        float factor = s.scale;
        if constexpr (std::is_same_v<T, __half>) factor *= shared.up[slice_of_pass][row];
        Vec<T, 8> after;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint16_t bits = static_cast<uint16_t>(held[group][e].values[i / 2] >> (16 * (i % 2)));
          after.values[i] =
              from_float<T>(fmaf(factor, sums[i / 2][2 * (i % 2) + e], to_float(*reinterpret_cast<const T*>(&bits))));
        }
        if (row < count && strip * kStrip + 8 * g < s.width) store<T, 8>(y_at(b, s, row, strip), after);
      }
      // The same registers take this part of the next strip.
      if (more) load_y(b, s, group, strip + 2 * kWarps, held[group]);
    }
    if (more) weights.load(s, strip + 2 * kWarps, b.lane);
  }
  if (then != nullptr) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) load_y(b, *then, group, first, held[group]);
  }
}

template <class T, int kT>
__device__ __forceinline__ void run_pass(const Block<T>& b, int number) {
  TilesShared& shared = b.shared;
  shrink<T, kT>(b);
  const int begin = shared.pass.begin, end = shared.pass.end;
  Held held;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    load_y(b, shared.work.slices[begin], group, b.rank * kWarps + b.warp, held[group]);
  }
  exchange<T, kT>(b, number);
  int tile = 0;
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const Slice& s = shared.work.slices[i];
    const Slice* const then = i + 1 < end ? &shared.work.slices[i + 1] : nullptr;
    const int tiles = padded_tiles(s.rank);
    if (tiles == 1) {
      expand<T, kT, 0>(b, s, 16 * tile, i - begin, held, then);
    } else if (tiles == 2) {
      if constexpr (kT >= 2) expand<T, kT, 1>(b, s, 16 * tile, i - begin, held, then);
    } else {
      if constexpr (kT >= 4) expand<T, kT, 2>(b, s, 16 * tile, i - begin, held, then);
    }
    tile += tiles;
  }
  __syncthreads();  // v is used no more, and the plan
}

#endif

// Grid: pairs of blocks, a tile each. Rows of x and y and what slices begin and end with are multiples of 16 bytes.
// kT: tiles of 16 ranks that a pass may have.
template <Arch kArch, class T, int kT>
__global__ void __launch_bounds__(kThreads, 1) add_lora_tiles_kernel(const __grid_constant__ Args args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char memory[];
  TilesShared& shared = *reinterpret_cast<TilesShared*>(memory);
  if (args.early_reads) launch_dependents<kArch>();
  if (threadIdx.x == 32) {
    hopper::barrier_init(shared_address(&shared.received[0]), 1);
    hopper::barrier_init(shared_address(&shared.received[1]), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // waited for before the first send
  if (!args.early_reads) grid_dependency_wait<kArch>();
  find_work<T>(args, &shared.scratch, &shared.work, [&](uint32_t) { return blockIdx.x / 2; });
  if (args.early_reads) {
    grid_dependency_wait<kArch>();
  } else {
    launch_dependents<kArch>();
  }
  if (shared.work.count == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block<T> b = {args,
                      shared,
                      shared_address(memory + kHeadBytes) + warp * (kUnits * kUnitBytes),
                      reinterpret_cast<float*>(memory + kHeadBytes),
                      static_cast<int>(blockIdx.x % 2),
                      warp,
                      lane};
  int number = 0;
#pragma unroll 1
  for (int slice = 0; slice < shared.work.num_slices; ++number) {
    if (threadIdx.x == 0) plan_pass<kT>(shared.work, slice, &shared.pass);
    __syncthreads();
    slice = shared.pass.end;
    run_pass<T, kT>(b, number);
  }
#endif
}

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  LaunchShape shape;
  shape.cluster = 2;
  shape.grid = static_cast<unsigned>(2 * max_tiles(args, kRows));
  shape.block = kThreads;
  shape.shared_bytes = kSharedBytes;
  // Ranks of all slices in one pass, if they may fit.
  return args.max_rank <= 16 && args.num_slices == 1
             ? launcher.launch<add_lora_tiles_kernel<Arch::kSm90, T, 1>>(shape, args)
             : launcher.launch<add_lora_tiles_kernel<Arch::kSm90, T, 4>>(shape, args);
}

}  // namespace

bool is_tiles(const Launcher& launcher, const Args& args) {
  bool aligned = args.x_vectors && args.y_vectors && args.h_in % 8 == 0;
  for (int s = 0; s <= args.num_slices; ++s) aligned = aligned && args.slice_begin[s] % 8 == 0;
  const int64_t segments = std::min<int64_t>(args.max_segments, args.num_adapters + 1);
  return launcher.arch == Arch::kSm90 && aligned && args.max_rank <= kRanks && args.rows >= kManyRows &&
         args.rows >= 8 * segments;
}

Status launch_tiles(const Launcher& launcher, DType dtype, const Args& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
