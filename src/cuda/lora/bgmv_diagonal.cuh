// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink), on sm_90.
//
// A block takes all of K for a few outputs and a few rows that share the adapter, so that nothing leaves it but y. K is
// split over its warps, and over the eight columns of the tensor-core product: row g of the tile holds a slice of K of
// one output (row g + 8: of another), column g the same slice of x. Of the 16 x 8 products the diagonals are sums of
// these slices; the rest multiplies slices that do not belong together and is not looked at. So all lanes load
// different elements, of W and of x, although there is only one row of x: in a step a warp reads 512 neighbouring bytes
// of each.
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kDiagonalWarps = 8;
inline constexpr int kSlices = 8;          // of K in a step, one a column
inline constexpr int kDiagonalStep = 256;  // elements of K of a warp and step: 8 a lane, in the order of lanes

struct alignas(128) DiagonalShared {
  BulkGroup group;
};

// A block's shared memory: DiagonalShared; the weights, 512 bytes of an output, step and warp; what unaligned weights
// need besides, 16 bytes each; the sums of all slices.
constexpr size_t diagonal_shared_bytes(int group_rows, int ranks, int warps, int resident) {
  return sizeof(DiagonalShared) + size_t{512 + 16} * resident * ranks * warps +
         sizeof(float) * kSlices * group_rows * ranks * warps;
}

template <int kRanks, int kWarps>
__device__ __forceinline__ float* diagonal_sums(const BgmvArgs& args, DiagonalShared& shared) {
  return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&shared + 1) +
                                  args.resident * kRanks * kWarps * (512 + 16));
}

// The 16 aligned bytes at `window`, of which those in [begin, end) are read.
__device__ __forceinline__ Words<4> load_window(uintptr_t window, uintptr_t begin, uintptr_t end) {
  const bool whole = window >= begin && window + 16 <= end;
  Words<4> r = load_if(whole, reinterpret_cast<const void*>(window));
  if (!whole && window + 16 > begin && window < end) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uintptr_t at = window + 2 * i;
      if (at >= begin && at < end) {
        r.values[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << (16 * (i % 2));
      }
    }
  }
  return r;
}

// The 16 bytes that begin `shift` bytes after those of `low`, zeros from element `count` on. `shift` is the same in all
// lanes.
__device__ __forceinline__ Words<4> shift_windows(const Words<4>& low, const Words<4>& high, int shift, int count) {
  Words<4> r;
  const uint32_t odd = (shift & 2) * 8;
  const auto shifted = [&](int word) {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = low.values[i];
      v[i + 4] = high.values[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) r.values[i] = __funnelshift_r(v[word + i], v[min(word + i + 1, 7)], odd);
  };
  switch (shift >> 2) {
    case 0:
      shifted(0);
      break;
    case 1:
      shifted(1);
      break;
    case 2:
      shifted(2);
      break;
    default:
      shifted(3);
  }
  if (count < 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * i >= count) r.values[i] = 0;
      if (2 * i + 1 == count) r.values[i] &= 0xffffu;
    }
  }
  return r;
}

// What a warp does in general: all rows of the group, kRanks outputs from m0 on, its steps of K.
//
// Unaligned weights come as the aligned pieces of 16 bytes that hold them, one a lane and one more for the warp; what a
// lane needs it puts together from its own and its neighbour's.
template <class T, int kRanks, int kWarps>
struct DiagonalWarp {
  static constexpr int kPairs = (kRanks + 1) / 2;
  const BgmvArgs& args;
  DiagonalShared& shared;
  const T* w;   // of output m0
  int outputs;  // from m0 on, at most kRanks
  int first;    // step of K, of k_warps ones
  int lane;

  __device__ __forceinline__ Words<4>* place(int step, int rank) const {
    Words<4>* const images = reinterpret_cast<Words<4>*>(&shared + 1);
    return images + ((step * kRanks + rank) * kWarps + static_cast<int>(threadIdx.x / 32)) * 32;
  }
  // Behind a step's 512 bytes.
  __device__ __forceinline__ Words<4>* extra(int step, int rank) const {
    Words<4>* const images = reinterpret_cast<Words<4>*>(&shared + 1) + args.resident * kRanks * kWarps * 32;
    return images + (step * kRanks + rank) * kWarps + static_cast<int>(threadIdx.x / 32);
  }
  // Element of K of this lane.
  __device__ __forceinline__ int k_of(int step) const {
    return ((step << args.k_warp_bits) + first) * kDiagonalStep + 8 * lane;
  }

  __device__ __forceinline__ void start_weights(int from, int steps) const {
    const int h_in = args.h_in;
    const T* const layer = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
    const auto begin = reinterpret_cast<uintptr_t>(layer);
    const auto end = reinterpret_cast<uintptr_t>(layer + static_cast<int64_t>(args.h_out) * h_in);
    const auto copy = [&](Words<4>* to, uintptr_t window) {
      if (window >= begin && window + 16 <= end) {
        start_copy<4>(to, reinterpret_cast<const void*>(window), true);
      } else {
        *to = load_window(window, begin, end);
      }
    };
    const bool at_begin = w == layer;
    const int inner = !at_begin && reinterpret_cast<uintptr_t>(w + int64_t{kRanks + 1} * h_in) <= end ? kRanks : 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int k = k_of(from + step);
      for (int q = 0; q < outputs; ++q) {
        const uintptr_t window = reinterpret_cast<uintptr_t>(w + static_cast<int64_t>(q) * h_in + k) & ~uintptr_t{15};
        if (q < inner) {
          // The rows before and after are weights too.
          if (k - 8 < h_in) start_copy<4>(place(step, q) + lane, reinterpret_cast<const void*>(window), true);
          if (lane == 31 && k < h_in) start_copy<4>(extra(step, q), reinterpret_cast<const void*>(window + 16), true);
        } else {
          if (k - 8 < h_in) copy(place(step, q) + lane, window);
          if (lane == 31 && k < h_in) copy(extra(step, q), window + 16);
        }
      }
    }
    copy_commit();
  }

  __device__ __forceinline__ Words<4> weights(int step, int rank, int k) const {
    const Words<4> low = *(place(step, rank) + lane);
    const Words<4> high = lane < 31 ? *(place(step, rank) + lane + 1) : *extra(step, rank);
    const int shift = reinterpret_cast<uintptr_t>(w + static_cast<int64_t>(rank) * args.h_in) & 15;
    return shift_windows(low, high, shift, args.h_in - k);
  }

  __device__ __forceinline__ Words<4> load(const T* x, int k) const {
    const auto begin = reinterpret_cast<uintptr_t>(x), end = reinterpret_cast<uintptr_t>(x + args.h_in);
    const uintptr_t window = reinterpret_cast<uintptr_t>(x + k) & ~uintptr_t{15};
    const Words<4> low = load_window(window, begin, end);
    Words<4> high = {};
    if (lane == 31) high = load_window(window + 16, begin, end);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t next = __shfl_down_sync(0xffffffffu, low.values[i], 1);
      if (lane < 31) high.values[i] = next;
    }
    return shift_windows(low, high, static_cast<int>(begin & 15), args.h_in - k);
  }

  __device__ __forceinline__ const T* x_row(int row) const {
    return static_cast<const T*>(args.x) + shared.group.rows[row] * args.x_stride;
  }

  __device__ __forceinline__ void multiply(float (&sum)[2 * kPairs], const Words<4>& x, int place_step, int k) const {
    Words<4> a[2 * kPairs];
#pragma unroll
    for (int q = 0; q < 2 * kPairs; ++q) {
      a[q] = Words<4>{};
      if (q < kRanks) a[q] = weights(place_step, q, k);
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      // On the diagonal: column g of rows g and g + 8.
      float product[4];
      step_product_from_zero<T>(product, a[2 * p], a[2 * p + 1], x);
      sum[2 * p] += lane / 4 % 2 == 0 ? product[0] : product[1];
      sum[2 * p + 1] += lane / 4 % 2 == 0 ? product[2] : product[3];
    }
  }

  // Adds nothing up yet: the diagonals of this warp go to shared memory.
  __device__ __forceinline__ void store(float (&sum)[2 * kPairs], int row) const {
    const int g = lane / 4, t = lane % 4;
    float* const to = diagonal_sums<kRanks, kWarps>(args, shared) +
                      (row * kRanks * kWarps + static_cast<int>(threadIdx.x / 32)) * kSlices + g;
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kRanks; ++q) to[q * kWarps * kSlices] = sum[q];
    }
#pragma unroll
    for (int q = 0; q < 2 * kPairs; ++q) sum[q] = 0;
  }

  template <class Wait>
  __device__ __forceinline__ void run(Wait wait) const {
    const int steps = args.steps, resident = args.resident, count = shared.group.count;
    start_weights(0, min(steps, resident));
    wait();
    float sum[2 * kPairs] = {};
    Words<4> x = load(x_row(0), k_of(0));
    copy_wait<0>();
    __syncwarp();
    // The weights come in parts if they are more than there is room for; the group is one row then.
#pragma unroll 1
    for (int from = 0;;) {
      const int part = min(steps - from, resident);
#pragma unroll 1
      for (int row = 0; row < count; ++row) {
#pragma unroll 1
        for (int step = 0; step < part; ++step) {
          const bool more = from + step + 1 < steps;
          const Words<4> next = load(x_row(more ? row : min(row + 1, count - 1)), k_of(more ? from + step + 1 : 0));
          multiply(sum, x, step, k_of(from + step));
          x = next;
        }
        if (from + part == steps) store(sum, row);
      }
      from += part;
      if (from == steps) break;
      __syncwarp();
      start_weights(from, min(steps - from, resident));
      copy_wait<0>();
      __syncwarp();
    }
  }
};

// Where this thread's sum of an output of a row goes in the end.
template <class T, int kRanks, int kWarps>
struct DiagonalOutput {
  int row, part;  // part: of the warp whose slices the thread adds up
  bool stores;
  T* y;

  __device__ __forceinline__ DiagonalOutput(const BgmvArgs& args, const DiagonalShared& shared, int m_block) {
    const int tid = threadIdx.x, rank = tid / kWarps % kRanks;
    row = tid / (kRanks * kWarps);
    part = tid % kWarps;
    const int m = m_block + (part >> args.k_warp_bits) * kRanks + rank;
    stores = row < shared.group.count && m < args.h_out && (part & ((1 << args.k_warp_bits) - 1)) == 0;
    y = static_cast<T*>(args.y);
    if (stores) y += shared.group.rows[row] * args.y_stride + m;
  }

  // After the diagonals of all warps are in shared memory.
  __device__ __forceinline__ void add(const BgmvArgs& args, const float* sums, int count, T y_before) const {
    const int tid = threadIdx.x, used = count * kRanks * kWarps;
    if (tid / 32 * 32 >= used) return;
    const float* const from = sums + min(tid, used - 1) * kSlices;
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    float total = low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
    if (args.k_warp_bits == 3) {
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      total += __shfl_xor_sync(0xffffffffu, total, 4);
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

// What a block does once its group is known and its first weights are on the way, with everything aligned. What a warp
// does from the wait on is what a chain of kernels waits for, with all warps of a multiprocessor at it at once: as few
// instructions as possible. DiagonalWarp does the same in general.
//
// kWhole: all warps share K, and all their steps are whole. kRing: not all of K may be in shared memory at a time; then
// the group is one row, and a lane copies the rest itself, step by step, to where it has read.
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing>
__device__ __forceinline__ void diagonal_block_aligned(const BgmvArgs& args, DiagonalShared& shared, int m_block) {
  constexpr int kPairs = (kRanks + 1) / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, steps = args.steps, count = shared.group.count;
  const int k_warp_bits = kWhole ? 3 : args.k_warp_bits;
  static_assert(kWarps == 8);
  const int k_lane = (warp & ((1 << k_warp_bits) - 1)) * kDiagonalStep + 8 * lane;
  const int stride = kDiagonalStep << k_warp_bits;
  const auto inside = [&](int step) { return kWhole ? step < steps : k_lane + step * stride < h_in; };
  const int m0 = m_block + (kWhole ? 0 : (warp >> k_warp_bits) * kRanks);
  constexpr int kPlace = 512 * kWarps;  // bytes from an output's piece to the next one's
  const uint32_t image = shared_address(&shared + 1) + 16 * threadIdx.x;
  const auto find_w = [&] {
    return reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset + static_cast<int64_t>(m0) * h_in +
           k_lane;
  };
  const auto start_step = [&](const T* w, int i, int step) {
    if (inside(step)) {
      w += step * stride;
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        if (m0 + q < args.h_out) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(image + (i * kRanks + q) * kPlace), "l"(w)
                       : "memory");
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
  const DiagonalOutput<T, kRanks, kWarps> output(args, shared, m_block);
  const T* x = static_cast<const T*>(args.x) + shared.group.rows[0] * args.x_stride + k_lane;
  float* const sums = diagonal_sums<kRanks, kWarps>(args, shared);
  float* to = sums + (t == g / 2 ? warp * kSlices + g : 0);
  if (args.early_reads) grid_dependency_wait<kArch>();

  Words<4> xs[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) xs[i] = load_if(inside(i), x + i * stride);
  T y_before = from_float<T>(0.0f);
  if (output.stores) y_before = *output.y;
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
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[q].values[0]), "=r"(a[q].values[1]), "=r"(a[q].values[2]), "=r"(a[q].values[3])
                         : "r"(image + (i * kRanks + q) * kPlace)
                         : "memory");
          }
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          float product[4];
          step_product_from_zero<T>(product, a[2 * p], a[2 * p + 1], xs[i]);
          sum[2 * p] += g % 2 != 0 ? product[1] : product[0];
          sum[2 * p + 1] += g % 2 != 0 ? product[3] : product[2];
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
  const DiagonalOutput<T, kRanks, kWarps> output(args, shared, m_block);
  const T y_before = output.stores ? *output.y : from_float<T>(0.0f);
  output.add(args, diagonal_sums<kRanks, kWarps>(args, shared), shared.group.count, y_before);
}

__device__ __forceinline__ bool diagonal_aligned(const BgmvArgs& args, const DiagonalShared& shared) {
  return args.vectors && (shared.group.weights + 2 * args.layer_offset) % 16 == 0;
}

// What the blocks do before they know their rows: brings lines of x and y into the second-level cache, by one warp. The
// blocks of a row share the lines of its x. Grids are (blocks that share the outputs, rows): those of a row, whose
// weights lie next to each other, run at the same time.
template <class T>
__device__ __forceinline__ void diagonal_prefetch(const BgmvArgs& args, const BlockRow& block, int outputs) {
  const int lane = threadIdx.x % 32;
  const int rows = args.one_adapter ? static_cast<int>(min(args.batch - block.b, int64_t{args.group_rows})) : 1;
  for (int row = 0; row < rows; ++row) {
    const T* const x = static_cast<const T*>(args.x) + (block.b + row) * args.x_stride;
    for (int k = 64 * (lane * gridDim.x + blockIdx.x); k < args.h_in; k += 64 * 32 * gridDim.x) prefetch_line(x + k);
    const int m = (args.first_tile + static_cast<int>(blockIdx.x)) * outputs;
    if (lane == 31 && m < args.h_out) {
      prefetch_line(static_cast<const T*>(args.y) + (block.b + row) * args.y_stride + m);
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

// Grid: (blocks that share the outputs, rows).
template <Arch kArch, class T, int kRanks, int kWarps, int kChunk, bool kWhole, bool kRing>
__global__ void __launch_bounds__(32 * kWarps, 4) bgmv_diagonal_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    // Where the next kernel may read nothing early, its blocks would only be in the way of this one's loads.
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(bulk_shared);
    const int warp = threadIdx.x / 32;
    const BlockRow block(args, blockIdx.y);
    const int outputs = kRanks * kWarps >> args.k_warp_bits;
    if (warp == kWarps - 1) diagonal_prefetch<T>(args, block, outputs);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp<1>(args, block, &shared.group);
    __syncthreads();
    if (!args.early_reads) launch_dependents<kArch>();
    const int m_block = diagonal_first_output(args, kRanks * kWarps >> args.k_warp_bits);
    if (shared.group.count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
    } else if (diagonal_aligned(args, shared)) {
      diagonal_block_aligned<kArch, T, kRanks, kWarps, kChunk, kWhole, kRing>(args, shared, m_block);
    } else {
      diagonal_block_general<kArch, T, kRanks, kWarps>(args, shared, m_block);
    }
  }
}

}  // namespace punica::cuda::bgmv
