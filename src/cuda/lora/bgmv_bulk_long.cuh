// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink), on sm_90.
//
// A cluster of up to 8 blocks serves the rows of a group and 16 outputs. K is split over the blocks, and in chunks of
// 16 steps of 32 elements over a block's 4 warps; with h_in <= 4096 that is one chunk, all of W in flight at once. What
// a lane will multiply it copies itself, into a place of its own in shared memory: no barrier, no address to compute.
// x goes from global memory to registers. Every warp sends its partial sums of column c straight to the block c mod
// ranks, which adds them in the order of ranks and warps and updates y: no barrier of the cluster comes after the
// products. (Rows of W by the copy engine, 16 copies of 1 KiB a block, took as long in large batches and longer in
// small ones: one warp needs about 85 cycles to issue each.)
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kBulkRanks = 8;      // blocks of a cluster, at most
inline constexpr int kBulkStep = 32;      // elements of K
inline constexpr int kBulkWarpSteps = 4;  // of a warp in a chunk
inline constexpr int kBulkSteps = kBulkWarpSteps * kBulkWarps;
inline constexpr int kBulkRows = 16;   // outputs of a cluster
inline constexpr int kBulkStages = 2;  // chunks in flight, at most
// Unaligned W lies in shared memory by rows: 1024 bytes, up to 15 of alignment. Two neighbours differ by 64 bytes
// modulo the banks.
inline constexpr int kBulkPitch = 2 * kBulkStep * kBulkSteps + 64;
inline constexpr int kBulkChunkBytes = kBulkRows * kBulkPitch;

struct BulkLongShared {
  uint64_t full[kBulkStages];
  uint64_t summed;
  BulkGroup group;
  // Of each column of this block, of each warp of the cluster: the sums of outputs 0, 8, 1, 9, ..., 7, 15.
  alignas(16) float partial[kBulkWarps * kGroupRows][kBulkRows];
};

constexpr size_t bulk_long_shared_bytes(int64_t chunks) {
  return sizeof(BulkLongShared) + size_t{kBulkChunkBytes} * (chunks > 1 ? kBulkStages : 1);
}

// The sums of this warp over its part of K.
template <class T, bool kVectors, class Wait>
__device__ __forceinline__ void bulk_long_sums(const BgmvArgs& args, const T* w, int rank, BulkLongShared& shared,
                                               float (&sum)[2][4], Wait wait) {
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int m0 = (args.first_tile + blockIdx.y) * kBulkRows;
  const int h_in = args.h_in;
  const int k_first = rank * args.steps * kBulkStep;
  const int steps = max(min(args.steps, (h_in - k_first + kBulkStep - 1) / kBulkStep), 0);
  const int chunks = (steps + kBulkSteps - 1) / kBulkSteps;
  const int count = shared.group.count;
  unsigned char* const images = reinterpret_cast<unsigned char*>(&shared + 1);
  const T* x = nullptr;
  // K of this lane in step i of a chunk, from k_first on, and whether it is in reach.
  const int k_lane = warp * kBulkWarpSteps * kBulkStep + 8 * t;
  const int k_count = min(h_in - k_first, steps * kBulkStep) - k_lane;
  constexpr int kChunk = kBulkSteps * kBulkStep;

  if constexpr (kVectors) {
    // Rows beyond the last one are that one: nothing of them is used.
    const T* const upper = w + static_cast<int64_t>(min(m0 + g, args.h_out - 1)) * h_in + k_first + k_lane;
    const T* const lower = w + static_cast<int64_t>(min(m0 + g + 8, args.h_out - 1)) * h_in + k_first + k_lane;
    Words<4>* const places = reinterpret_cast<Words<4>*>(images) + tid;
    const auto place = [&](int chunk, int i, int half) {
      return places + ((chunk % kBulkStages * kBulkWarpSteps + i) * 2 + half) * kBulkThreads;
    };
    const auto start_chunk = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kBulkWarpSteps; ++i) {
        const int k = chunk * kChunk + i * kBulkStep;
        start_copy<4>(place(chunk, i, 0), upper + k, k < k_count);
        start_copy<4>(place(chunk, i, 1), lower + k, k < k_count);
      }
    };
    start_chunk(0);
    copy_commit();
    if (chunks > 1) start_chunk(1);
    copy_commit();
    wait();
    x = static_cast<const T*>(args.x) + shared.group.rows[g < count ? g : 0] * args.x_stride + k_first + k_lane;
    const int x_count = g < count ? k_count : 0;
    const auto load_step = [&](int k) { return load_x<4, true>(x + k, x_count - k); };
    Words<4> xs[kBulkWarpSteps];
#pragma unroll
    for (int i = 0; i < kBulkWarpSteps; ++i) xs[i] = load_step(i * kBulkStep);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kBulkStages - 1>();
#pragma unroll
      for (int i = 0; i < kBulkWarpSteps; ++i) {
        const Words<4> a = read_copy(place(chunk, i, 0)), b = read_copy(place(chunk, i, 1));
        step_product<T>(sum, a, b, xs[i]);
        xs[i] = load_step((chunk + 1) * kChunk + i * kBulkStep);
      }
      if (chunk + kBulkStages < chunks) start_chunk(chunk + kBulkStages);
      copy_commit();
    }
  } else {
    const auto start_chunk = [&](int chunk) {
      const int stage = chunk % kBulkStages;
      const int bytes = 2 * min(min(steps * kBulkStep - chunk * kChunk, kChunk), h_in - k_first - chunk * kChunk);
      unsigned char* const image = images + stage * kBulkChunkBytes;
      const auto run = [&](int row) {
        return Run(w + static_cast<int64_t>(m0 + row) * h_in + k_first + chunk * kChunk,
                   m0 + row < args.h_out ? bytes : 0);
      };
      constexpr int kWarpRows = kBulkRows / kBulkWarps;
      const int row = warp * kWarpRows + lane % kWarpRows;
      const Run mine = run(row);
      const int total = __reduce_add_sync(0xffffffffu, lane < kWarpRows ? mine.whole : 0);
      if (lane == 0) barrier_expect(&shared.full[stage], total);
      __syncwarp();
      if (lane < kWarpRows) mine.copy_whole(image + row * kBulkPitch, &shared.full[stage]);
      run(tid / 8).copy_edges(image + tid / 8 * kBulkPitch, tid % 8);
    };
    for (int i = 0; i < min(kBulkStages, chunks); ++i) start_chunk(i);
    wait();
    x = static_cast<const T*>(args.x) + shared.group.rows[g < count ? g : 0] * args.x_stride + k_first + k_lane;
    const int x_count = g < count ? k_count : 0;
    // Both rows of a lane lie alike: eight rows and k_first are multiples of 16 bytes.
    const uintptr_t shift = reinterpret_cast<uintptr_t>(w + static_cast<int64_t>(m0 + g) * h_in) & 15;
    const unsigned char* const lane_image = images + shift + g * kBulkPitch + 2 * k_lane;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % kBulkStages;
      __syncthreads();  // the edges that this block's threads copied
      barrier_wait<false>(&shared.full[stage], chunk / kBulkStages & 1);
#pragma unroll 1
      for (int i = 0; i < kBulkWarpSteps; ++i) {
        const int k = chunk * kChunk + i * kBulkStep;
        const unsigned char* const from = lane_image + stage * kBulkChunkBytes + 2 * i * kBulkStep;
        const Words<4> a = read_image<4, false>(from, k_count - k);
        const Words<4> b = read_image<4, false>(from + 8 * kBulkPitch, k_count - k);
        step_product<T>(sum, a, b, load_x<4, false>(x + k, x_count - k));
      }
      if (chunk + kBulkStages < chunks) {
        __syncthreads();
        start_chunk(chunk + kBulkStages);
      }
    }
  }
}

// Grid: (rows * ranks, tiles of 16 outputs), clusters of `ranks` blocks, a power of two, along x.
template <Arch kArch, class T>
__global__ void __launch_bounds__(kBulkThreads, 6) bgmv_bulk_long_kernel(const BgmvArgs args) {
  static_assert(kBulkThreads == 8 * kBulkRows && kBulkRanks <= kGroupRows);
  if constexpr (kCompiled<kArch>) {
    // Where the next kernel may read nothing early, its blocks would only be in the way of this one's loads.
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    BulkLongShared& shared = *reinterpret_cast<BulkLongShared*>(bulk_shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int ranks = 1 << args.rank_bits, rank = blockIdx.x & (ranks - 1);
    const int m0 = (args.first_tile + blockIdx.y) * kBulkRows;
    const int64_t b = args.first_row + (blockIdx.x >> args.rank_bits);
    if (tid == 32) {
      for (int i = 0; i < kBulkStages; ++i) barrier_init(&shared.full[i], kBulkWarps);
      barrier_init(&shared.summed, 1);
      barrier_init_fence();
    }
    __syncwarp();
    if (args.rank_bits > 0) cluster_arrive();
    if (warp == kBulkWarps - 1) {
      const int k_end = min((rank + 1) * args.steps * kBulkStep, args.h_in);
      for (int k = rank * args.steps * kBulkStep + 64 * lane; k < k_end; k += 64 * 32) {
        prefetch_line(static_cast<const T*>(args.x) + b * args.x_stride + k);
      }
      if (rank == 0 && lane == 31) prefetch_line(static_cast<const T*>(args.y) + b * args.y_stride + m0);
    }
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp(args, b, &shared.group, [] {});
    __syncthreads();
    if (!args.early_reads) launch_dependents<kArch>();
    const int count = shared.group.count;
    if (count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }

    // Columns rank, rank + ranks, ... are this block's to finish.
    const int own_columns = (count - rank + ranks - 1) >> args.rank_bits;
    const int partials = kBulkWarps << args.rank_bits;  // of a column
    if (tid == 0 && own_columns > 0 && ranks > 1) {
      barrier_expect(&shared.summed, own_columns * partials * kBulkRows * static_cast<int>(sizeof(float)));
    }
    // What this lane stores: an output of the warp's columns among the block's.
    const int m = m0 + lane % kBulkRows;
    const bool stores = lane < kBulkRows && m < args.h_out;
    const auto find_y = [&](int own) {
      return static_cast<T*>(args.y) + shared.group.rows[own << args.rank_bits | rank] * args.y_stride + m;
    };
    T y_before = from_float<T>(0.0f);
    const auto wait = [&] {
      if (args.early_reads) grid_dependency_wait<kArch>();
      if (stores && warp < own_columns) y_before = *find_y(warp);
    };
    float sum[2][4] = {};
    const T* const w = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
      bulk_long_sums<T, true>(args, w, rank, shared, sum, wait);
    } else {
      bulk_long_sums<T, false>(args, w, rank, shared, sum, wait);
    }

    if (ranks > 1) cluster_wait();  // the others' barriers are there
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 2 * t + e;
      if (column < count) {
        float* to = &shared.partial[(column >> args.rank_bits) * partials + rank * kBulkWarps + warp][2 * g];
        const float upper = sum[0][e] + sum[1][e], lower = sum[0][2 + e] + sum[1][2 + e];
        if (ranks > 1) {
          store_to_rank(to, column & (ranks - 1), upper, lower, &shared.summed);
        } else {
          *reinterpret_cast<float2*>(to) = make_float2(upper, lower);
        }
      }
    }
    if (ranks == 1) __syncthreads();
    // The block lives until all that is sent to it has come.
    for (int own = warp; own < own_columns; own += kBulkWarps) {
      T* const y = find_y(own);
      if (own != warp && stores) y_before = *y;
      if (ranks > 1) barrier_wait<true>(&shared.summed, 0);
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
}

}  // namespace punica::cuda::bgmv
