// sgmv for float16 and bfloat16 on the sm_90 path where d_in is large and d_out at most 512: x is what moves.
//
// A cluster has a tile of rows, a block of it a part of d_in (a function of d_in alone), which it walks over in steps of
// 64 through a ring in shared memory that cp.async fills, and wgmma reads: 64 rows a warpgroup, all columns. What the
// ring holds is not enough to keep the memory busy, so the rows of the tile are asked into the second-level cache ahead
// of it, from before the wait for the kernel before this one on. Blocks are small enough for two or more to share a
// multiprocessor: those of the next kernel are there, and their first rows on the way, when this one ends.
//
// In the end each block sends its sums to the block of the cluster that owns the row, where they are added in the order
// of the blocks.
//
// Rows and columns of a tile that are not there are not filled: a product's element is a function of its own row and
// column alone, and those are not stored.
#pragma once

#include "src/cuda/lora/sgmv_shrink_wgmma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {

inline constexpr int kShrinkStep = 64;  // of d_in: 128 bytes, the widest swizzle of wgmma

// What the host chooses, beside the kernel.
struct ShrinkPlan {
  int cluster;   // blocks that share d_in: a power of 2, a function of d_in
  int prefetch;  // steps, a multiple of kPrefetchSteps, that the second-level cache is asked for ahead
#ifdef PUNICA_TUNE
  unsigned long long* stamps;
#endif
};
inline constexpr int kPrefetchSteps = 4;

#ifdef PUNICA_TUNE
extern int tune_cluster, tune_prefetch, tune_rows;
extern unsigned long long* tune_stamps;
#define STAMP(i)                                                                               \
  if (threadIdx.x == 0 && plan.stamps != nullptr) {                                            \
    unsigned long long now;                                                                    \
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");                          \
    plan.stamps[blockIdx.x * 16 + i] = now;                                                    \
    plan.stamps[blockIdx.x * 16 + 8 + i] = clock64();                                          \
  }
#else
#define STAMP(i)
#endif

constexpr int shrink_blocks(int columns, int rows) {
  if (rows == 128) return columns == 256 ? 1 : 2;
  if (rows == 64) return columns <= 32 ? 4 : columns == 64 ? 3 : columns == 128 ? 2 : 1;
  return columns == 16 ? 6 : columns == 32 ? 4 : columns == 64 ? 3 : 2;
}

// kN: columns of a tile, 16 to 256. kRows: 16, 64 or 128.
template <int kN, int kRows>
struct Shrink {
  static constexpr int kThreads = kRows == 128 ? 256 : 128;  // 64 rows a warpgroup
  static constexpr int kHalf = kN < 128 ? kN : 128;          // columns of a product
  static constexpr int kHalves = kN / kHalf;
  static constexpr int kXBytes = kRows * 128;
  static constexpr int kStageBytes = kXBytes + kN * 128;
  // Of a tile of 16 rows a product reads 64 all the same, whatever follows.
  static constexpr int kTailBytes = kStageBytes < 64 * 128 ? 64 * 128 - kStageBytes : 0;
  // The sums that a block receives: beside the ring if they are small, else over it, when all of the cluster are done.
  static constexpr int kSumBytes = kRows * kN * 4;
  static constexpr bool kSumsBeside = kN <= 32;
  static constexpr int kOtherBytes = kTailBytes + (kSumsBeside ? kSumBytes : 0);

  static constexpr int kBlocks = shrink_blocks(kN, kRows);  // of a multiprocessor
  static constexpr int kRoom = (228 << 10) / kBlocks - (2 << 10);  // 1 KiB the system's, 1 KiB static
  static constexpr int kMostStages = (kRoom - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  // Steps whose products may be under way while the next one's are started.
  static constexpr int kLag = kN == 256 && kStages > 3 ? 1 : 0;
  static constexpr int kAhead = kStages - 1 - kLag;  // steps of copies under way
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes + kOtherBytes;
  static_assert(kAhead >= 2 && (kSumsBeside || kSumBytes <= kRingBytes));
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A thread's chunks of 8 elements in a stage, kRowStep rows apart, of which `rows` exist. Not inlined, so that its
// registers are not those of the loop that seldom needs it.
template <int kEach, int kRowStep>
__device__ __noinline__ void fill_words(uint32_t to, uint32_t to_step, const uint16_t* from, int64_t from_step,
                                        int count, int rows) {
#pragma unroll 2
  for (int i = 0; i < kEach; ++i) {
    store_shared_16(to + i * to_step, load_eight_words(from, i * kRowStep < rows ? count : 0));
    from += from_step;
  }
}

// The same by asynchronous copies of 16 bytes. kZeros: rows that do not exist are zeros, else left as they are.
template <int kEach, int kRowStep, bool kZeros, class T>
__device__ __forceinline__ void fill_vectors(uint32_t to, uint32_t to_step, const T* from, int64_t from_step, int count,
                                             int rows) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kZeros || i * kRowStep < rows) copy_async_16(to + i * to_step, from, i * kRowStep < rows ? count * 2 : 0);
    from += from_step;
  }
}

#endif

template <Arch kArch, class T, bool kInOut, int kN, int kRows>
__global__ void __launch_bounds__(Shrink<kN, kRows>::kThreads, Shrink<kN, kRows>::kBlocks)
    sgmv_shrink(const SgmvArgs args, const ShrinkPlan plan) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shrink<kN, kRows>;
  constexpr int kThreads = S::kThreads;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier;
  launch_dependents<kArch>();
  STAMP(0)

  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const uint32_t rank = blockIdx.x % plan.cluster;
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kN - 1) / kN);
  const int64_t column = int64_t{blockIdx.x / plan.cluster % columns_blocks} * kN;
  const uint32_t number = blockIdx.x / plan.cluster / columns_blocks;
  const int64_t all_steps = (args.d_in + kShrinkStep - 1) / kShrinkStep;
  const int64_t begin = all_steps * rank / plan.cluster;
  const int steps = static_cast<int>(all_steps * (rank + 1) / plan.cluster - begin);
  const int64_t first_k = begin * kShrinkStep;
  const bool x_vectors = args.x_aligned && args.d_in % 8 == 0;
  const uint32_t ring = shared_address(memory);

  // Asks for `count` steps of the rows from step `step` on, a row a thread.
  const auto prefetch = [&](int64_t first_row, int64_t rows, int step, int count) {
    if (id >= kRows || id >= rows || step >= steps) return;
    const T* from = static_cast<const T*>(args.x) + (first_row + id) * args.x_stride + first_k + step * kShrinkStep;
    const int64_t elements = min(int64_t{min(count, steps - step)} * kShrinkStep, args.d_in - first_k - step * kShrinkStep);
    if (x_vectors) {
      prefetch_bytes(from, static_cast<uint32_t>(elements * 2));
    } else {
      for (int64_t i = 0; i < elements; i += kLineBytes / 2) prefetch_line(from + i);
    }
  };

  // A thread's chunks are in one column of 16 bytes, turned within its 8 (wgmma's swizzle) by the row within 8 rows.
  constexpr int kRowStep = kThreads / 8;
  const int fill_row = id / 8, fill_chunk = id % 8;
  const uint32_t fill_to = fill_row * 128 + ((fill_chunk ^ (fill_row & 7)) * 16);
  const int64_t x_step = kRowStep * args.x_stride;
  const auto fill_x = [&](int64_t first_row, int rows, int step, int slot) {
    if (kRows < kRowStep && fill_row >= kRows) return;
    const int64_t k = first_k + int64_t{step} * kShrinkStep + fill_chunk * 8;
    const T* from = static_cast<const T*>(args.x) + (first_row + fill_row) * args.x_stride + k;
    const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
    const uint32_t to = ring + slot * S::kStageBytes + fill_to;
    if (x_vectors) {
      fill_vectors<kRows / kRowStep, kRowStep, false>(to, kRowStep * 128, from, x_step, count, rows - fill_row);
    } else {
      fill_words<kRows / kRowStep, kRowStep>(to, kRowStep * 128, reinterpret_cast<const uint16_t*>(from), x_step, count,
                                             rows - fill_row);
    }
  };

  const uint32_t received_barrier = shared_address(&barrier);
  const int64_t guess = int64_t{number} * kRows;
  const auto rows_at = [&](int64_t row) { return static_cast<int>(min(max(args.rows - row, int64_t{0}), int64_t{kRows})); };
  // Without early reads x is read, in the time that the tables take, where the tile is if the segments cover all rows
  // in order, as they mostly do.
  if (!args.early_reads) {
    prefetch(guess, rows_at(guess), 0, plan.prefetch);
    prefetch_tables(args);
  }
  if (id == 0) {
    barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (!args.early_reads) {
    grid_dependency_wait<kArch>();
    if (x_vectors) {
#pragma unroll 1
      for (int i = 0; i < min(S::kAhead, steps); ++i) fill_x(guess, rows_at(guess), i, i);
    }
  }
  STAMP(1)
  SgmvTile<T> tile;
  if (!find_tile<kRows, kThreads>(args, number, scratch, &tile)) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    copy_wait<0>();
    return;  // the other blocks of the cluster find the same
  }
  STAMP(2)
  const bool guessed = !args.early_reads && x_vectors && tile.row == guess && tile.rows <= rows_at(guess);
  if (args.early_reads) prefetch(tile.row, tile.rows, 0, plan.prefetch);

  // Rows of the tile that this block adds up in the end.
  const int share = kRows / plan.cluster;
  const int owned = min(max(tile.rows - static_cast<int>(rank) * share, 0), share);
  if (id == 0) barrier_expect(received_barrier, owned * plan.cluster * kN * 4);
  if constexpr (S::kSumsBeside) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // waited for before the first remote store
  }

  const bool w_vectors =
      reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 8 == 0;
  const auto fill_w = [&](int step, int slot) {
    const int64_t k0 = first_k + int64_t{step} * kShrinkStep;
    const uint32_t stage = ring + slot * S::kStageBytes + S::kXBytes;
    if constexpr (!kInOut) {
      // Rows are columns of y.
      if (kN < kRowStep && fill_row >= kN) return;
      constexpr int kEach = kN < kRowStep ? 1 : kN / kRowStep;
      const int64_t k = k0 + fill_chunk * 8;
      const T* from = tile.w + (column + fill_row) * args.d_in + k;
      const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
      const int rows = static_cast<int>(min(args.d_out - column, int64_t{kN})) - fill_row;
      if (w_vectors) {
        fill_vectors<kEach, kRowStep, false>(stage + fill_to, kRowStep * 128, from, kRowStep * args.d_in, count, rows);
      } else {
        fill_words<kEach, kRowStep>(stage + fill_to, kRowStep * 128, reinterpret_cast<const uint16_t*>(from),
                                    kRowStep * args.d_in, count, rows);
      }
    } else {
      // Rows are those of d_in; in units of up to 64 columns, whose rows lie one after the other.
      constexpr int kChunks = S::kHalf / 8, kStep = kThreads / kChunks;
      constexpr int kUnitChunks = kChunks < 8 ? kChunks : 8;
      constexpr int kEach = kStep > kShrinkStep ? 1 : kShrinkStep / kStep;
      static_assert(kStep % 8 == 0);
      const int row = id / kChunks, chunk = id % kChunks;
      if (kStep > kShrinkStep && row >= kShrinkStep) return;
      const int turn = kUnitChunks == 8 ? row & 7 : kUnitChunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
      const uint32_t to = stage + chunk / kUnitChunks * (kShrinkStep * 128) +
                          (row * kUnitChunks + (chunk % kUnitChunks ^ turn)) * 16;
      const int rows = static_cast<int>(min(max(args.d_in - k0, int64_t{0}), int64_t{kShrinkStep})) - row;
#pragma unroll
      for (int half = 0; half < S::kHalves; ++half) {
        const int64_t at = column + half * S::kHalf + chunk * 8;
        const T* from = tile.w + (k0 + row) * args.d_out + at;
        const int count = static_cast<int>(min(max(args.d_out - at, int64_t{0}), int64_t{8}));
        if (count == 0) continue;
        const uint32_t half_to = to + half * (S::kHalf * kShrinkStep * 2);
        if (w_vectors) {
          fill_vectors<kEach, kStep, true>(half_to, kStep * kUnitChunks * 16, from, kStep * args.d_out, count, rows);
        } else {
          fill_words<kEach, kStep>(half_to, kStep * kUnitChunks * 16, reinterpret_cast<const uint16_t*>(from),
                                   kStep * args.d_out, count, rows);
        }
      }
    }
  };

  if (args.early_reads) {
#pragma unroll 1
    for (int i = 0; i < min(S::kAhead, steps); ++i) fill_w(i, i);
    grid_dependency_wait<kArch>();
  } else if (!guessed) {
    copy_wait<0>();
    if (tile.row != guess) prefetch(tile.row, tile.rows, 0, plan.prefetch);
  }
#pragma unroll 1
  for (int i = 0; i < S::kAhead; ++i) {
    if (i < steps) {
      if (!args.early_reads) fill_w(i, i);
      if (!guessed) fill_x(tile.row, tile.rows, i, i);
    }
    copy_commit();
  }

  float sums[S::kHalves][S::kHalf / 2] = {};
  // A part of the descriptors that is the same in all stages, and what the next 16 of d_in are further on.
  constexpr int kUnitBytes = kInOut && kN < 64 ? kN * 2 : 128;  // of a row of W in shared memory
  constexpr uint64_t kSwizzle = kUnitBytes == 128 ? 1 : kUnitBytes == 64 ? 2 : 3;
  constexpr uint32_t kWNext = (kInOut ? 16 * kUnitBytes : 32) >> 4;
  const uint64_t x_descriptor = wgmma_descriptor(ring + id / 128 * (64 * 128), 1, 16, 8 * 128);
  const uint64_t w_descriptor =
      wgmma_descriptor(ring + S::kXBytes, kSwizzle, kInOut ? kShrinkStep * 128 : 16, 8 * kUnitBytes);
  int slot = 0, next_slot = S::kAhead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::kAhead - 1>();
    fence_async_proxy();
    __syncthreads();
    if (step == 0) { STAMP(3) }
    const uint64_t a = x_descriptor + slot * (S::kStageBytes >> 4), b = w_descriptor + slot * (S::kStageBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kShrinkStep / 16; ++k) {
#pragma unroll
      for (int half = 0; half < S::kHalves; ++half) {
        wgmma_m64k16<T, S::kHalf, kInOut>(sums[half], a + k * 2,
                                          b + k * kWNext + half * (S::kHalf * kShrinkStep * 2 >> 4));
      }
    }
    wgmma_commit();
    if (step + S::kAhead < steps) {
      fill_w(step + S::kAhead, next_slot);
      fill_x(tile.row, tile.rows, step + S::kAhead, next_slot);
    }
    copy_commit();
    if (step % kPrefetchSteps == 0 && plan.prefetch > 0) {
      prefetch(tile.row, tile.rows, step + plan.prefetch, kPrefetchSteps);
    }
    wgmma_wait<S::kLag>();
    if (++slot == S::kStages) slot = 0;
    if (++next_slot == S::kStages) next_slot = 0;
  }
  wgmma_wait<0>();
  STAMP(4)
#pragma unroll
  for (int half = 0; half < S::kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < S::kHalf / 2; ++i) asm volatile("" : "+f"(sums[half][i])::"memory");
  }
  copy_wait<0>();
  if constexpr (!S::kSumsBeside) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");

  STAMP(5)
  // Received: [block][8 columns][row][column], so that a warp writes adjacent bytes.
  const uint32_t received = ring + (S::kSumsBeside ? S::kRingBytes + S::kTailBytes : 0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = id / 32 * 16 + h * 8 + lane / 4;
    if (row < tile.rows) {
      const uint32_t owner = row / share;
      const uint32_t to =
          remote_address(received + ((rank * (kN / 8) * share + row % share) * 8 + lane % 4 * 2) * 4, owner);
      const uint32_t to_barrier = remote_address(received_barrier, owner);
#pragma unroll
      for (int half = 0; half < S::kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < S::kHalf / 8; ++j) {
          store_async(to + (half * (S::kHalf / 8) + j) * share * 32, sums[half][j * 4 + h * 2],
                      sums[half][j * 4 + h * 2 + 1], to_barrier);
        }
      }
    }
  }

  const int columns = static_cast<int>(min(args.d_out - column, int64_t{kN}));
  T* const y = static_cast<T*>(args.y) + (tile.row + rank * share) * args.y_stride + column;
  const float* const parts = reinterpret_cast<const float*>(memory + (received - ring));
  constexpr int kAtOnce = 4;
  bool complete = false;
#pragma unroll 1
  for (int first = id; first < owned * kN; first += kAtOnce * kThreads) {
    T old[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kThreads;
      if (at < owned * kN && at % kN < columns) old[i] = y[at / kN * args.y_stride + at % kN];
    }
    if (!complete) barrier_wait(received_barrier, 0);
    if (!complete) { STAMP(6) }
    complete = true;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kThreads;
      if (at < owned * kN && at % kN < columns) {
        const float* part = parts + (at % kN / 8 * share + at / kN) * 8 + at % 8;
        float sum = part[0];
        for (int k = 1; k < plan.cluster; ++k) sum += part[k * share * kN];
        y[at / kN * args.y_stride + at % kN] = from_float<T>(to_float(old[i]) + sum);
      }
    }
  }
  STAMP(7)
#endif
}

// The blocks of d_in: a function of d_in alone, as the sum is.
inline int shrink_cluster(int64_t d_in) { return d_in < 512 ? 1 : d_in < 1024 ? 2 : d_in < 8192 ? 4 : 8; }

template <class T, bool kInOut, int kN, int kRows>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args) {
  using S = Shrink<kN, kRows>;
  ShrinkPlan plan;
  plan.cluster = shrink_cluster(args.d_in);
  plan.prefetch = 16;
#ifdef PUNICA_TUNE
  plan.stamps = tune_stamps;
  if (tune_cluster > 0) plan.cluster = tune_cluster;
  if (tune_prefetch >= 0) plan.prefetch = tune_prefetch;
#endif
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kRows) * ((args.d_out + kN - 1) / kN) * plan.cluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = plan.cluster;
  return launcher.launch<sgmv_shrink<Arch::kSm90, T, kInOut, kN, kRows>>(shape, args, plan);
}

template <class T, bool kInOut, int kN>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args) {
  // Rows of a tile: a choice of tiles, not of arithmetic.
  int rows = 64;
  if (short_segments(args)) {
    rows = 16;
  } else if (args.rows >= 128 * args.num_segments && args.rows * shrink_cluster(args.d_in) >= 128 * 100) {
    rows = 128;
  }
#ifdef PUNICA_TUNE
  if (tune_rows > 0) rows = tune_rows;
#endif
  if (rows == 16) return launch_shrink<T, kInOut, kN, 16>(launcher, args);
  if (rows == 64) return launch_shrink<T, kInOut, kN, 64>(launcher, args);
  return launch_shrink<T, kInOut, kN, 128>(launcher, args);
}

template <class T, bool kInOut>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args) {
  if (args.d_out <= 16) return launch_shrink<T, kInOut, 16>(launcher, args);
  if (args.d_out <= 32) return launch_shrink<T, kInOut, 32>(launcher, args);
  if (args.d_out <= 64) return launch_shrink<T, kInOut, 64>(launcher, args);
  if (args.d_out <= 128) return launch_shrink<T, kInOut, 128>(launcher, args);
  return launch_shrink<T, kInOut, 256>(launcher, args);
}

}  // namespace punica::cuda
