// What bgmv_diagonal_kernel does where something is not aligned, and what all kernels of its sums share: sizes, shared
// memory.
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

// Behind the last row of x. What lies between rows is memory of the same tensor or of a wider one: it may be read.
template <class T>
__device__ __forceinline__ const T* x_end(const BgmvArgs& args, const T* x) {
  return x + (args.batch - 1) * args.x_stride + args.h_in;
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
      r.values[i / 2] |= load_element_if(at >= begin && at < end, reinterpret_cast<const void*>(at)) << (16 * (i % 2));
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
  if (count < 8) clear_from(count, r);
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
      add_diagonals<T>(sum[2 * p], sum[2 * p + 1], a[2 * p], a[2 * p + 1], x, lane / 4);
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

}  // namespace punica::cuda::bgmv
