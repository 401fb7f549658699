// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink), on sm_90.
//
// A block takes all of K for a few outputs and a few rows that share the adapter, so that nothing leaves it but y. K is
// split over its warps, and over the eight columns of the tensor-core product: row g of the tile holds a slice of K of
// one output (row g + 8: of another), column g the same slice of x. Of the 16 x 8 products the diagonals are sums of
// these slices; the rest multiplies slices that do not belong together and is not looked at. So all lanes load
// different elements, of W and of x, although there is only one row of x: in a step a warp reads 512 neighbouring bytes
// of each.
#pragma once

#include "src/cuda/lora/bgmv_diagonal_general.cuh"

namespace punica::cuda::bgmv {

// The sum of what the slices of one warp have of an output.
__device__ __forceinline__ float add_slices(const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  return low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
}

// And that of all eight warps, by neighbouring lanes.
__device__ __forceinline__ float add_warps(float total) {
  total += __shfl_xor_sync(0xffffffffu, total, 1);
  total += __shfl_xor_sync(0xffffffffu, total, 2);
  total += __shfl_xor_sync(0xffffffffu, total, 4);
  return total;
}

// Where this thread's sum of an output of a row goes in the end.
template <class T, int kRanks, int kWarps>
struct DiagonalOutput {
  int row, part;  // part: of the warp whose slices the thread adds up
  bool stores;
  T* y;

  // `first_row`, of the batch: the row 0 of `count` ones; shared memory has the others.
  __device__ __forceinline__ DiagonalOutput(const BgmvArgs& args, const DiagonalShared& shared, int count,
                                            int64_t first_row, int m_block) {
    const int tid = threadIdx.x, rank = tid / kWarps % kRanks;
    row = tid / (kRanks * kWarps);
    part = tid % kWarps;
    const int m = m_block + (part >> args.k_warp_bits) * kRanks + rank;
    stores = row < count && m < args.h_out && (part & ((1 << args.k_warp_bits) - 1)) == 0;
    y = static_cast<T*>(args.y);
    if (stores) y += (row == 0 ? first_row : shared.group.rows[row]) * args.y_stride + m;
  }

  // After the diagonals of all warps are in shared memory.
  __device__ __forceinline__ void add(const BgmvArgs& args, const float* sums, int count, T y_before) const {
    const int tid = threadIdx.x, used = count * kRanks * kWarps;
    if (tid / 32 * 32 >= used) return;
    float total = add_slices(sums + min(tid, used - 1) * kSlices);
    if (args.k_warp_bits == 3) {
      total = add_warps(total);
    } else {
      for (int i = 0; i < args.k_warp_bits; ++i) total += __shfl_xor_sync(0xffffffffu, total, 1 << i);
    }
    if (stores) *y = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
  }
};

// copy_wait() for a number that is known when loops are unrolled.
__device__ __forceinline__ void copy_wait_first(int pending) {
  if (pending == 0) copy_wait<0>();
  if (pending == 1) copy_wait<1>();
  if (pending == 2) copy_wait<2>();
  if (pending == 3) copy_wait<3>();
  if (pending >= 4) copy_wait<4>();
}

// What a block does with `count` rows, of which `first_row` is the first, with everything aligned. What a warp does
// from the wait on is what a chain of kernels waits for, with all warps of a multiprocessor at it at once: as few
// instructions as possible. DiagonalWarp does the same in general. `find` gives the address of the adapter and calls
// its second argument when it has asked for what it needs; where it answers false nothing is done, and the wait is not
// called.
//
// kWhole: all warps share K, and all their steps are whole. kRing: not all of K may be in shared memory at a time; then
// the group is one row, and a lane copies the rest itself, step by step, to where it has read.
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing, class Find>
__device__ __forceinline__ bool diagonal_block_aligned(const BgmvArgs& args, DiagonalShared& shared, int m_block,
                                                       int count, int64_t first_row, Find find) {
  constexpr int kPairs = (kRanks + 1) / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, steps = args.steps;
  const int k_warp_bits = kWhole ? 3 : args.k_warp_bits;
  static_assert(kWarps == 8);
  const int k_lane = (warp & ((1 << k_warp_bits) - 1)) * kDiagonalStep + 8 * lane;
  const int stride = kDiagonalStep << k_warp_bits;
  const auto inside = [&](int step) { return kWhole ? step < steps : k_lane + step * stride < h_in; };
  const int m0 = m_block + (kWhole ? 0 : (warp >> k_warp_bits) * kRanks);
  constexpr int kPlace = 512 * kWarps;  // bytes from an output's piece to the next one's
  const uint32_t image = shared_address(&shared + 1) + 16 * threadIdx.x;
  DiagonalOutput<T, kRanks, kWarps> output(args, shared, count, first_row, m_block);
  const T* x = static_cast<const T*>(args.x) + first_row * args.x_stride + k_lane;
  asm volatile("" : "+l"(x), "+l"(output.y));  // known before `find` waits
  Words<4> xs[kChunk];
  T y_before = from_float<T>(0.0f);
  const auto load_rows = [&] {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) xs[i] = load_if(inside(i), x + i * stride);
    if (output.stores) y_before = *output.y;
  };
  int64_t weights;
  if (!find(&weights, [&] {
        if (!args.early_reads) load_rows();
      })) {
    return false;
  }
  const auto find_w = [&] {
    return reinterpret_cast<const T*>(weights) + args.layer_offset + static_cast<int64_t>(m0) * h_in + k_lane;
  };
  const auto start_step = [&](const T* w, int i, int step) {
    if (inside(step)) {
      w += step * stride;
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        if (m0 + q < args.h_out) {
          copy_piece(image + (i * kRanks + q) * kPlace, w);
        }
        w += h_in;
      }
    }
    copy_commit();
  };
  {
    const T* const w = find_w();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) start_step(w, i, i);
  }
  float* const sums = diagonal_sums<kRanks, kWarps>(args, shared);
  float* to = sums + (t == g / 2 ? warp * kSlices + g : 0);
  if (args.early_reads) {
    grid_dependency_wait<kArch>();
    load_rows();
  }
  __syncwarp();  // keeps the loads before the wait for the weights
#pragma unroll 1
  for (int row = 1;; ++row) {
    const bool last = row == count;
    if (!last) x = static_cast<const T*>(args.x) + shared.group.rows[row] * args.x_stride + k_lane;
    float sum[2 * kPairs] = {};
#pragma unroll 1
    for (int begin = 0; begin < (kRing ? steps : 1); begin += kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i > 0 && begin + i >= steps) break;
        if (kRing && steps > kChunk) {
          copy_wait<kChunk - 1>();
        } else if (row == 1) {
          copy_wait_first(kChunk - 1 - i);
        }
        Words<4> a[2 * kPairs];
#pragma unroll
        for (int q = 0; q < 2 * kPairs; ++q) {
          if (!kWhole || q >= kRanks) a[q] = Words<4>{};
          if (q < kRanks && (kWhole || inside(begin + i))) {
            a[q] = read_piece(image + (i * kRanks + q) * kPlace);
          }
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          add_diagonals<T>(sum[2 * p], sum[2 * p + 1], a[2 * p], a[2 * p + 1], xs[i], g);
        }
        // What has this place next.
        if (kRing && steps > kChunk) {
          const int step = begin + kChunk + i;
          start_step(find_w(), i, step);
          xs[i] = load_if(inside(step), x + step * stride);
        } else if (!last) {
          xs[i] = load_if(inside(i), x + i * stride);
        }
      }
    }
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kRanks; ++q) to[q * kWarps * kSlices] = sum[q];
    }
    to += kRanks * kWarps * kSlices;
    if (last) break;
  }
  __syncthreads();
  output.add(args, sums, count, y_before);
  return true;
}

// Of the group that is known.
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing>
__device__ __forceinline__ void diagonal_group_aligned(const BgmvArgs& args, DiagonalShared& shared, int m_block) {
  diagonal_block_aligned<kArch, T, kRanks, kWarps, kChunk, kWhole, kRing>(
      args, shared, m_block, shared.group.count, shared.group.rows[0], [&](int64_t* weights, auto meanwhile) {
        *weights = shared.group.weights;
        meanwhile();
        return true;
      });
}

// The same in general. A function of its own: what it needs takes no registers of the common way.
template <Arch kArch, class T, int kRanks, int kWarps>
__device__ __noinline__ void diagonal_block_general(const BgmvArgs& args, DiagonalShared& shared, int m_block) {
  const int warp = threadIdx.x / 32, k_warps = 1 << args.k_warp_bits;
  const int m0 = m_block + (warp >> args.k_warp_bits) * kRanks;
  const T* const w = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
  const DiagonalWarp<T, kRanks, kWarps> work{args,
                                             shared,
                                             w + static_cast<int64_t>(m0) * args.h_in,
                                             min(args.h_out - m0, kRanks),
                                             warp & (k_warps - 1),
                                             static_cast<int>(threadIdx.x % 32)};
  work.run([&] {
    if (args.early_reads) grid_dependency_wait<kArch>();
  });
  __syncthreads();
  const DiagonalOutput<T, kRanks, kWarps> output(args, shared, shared.group.count, shared.group.rows[0], m_block);
  const T y_before = output.stores ? *output.y : from_float<T>(0.0f);
  output.add(args, diagonal_sums<kRanks, kWarps>(args, shared), shared.group.count, y_before);
}

__device__ __forceinline__ bool diagonal_aligned(const BgmvArgs& args, int64_t weights) {
  return args.vectors && (weights + 2 * args.layer_offset) % 16 == 0;
}

// What the blocks do before they know their rows: brings lines of x and y into the second-level cache, a row a warp.
// The blocks of a row share the lines of its x. Grids are (blocks that share the outputs, rows): those of a row, whose
// weights lie next to each other, run at the same time.
template <class T>
__device__ __forceinline__ void diagonal_prefetch(const BgmvArgs& args, int64_t b, int rows, int outputs) {
  const int lane = threadIdx.x % 32;
  for (int row = kDiagonalWarps - 1 - static_cast<int>(threadIdx.x / 32); row < rows; row += kDiagonalWarps) {
    const T* const x = static_cast<const T*>(args.x) + (b + row) * args.x_stride;
    for (int k = 64 * (lane * gridDim.x + blockIdx.x); k < args.h_in; k += 64 * 32 * gridDim.x) prefetch_line(x + k);
    const int m = (args.first_tile + static_cast<int>(blockIdx.x)) * outputs;
    if (lane == 31 && m < args.h_out) {
      prefetch_line(static_cast<const T*>(args.y) + (b + row) * args.y_stride + m);
    }
  }
}

// The block's first output. Not from blockIdx.x: the compiler would keep what it knows from before the block found its
// rows in local memory, and every block wait for that.
__device__ __forceinline__ int diagonal_first_output(const BgmvArgs& args, int outputs) {
  int tile;
  asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(tile));
  return (args.first_tile + tile) * outputs;
}

// A group of one row is found without a search, by every warp for itself, and x does not wait for the tables.
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing>
__device__ __forceinline__ void diagonal_single(const BgmvArgs& args, DiagonalShared& shared, int64_t b) {
  const int m_block = diagonal_first_output(args, kRanks * kWarps >> args.k_warp_bits);
  bool found = false;
  int64_t weights = 0;
  RowEntries entries;
  if (args.early_reads) entries.load(args, b);
  diagonal_prefetch<T>(args, b, 1, kRanks * kWarps >> args.k_warp_bits);
  const bool done = diagonal_block_aligned<kArch, T, kRanks, kWarps, kChunk, kWhole, kRing>(
      args, shared, m_block, 1, b, [&](int64_t* address, auto meanwhile) {
        if (!args.early_reads) {
          grid_dependency_wait<kArch>();
          entries.load(args, b);
          launch_dependents<kArch>();
        }
        if (args.vectors) meanwhile();
        found = entries.find(args, &weights);
        *address = weights;
        return found && diagonal_aligned(args, weights);
      });
  if (done) return;
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }
  if (threadIdx.x == 0) {
    shared.group.weights = weights;
    shared.group.count = 1;
    shared.group.rows[0] = b;
  }
  __syncthreads();
  diagonal_block_general<kArch, T, kRanks, kWarps>(args, shared, m_block);
}

template <class T>
__device__ __forceinline__ void diagonal_prefetch(const BgmvArgs& args, const BlockRow& block, int outputs) {
  const int rows = args.one_adapter ? static_cast<int>(min(args.batch - block.b, int64_t{args.group_rows})) : 1;
  diagonal_prefetch<T>(args, block.b, rows, outputs);
}

// Grid: (blocks that share the outputs, rows). kSingle: groups of one row.
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing, bool kSingle>
__global__ void __launch_bounds__(32 * kWarps, 4) bgmv_diagonal_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    // Where the next kernel may read nothing early, its blocks would only be in the way of this one's loads.
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(bulk_shared);
    if constexpr (kSingle) {
      diagonal_single<kArch, T, kRanks, kWarps, kChunk, kWhole, kRing>(args, shared, args.first_row + blockIdx.y);
      return;
    }
    const int warp = threadIdx.x / 32;
    const BlockRow block(args, blockIdx.y);
    diagonal_prefetch<T>(args, block, kRanks * kWarps >> args.k_warp_bits);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp<1>(args, block, &shared.group);
    __syncthreads();
    if (!args.early_reads) launch_dependents<kArch>();
    const int m_block = diagonal_first_output(args, kRanks * kWarps >> args.k_warp_bits);
    if (shared.group.count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
    } else if (diagonal_aligned(args, shared.group.weights)) {
      diagonal_group_aligned<kArch, T, kRanks, kWarps, kChunk, kWhole, kRing>(args, shared, m_block);
    } else {
      diagonal_block_general<kArch, T, kRanks, kWarps>(args, shared, m_block);
    }
  }
}

}  // namespace punica::cuda::bgmv
