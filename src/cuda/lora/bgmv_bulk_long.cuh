// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink), on sm_90.
//
// A cluster of up to 8 blocks serves the rows of a group and 16 outputs. K is split over the blocks, and in steps of 32
// elements, in turn, over a block's 4 warps. The block's part of W comes in chunks of 16 steps, a row of 1 KiB each, by
// the copy engine; with h_in <= 4096 that is one chunk, all of W in flight at once. x goes from global memory to
// registers. Every warp sends its partial sums of column c straight to the block c mod ranks, which adds them in the
// order of ranks and warps and updates y: no barrier of the block or cluster comes after the products.
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kBulkRanks = 8;      // blocks of a cluster, at most
inline constexpr int kBulkStep = 32;      // elements of K
inline constexpr int kBulkWarpSteps = 4;  // of a warp in a chunk
inline constexpr int kBulkSteps = kBulkWarpSteps * kBulkWarps;
inline constexpr int kBulkRows = 16;      // outputs of a cluster
inline constexpr int kBulkStageBits = 2;  // log2 of the chunks in flight, at most
// A chunk's rows: 1024 bytes, up to 15 of alignment. Two neighbours differ by 64 bytes modulo the banks, so that the
// eight lanes of a 16-byte access, two rows of 64 bytes, meet no conflict.
inline constexpr int kBulkPitch = 2 * kBulkStep * kBulkSteps + 64;
inline constexpr int kBulkChunkBytes = kBulkRows * kBulkPitch;

struct BulkLongShared {
  uint64_t full[1 << kBulkStageBits];
  uint64_t summed;
  // Of each column of this block, of each warp of the cluster: the sums of outputs 0, 8, 1, 9, ..., 7, 15.
  alignas(16) float partial[kBulkWarps * kGroupRows][kBulkRows];
};

constexpr size_t bulk_long_shared_bytes(int stage_bits) {
  return sizeof(BulkLongShared) + (size_t{kBulkChunkBytes} << stage_bits);
}

template <Arch kArch, class T, bool kVectors>
__device__ __forceinline__ void bgmv_bulk_long(const BgmvArgs& args, const Group& group, const T* w,
                                               BulkLongShared& shared) {
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int ranks = 1 << args.rank_bits, rank = blockIdx.x & (ranks - 1);
  const int m0 = (args.first_tile + blockIdx.y) * kBulkRows;
  const int h_in = args.h_in, h_out = args.h_out;
  const int stages = 1 << args.stage_bits;
  const int k_first = rank * args.steps * kBulkStep;
  const int steps = max(min(args.steps, (h_in - k_first + kBulkStep - 1) / kBulkStep), 0);
  const int chunks = (steps + kBulkSteps - 1) / kBulkSteps;
  unsigned char* const images = reinterpret_cast<unsigned char*>(&shared + 1);

  const auto start_chunk = [&](int chunk) {
    const int stage = chunk & (stages - 1);
    const int k = k_first + chunk * kBulkSteps * kBulkStep;
    const int bytes = 2 * min(min(steps - chunk * kBulkSteps, kBulkSteps) * kBulkStep, h_in - k);
    unsigned char* const image = images + stage * kBulkChunkBytes;
    const auto run = [&](int row) {
      return Run(w + static_cast<int64_t>(m0 + row) * h_in + k, m0 + row < h_out ? bytes : 0);
    };
    if constexpr (kVectors) {
      if (warp == 0) {
        const int rows = min(h_out - m0, kBulkRows);
        if (lane == 0) barrier_expect(&shared.full[stage], rows * bytes);
        __syncwarp();
        if (lane < rows) {
          bulk_copy(image + lane * kBulkPitch, w + static_cast<int64_t>(m0 + lane) * h_in + k, bytes,
                    &shared.full[stage]);
        }
      }
    } else {
      if (warp == 0) {
        const Run mine = lane < kBulkRows ? run(lane) : Run(w, 0);
        const int total = __reduce_add_sync(0xffffffffu, mine.whole);
        if (lane == 0) barrier_expect(&shared.full[stage], total);
        __syncwarp();
        mine.copy_whole(image + lane * kBulkPitch, &shared.full[stage]);
      }
      run(tid / 8).copy_edges(image + tid / 8 * kBulkPitch, tid % 8);
    }
  };
  for (int i = 0; i < min(stages, chunks); ++i) start_chunk(i);

  // Columns rank, rank + ranks, ... are this block's to finish.
  const int own_columns = (group.count - rank + ranks - 1) >> args.rank_bits;
  const int partials = kBulkWarps << args.rank_bits;  // of a column
  if (tid == 0 && own_columns > 0) {
    barrier_expect(&shared.summed, own_columns * partials * kBulkRows * static_cast<int>(sizeof(float)));
  }
  if (args.early_reads) grid_dependency_wait<kArch>();

  const T* x = static_cast<const T*>(args.x) + group.row * args.x_stride + k_first + 8 * t;
  const int k_count = h_in - k_first - 8 * t;
  const auto load_step = [&](int step) {
    return load_x<4, kVectors>(x + step * kBulkStep, step < steps && g < group.count ? k_count - step * kBulkStep : 0);
  };
  Words<4> xs[kBulkWarpSteps];
#pragma unroll
  for (int i = 0; i < kBulkWarpSteps; ++i) {
    if constexpr (kVectors) xs[i] = load_step(i * kBulkWarps + warp);
  }

  // The outputs that this lane stores, those of the warp's column number `own` among the block's.
  const int m = m0 + lane % kBulkRows;
  const auto find_y = [&](int own) {
    const int column = own << args.rank_bits | rank;
    return static_cast<T*>(args.y) + __shfl_sync(0xffffffffu, group.row, 4 * (column % kGroupRows)) * args.y_stride + m;
  };
  const bool stores = lane < kBulkRows && m < h_out;
  T y_before = from_float<T>(0.0f);
  if (const T* y = find_y(warp); stores && warp < own_columns) y_before = *y;

  __syncthreads();                         // the barriers are there, and what this block's threads copied
  if (args.rank_bits > 0) cluster_wait();  // and the shared memory of the others
  float sum[2][4] = {};
  const unsigned char* const lane_image = images + g * kBulkPitch + 16 * t;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk & (stages - 1);
    if constexpr (!kVectors) {
      if (chunk >= stages) __syncthreads();  // the edges that this block's threads copied
    }
    barrier_wait(&shared.full[stage], chunk >> args.stage_bits & 1);
#pragma unroll
    for (int i = 0; i < kBulkWarpSteps; ++i) {
      const int in_chunk = i * kBulkWarps + warp, step = chunk * kBulkSteps + in_chunk;
      if (step < steps) {
        const unsigned char* upper = lane_image + stage * kBulkChunkBytes + in_chunk * 2 * kBulkStep;
        const unsigned char* lower = upper + 8 * kBulkPitch;
        if constexpr (!kVectors) {
          // Both rows lie alike: eight rows and k_first are multiples of 16 bytes.
          const uintptr_t shift = reinterpret_cast<uintptr_t>(w + static_cast<int64_t>(m0 + g) * h_in) & 15;
          upper += shift;
          lower += shift;
        }
        const int count = k_count - step * kBulkStep;
        const Words<4> a = read_image<4, kVectors>(upper, count);
        const Words<4> b = read_image<4, kVectors>(lower, count);
        if constexpr (!kVectors) xs[i] = load_step(step);
        step_product<T>(sum, a, b, xs[i]);
      }
      if constexpr (kVectors) {
        if (chunk + 1 < chunks) xs[i] = load_step(step + kBulkSteps);
      }
    }
    if (chunk + stages < chunks) {
      __syncthreads();
      start_chunk(chunk + stages);
    }
  }

#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = 2 * t + e;
    if (column < group.count) {
      float* to = &shared.partial[(column >> args.rank_bits) * partials + rank * kBulkWarps + warp][2 * g];
      store_to_rank(to, column & (ranks - 1), sum[0][e] + sum[1][e], sum[0][2 + e] + sum[1][2 + e], &shared.summed);
    }
  }
  // The block lives until all that is sent to it has come.
  for (int own = warp; own < own_columns; own += kBulkWarps) {
    T* const y = find_y(own);
    if (own != warp && stores) y_before = *y;
    barrier_wait(&shared.summed, 0);
    // A half of the warp adds one half of the partial sums.
    const int half = partials / 2;
    const float* from = &shared.partial[own * partials + lane / 16 * half][lane % 8 * 2 + lane / 8 % 2];
    float total = from[0];
#pragma unroll 4
    for (int i = 1; i < half; ++i) total += from[i * kBulkRows];
    total += __shfl_xor_sync(0xffffffffu, total, 16);
    if (stores) *y = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
  }
}

// Grid: (rows * ranks, tiles of 16 outputs), clusters of `ranks` blocks, a power of two, along x.
template <Arch kArch, class T>
__global__ void __launch_bounds__(kBulkThreads, 8) bgmv_bulk_long_kernel(const BgmvArgs args) {
  static_assert(kBulkThreads >= kScanRows && kBulkThreads == 8 * kBulkRows && kBulkRanks <= kGroupRows);
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    BulkLongShared& shared = *reinterpret_cast<BulkLongShared*>(bulk_shared);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 1 << kBulkStageBits; ++i) barrier_init(&shared.full[i]);
      barrier_init(&shared.summed);
      barrier_init_fence();
    }
    if (args.rank_bits > 0) cluster_arrive();
    const int64_t b = args.first_row + (blockIdx.x >> args.rank_bits);
    {
      const int rank = blockIdx.x & ((1 << args.rank_bits) - 1);
      const int k = rank * args.steps * kBulkStep + 64 * static_cast<int>(threadIdx.x);  // a line a thread
      if (64 * static_cast<int>(threadIdx.x) < args.steps * kBulkStep && k < args.h_in) {
        prefetch_line(static_cast<const T*>(args.x) + b * args.x_stride + k);
      }
      if (rank == 0 && threadIdx.x == kBulkThreads - 1) {
        prefetch_line(static_cast<const T*>(args.y) + b * args.y_stride + (args.first_tile + blockIdx.y) * kBulkRows);
      }
    }
    if (!args.early_reads) grid_dependency_wait<kArch>();
    Group group;
    if (!find_group(args, b, &group)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const T* w = reinterpret_cast<const T*>(group.weights) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
      bgmv_bulk_long<kArch, T, true>(args, group, w, shared);
    } else {
      bgmv_bulk_long<kArch, T, false>(args, group, w, shared);
    }
  }
}

}  // namespace punica::cuda::bgmv
