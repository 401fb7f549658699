// dispatch_bgmv of float16 and bfloat16 where h_in is short (expand), on sm_90.
//
// A block takes 128 to 512 neighbouring outputs and up to 8 rows that share the adapter. Its rows of W lie next to each
// other in memory: one bulk copy. A warp takes the whole of K for 32 outputs at a time, so nothing is added up between
// warps. The sums pass through shared memory, so that y, asked for before the products, is read and written 16 bytes at
// a time.
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kRoundRows = 32;                            // outputs of a warp at a time
inline constexpr int kBlockRoundRows = kRoundRows * kBulkWarps;  // of a block of kBulkWarps warps
// Lanes (g, t) store to 2t * kSumPitch + g and read 16 bytes at g * kSumPitch + 8t: no conflicts.
inline constexpr int kSumPitch = kRoundRows + 4;

// Products over K come in kSteps steps of 32 elements, 0 standing for a half one. A block takes its outputs in kRounds
// rounds; at most:
template <int kSteps>
inline constexpr int kBulkRounds = kSteps == 0   ? 4
                                   : kSteps <= 2 ? 2
                                                 : 1;

// kSingle: no block of the kernel has more than one row.
template <int kWarps, bool kSingle>
struct BulkShortShared {
  uint64_t full;
  BulkGroup group;
  alignas(16) float sums[kWarps][kSingle ? 4 * kSumPitch : kGroupRows * kSumPitch];
};

// With room for what is read beyond the last row, and not used.
inline constexpr int kImagePadding = 16 + 256 + 16;
template <bool kSingle>
constexpr size_t bulk_short_shared_bytes(int h_in, int rounds) {
  return sizeof(BulkShortShared<kBulkWarps, kSingle>) + size_t{2} * h_in * rounds * kBlockRoundRows + kImagePadding;
}

// Adds the products of two rows of W, whose pieces lie at `upper` and `lower`, to two chains. `swap`: read the steps of
// a pair in the other order; where rows lie a multiple of 128 bytes apart, every other lane's do so, and the eight
// lanes of an access, two rows of 64 bytes, meet no bank conflict.
template <class T, int kSteps, bool kVectors>
__device__ __forceinline__ void image_products(float (&sum)[2][4], const unsigned char* upper,
                                               const unsigned char* lower, int count, bool swap,
                                               const Words<4> (&xs)[kSteps]) {
  if constexpr (kVectors) {
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      const int k0 = 32 * (s + swap), k1 = 32 * (s + !swap);
      const Words<4> a0 = read_image<4, true>(upper + 2 * k0, count - k0);
      const Words<4> b0 = read_image<4, true>(lower + 2 * k0, count - k0);
      const Words<4> a1 = read_image<4, true>(upper + 2 * k1, count - k1);
      const Words<4> b1 = read_image<4, true>(lower + 2 * k1, count - k1);
      Words<4> a, b;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a.values[i] = swap ? a1.values[i] : a0.values[i];
        b.values[i] = swap ? b1.values[i] : b0.values[i];
      }
      step_product<T>(sum, a, b, xs[s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a.values[i] = swap ? a0.values[i] : a1.values[i];
        b.values[i] = swap ? b0.values[i] : b1.values[i];
      }
      step_product<T>(sum, a, b, xs[s + 1]);
    }
  } else {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const Words<4> a = read_image<4, false>(upper + 64 * s, count - 32 * s);
      const Words<4> b = read_image<4, false>(lower + 64 * s, count - 32 * s);
      step_product<T>(sum, a, b, xs[s]);
    }
  }
}

// The rows of a block: of `count` ones, those with a bit in `valid` have the adapter; the others' y stays as it is.
struct BulkRows {
  int count;
  uint64_t valid;
  __device__ __forceinline__ bool has(int column) const { return (valid >> column & 1) != 0; }
};

// Eight rows of the group at most, from `first_column` on; the first of them wait for the kernel before.
template <Arch kArch, class T, int kSteps, int kRounds, bool kVectors, int kWarps>
__device__ __forceinline__ void bgmv_bulk_short(const BgmvArgs& args, const BulkRows& all, int shift, int64_t m_first,
                                                int rows, int first_column, BulkShortShared<kWarps, false>& shared,
                                                int parity = 0) {
  constexpr int kCount = kSteps == 0 ? 2 : 4;  // words of a lane and step
  constexpr int kLoads = kSteps == 0 ? 1 : kSteps;
  // A tile of 16 outputs has two chains of products, or its two tiles do.
  constexpr int kSums = kSteps == 0 ? 1 : 2, kUnroll = kSteps == 0 ? 2 : 1;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, count = min(all.count - first_column, kGroupRows);
  const auto valid = static_cast<uint32_t>(all.valid >> first_column);
  const int64_t* const group_rows = shared.group.rows + first_column;
  const int64_t batch_row = group_rows[g < count ? g : 0];
  const unsigned char* const image = reinterpret_cast<const unsigned char*>(&shared + 1) + shift;

  const int k_lane = 2 * kCount * t;
  const T* x = static_cast<const T*>(args.x) + batch_row * args.x_stride + k_lane;
  const int x_count = g < count ? h_in - k_lane : 0;
  // In a round, lane (g, t) stores outputs 8t .. 8t + 7 of column g.
  T* y = static_cast<T*>(args.y) + batch_row * args.y_stride + m_first + 8 * t;
  asm volatile("" : "+l"(x), "+l"(y));  // known before the wait
  if (first_column == 0 && args.early_reads) grid_dependency_wait<kArch>();
  Words<kCount> xs[kLoads];
#pragma unroll
  for (int s = 0; s < kLoads; ++s) xs[s] = load_x<kCount, kVectors>(x + s * 32, x_count - s * 32);

  const int y_count = g < count && (valid >> g & 1) != 0 ? rows - 8 * t : 0;
  Words<4> before[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = (r * kWarps + warp) * kRoundRows;
    before[r] = load_if(args.wide_y && row < y_count, y + row);
  }
  barrier_wait<false>(&shared.full, parity);

  const bool swap = kSteps > 0 && h_in % 64 == 0 && g % 2 != 0;
  float* const sums = shared.sums[warp];
  const auto multiply = [&](int row) {
    __syncwarp();  // the sums of the round before have been read
#pragma unroll kUnroll
    for (int j = 0; j < 2; ++j) {
      float sum[kSums][4] = {};
      const unsigned char* upper = image + 2 * ((row + 16 * j + g) * h_in + k_lane);
      const unsigned char* lower = upper + 16 * h_in;
      if constexpr (kSteps == 0) {
        const Words<kCount> a = read_image<kCount, kVectors>(upper, h_in - k_lane);
        const Words<kCount> b = read_image<kCount, kVectors>(lower, h_in - k_lane);
        step_product<T>(sum, a, b, xs[0]);
      } else {
        image_products<T, kSteps, kVectors>(sum, upper, lower, h_in - k_lane, swap, xs);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (2 * t + e < count) {
          float* column = sums + (2 * t + e) * kSumPitch + 16 * j + g;
          column[0] = kSums == 1 ? sum[0][e] : sum[0][e] + sum[kSums - 1][e];
          column[8] = kSums == 1 ? sum[0][2 + e] : sum[0][2 + e] + sum[kSums - 1][2 + e];
        }
      }
    }
    __syncwarp();
  };
  const float* const own_sums = sums + g * kSumPitch + 8 * t;

  if (args.wide_y) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = (r * kWarps + warp) * kRoundRows;
      if (row >= rows) break;
      multiply(row);
      if (row < y_count) {
        const Words<4> after = add_sums<T>(args, before[r], own_sums);
        *reinterpret_cast<uint4*>(y + row) =
            make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
      }
    }
  } else {
#pragma unroll 1
    for (int row = warp * kRoundRows; row < rows; row += kRoundRows * kWarps) {
      // A lane an output, neighbouring lanes neighbouring ones; all columns are asked for before the first is needed.
      T* const to = static_cast<T*>(args.y) + m_first + row + lane;
      const auto stores = [&](int column) { return row + lane < rows && column < count && (valid >> column & 1) != 0; };
      T columns_before[kGroupRows];
#pragma unroll
      for (int column = 0; column < kGroupRows; ++column) {
        if (stores(column)) columns_before[column] = to[group_rows[column] * args.y_stride];
      }
      multiply(row);
#pragma unroll
      for (int column = 0; column < kGroupRows; ++column) {
        if (stores(column)) {
          to[group_rows[column] * args.y_stride] =
              from_float<T>(fmaf(args.scale, sums[column * kSumPitch + lane], to_float(columns_before[column])));
        }
      }
    }
  }
}

// As many as have their sums in shared memory at a time.
inline constexpr int kFewRows = 2;

// One or two rows. A lane ends with kRounds outputs of each: neighbouring ones if everything is aligned. What comes
// after the wait is what a chain of kernels waits for, with all warps of a multiprocessor at it at once: as few
// instructions as possible.
template <Arch kArch, class T, int kSteps, int kRounds, bool kVectors, int kWarps, bool kSingle>
__device__ __forceinline__ void bgmv_bulk_short_few(const BgmvArgs& args, const BulkRows& all, int shift,
                                                    int64_t m_first, int rows, BulkShortShared<kWarps, kSingle>& shared,
                                                    int parity = 0) {
  constexpr int kCount = kSteps == 0 ? 2 : 4;  // words of a lane and step
  constexpr int kLoads = kSteps == 0 ? 1 : kSteps;
  constexpr int kPitch = kRoundRows * kRounds + 4;
  static_assert((kSingle ? 1 : kFewRows) * kPitch <= sizeof(shared.sums[0]) / sizeof(float));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, count = kSingle ? 1 : all.count;
  const int k_lane = 2 * kCount * t;
  const T* const x = static_cast<const T*>(args.x) + shared.group.rows[g < count ? g : 0] * args.x_stride + k_lane;
  const int x_count = g < count ? h_in - k_lane : 0;
  // Output i of this lane: own + i * kStride.
  constexpr int kStride = kVectors ? 1 : 32;
  const int first = warp * kRoundRows * kRounds, own = first + lane * (kVectors ? kRounds : 1);
  T* const y = static_cast<T*>(args.y) + m_first + own;
  T* const y0 = y + shared.group.rows[0] * args.y_stride;
  T* const y1 = y + shared.group.rows[count - 1] * args.y_stride;
  const bool second = count > 1;
  const unsigned char* upper =
      reinterpret_cast<const unsigned char*>(&shared + 1) + shift + 2 * ((first + g) * h_in + k_lane);
  float* const sums = shared.sums[warp];
  const bool swap = kSteps > 0 && h_in % 64 == 0 && g % 2 != 0;
  if (args.early_reads) grid_dependency_wait<kArch>();

  Words<kCount> xs[kLoads];
#pragma unroll
  for (int s = 0; s < kLoads; ++s) xs[s] = load_x<kCount, kVectors>(x + s * 32, x_count - s * 32);
  using Outputs = Vec<T, kRounds>;
  const auto load_y = [&](const T* from) {
    Outputs r = {};
    if constexpr (kVectors) {
      if (own < rows) r = load<T, kRounds>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (own + i * kStride < rows) r.values[i] = from[i * kStride];
      }
    }
    return r;
  };
  const Outputs before0 = load_y(y0);
  Outputs before1 = {};
  if (second) before1 = load_y(y1);
  barrier_wait<false>(&shared.full, parity);
#pragma unroll
  for (int j = 0; j < 2 * kRounds; ++j) {
    float sum[4];
    const unsigned char* const lower = upper + 16 * h_in;
    if constexpr (kSteps == 0) {
      const Words<2> a = read_image<2, kVectors>(upper, h_in - k_lane);
      const Words<2> b = read_image<2, kVectors>(lower, h_in - k_lane);
      mma_from_zero<T>(sum, a.values[0], b.values[0], a.values[1], b.values[1], xs[0].values[0], xs[0].values[1]);
    } else {
      float chains[2][4] = {};
      image_products<T, kSteps, kVectors>(chains, upper, lower, h_in - k_lane, swap, xs);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = chains[0][e] + chains[1][e];
    }
    if (t == 0) {
      float* const to = sums + 16 * j + g;
      to[0] = sum[0];
      to[8] = sum[2];
      if (second) {
        to[kPitch] = sum[1];
        to[kPitch + 8] = sum[3];
      }
    }
    upper += 32 * h_in;
  }
  __syncwarp();
  const auto finish = [&](T* to, const Outputs& before, const float* from) {
    Outputs after;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      after.values[i] = from_float<T>(fmaf(args.scale, from[own - first + i * kStride], to_float(before.values[i])));
    }
    if constexpr (kVectors) {
      if (own < rows) store<T, kRounds>(to, after);
    } else {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (own + i * kStride < rows) to[i * kStride] = after.values[i];
      }
    }
  };
  if (all.has(0)) finish(y0, before0, sums);
  if (second && all.has(1)) finish(y1, before1, sums + kPitch);
}

// A function of its own: what it needs takes no registers of the common way.
template <Arch kArch, class T, int kSteps, int kRounds, int kWarps, bool kSingle>
__device__ __noinline__ void bgmv_bulk_short_unaligned(const BgmvArgs& args, BulkRows all, int shift, int64_t m_first,
                                                       int rows, BulkShortShared<kWarps, kSingle>& shared,
                                                       int parity = 0) {
  if (kSingle || all.count <= kFewRows) {
    bgmv_bulk_short_few<kArch, T, kSteps, kRounds, false>(args, all, shift, m_first, rows, shared, parity);
    return;
  }
  if constexpr (!kSingle) {
#pragma unroll 1
    for (int column = 0; column < all.count; column += kGroupRows) {
      bgmv_bulk_short<kArch, T, kSteps, kRounds, false>(args, all, shift, m_first, rows, column, shared, parity);
    }
  }
}

// Asks for the weights of a block; by the whole of one warp.
template <class T, class Shared>
__device__ __forceinline__ void bulk_start(const BgmvArgs& args, int64_t weights, int64_t m_first, int rows,
                                           Shared& shared) {
  const int lane = threadIdx.x % 32;
  const T* const w = reinterpret_cast<const T*>(weights) + args.layer_offset;
  unsigned char* const image = reinterpret_cast<unsigned char*>(&shared + 1);
  const Run run(w + m_first * args.h_in, 2 * rows * args.h_in);
  if (lane == 0) {
    barrier_expect(&shared.full, run.whole);
    run.copy_whole(image, &shared.full);
  }
  if (run.head + run.tail > 0) {
    if (lane < 8) run.copy_edges(image, lane);
  }
}

// The same by all warps of the block, those that do not copy too.
template <class T, class Shared>
__device__ __forceinline__ void bulk_start_block(const BgmvArgs& args, int64_t weights, int64_t m_first, int rows,
                                                 Shared& shared) {
  if (threadIdx.x < 32) bulk_start<T>(args, weights, m_first, rows, shared);
  const bool edges = ((weights + 2 * (args.layer_offset + m_first * args.h_in)) & 15) != 0 || rows * args.h_in % 8 != 0;
  if (edges) __syncthreads();  // those that the first warp copied itself
}

// What a block does with its outputs once its rows are known and the weights have been asked for.
template <Arch kArch, class T, int kSteps, int kRounds, int kWarps, bool kSingle>
__device__ __forceinline__ void bulk_short_tile(const BgmvArgs& args, const BulkRows& all, int64_t weights,
                                                int64_t m_first, int rows, BulkShortShared<kWarps, kSingle>& shared,
                                                int parity) {
  const uintptr_t w = weights + 2 * args.layer_offset;
  const int shift = static_cast<int>((w + 2 * m_first * args.h_in) & 15);
  const bool vectors = args.vectors && w % (kSteps == 0 ? 8 : 16) == 0;
  const int count = all.count;
  if (vectors && (kSingle || count <= kFewRows) && (args.wide_y || kRounds == 1)) {
    bgmv_bulk_short_few<kArch, T, kSteps, kRounds, true>(args, all, shift, m_first, rows, shared, parity);
    return;
  }
  if constexpr (!kSingle) {
    if (vectors && count > kFewRows) {
#pragma unroll 1
      for (int column = 0; column < count; column += kGroupRows) {
        bgmv_bulk_short<kArch, T, kSteps, kRounds, true>(args, all, shift, m_first, rows, column, shared, parity);
      }
      return;
    }
  }
  bgmv_bulk_short_unaligned<kArch, T, kSteps, kRounds>(args, all, shift, m_first, rows, shared, parity);
}

// What the blocks do before they know their rows: brings lines of y and x into the second-level cache, all threads
// together: a barrier follows. Eight threads a row.
template <class T>
__device__ __forceinline__ void bulk_short_prefetch(const BgmvArgs& args, const BlockRow& block, int64_t m_first,
                                                    int rows) {
  const int guesses = args.one_adapter ? static_cast<int>(min(args.batch - block.b, int64_t{args.group_rows})) : 1;
  const int at = 64 * (static_cast<int>(threadIdx.x) % 8);
  for (int i = static_cast<int>(threadIdx.x) / 8; i < guesses; i += static_cast<int>(blockDim.x) / 8) {
    const int64_t row = block.b + i;
    for (int m = at; m < rows; m += 8 * 64) {
      prefetch_line(static_cast<const T*>(args.y) + row * args.y_stride + m_first + m);
    }
    if (at < args.h_in) prefetch_line(static_cast<const T*>(args.x) + row * args.x_stride + at);
  }
}

// A group of one row is found without a search, by every warp for itself.
template <Arch kArch, class T, int kSteps, int kRounds>
__device__ __forceinline__ void bulk_single(const BgmvArgs& args, int64_t b, int64_t m_first, int rows,
                                            BulkShortShared<kBulkWarps, true>& shared) {
  RowEntries entries;
  int64_t weights;
  if (args.early_reads) entries.load(args, b);
  if (threadIdx.x == 0) shared.group.rows[0] = b;
  __syncthreads();  // the barrier stands
  if (!args.early_reads) {
    grid_dependency_wait<kArch>();
    entries.load(args, b);
    launch_dependents<kArch>();
  }
  if (!entries.find(args, &weights)) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }
  bulk_start_block<T>(args, weights, m_first, rows, shared);
  bulk_short_tile<kArch, T, kSteps, kRounds>(args, {1, 1}, weights, m_first, rows, shared, 0);
}

// Grid: (rows, blocks that share the outputs). kSingle: groups of one row.
template <Arch kArch, class T, int kSteps, int kRounds, bool kSingle>
__global__ void __launch_bounds__(kBulkThreads, kSteps == 0   ? 8
                                                : kSteps == 2 ? 7
                                                              : 5)
    bgmv_bulk_short_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    // Where the next kernel may read nothing early, its blocks would only be in the way of this one's loads.
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    auto& shared = *reinterpret_cast<BulkShortShared<kBulkWarps, kSingle>*>(bulk_shared);
    const int warp = threadIdx.x / 32;
    const BlockRow block(args, blockIdx.x);
    constexpr int block_rows = kRounds * kBlockRoundRows;
    const int64_t m_first = (args.first_tile + static_cast<int64_t>(blockIdx.y)) * block_rows;
    const int rows = static_cast<int>(min(args.h_out - m_first, static_cast<int64_t>(block_rows)));
    bulk_short_prefetch<T>(args, block, m_first, rows);
    // By another warp, for the fence takes as long as a load.
    if (threadIdx.x == 32) {
      barrier_init(&shared.full, 1);
      barrier_init_fence();
    }
    if constexpr (kSingle) {
      bulk_single<kArch, T, kSteps, kRounds>(args, block.b, m_first, rows, shared);
    }
    if constexpr (!kSingle) {
      BulkRows all;
      int64_t weights;
      if (args.one_adapter || args.group_rows == 1) {
        // No search: neighbouring rows, whatever they are, and every warp finds the adapter for itself.
        all.count = static_cast<int>(min(args.batch - block.b, int64_t{args.group_rows}));
        if (static_cast<int>(threadIdx.x) < all.count) shared.group.rows[threadIdx.x] = block.b + threadIdx.x;
        __syncthreads();
        if (!args.early_reads) grid_dependency_wait<kArch>();
        all.valid = find_rows(args, block.b, all.count, &weights, [&] {
          if (!args.early_reads) launch_dependents<kArch>();
        });
        if (all.valid == 0) {
          if (args.early_reads) grid_dependency_wait<kArch>();
          return;
        }
        bulk_start_block<T>(args, weights, m_first, rows, shared);
      } else {
        __syncthreads();  // the barrier stands
        if (!args.early_reads) grid_dependency_wait<kArch>();
        if (warp == 0) {
          find_group_by_warp<1>(args, block, &shared.group,
                                [&](int64_t found) { bulk_start<T>(args, found, m_first, rows, shared); });
        }
        __syncthreads();
        all.count = shared.group.count;
        if (all.count == 0) {
          if (args.early_reads) grid_dependency_wait<kArch>();
          return;
        }
        if (!args.early_reads) launch_dependents<kArch>();
        all.valid = ~uint64_t{0};
        weights = shared.group.weights;
      }
      bulk_short_tile<kArch, T, kSteps, kRounds>(args, all, weights, m_first, rows, shared, 0);
    }
  }
}

}  // namespace punica::cuda::bgmv
