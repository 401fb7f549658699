// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink), on sm_80.
//
// A block serves the rows of a group and 16 outputs: K is split over its warps, each warp multiplies its part on tensor
// cores, and the partial sums [8 columns][16 outputs] are added in the order of the warps. All of it is fixed by h_in.
// What limits the kernel is how many bytes of W are in flight: kLongStages steps a warp, all asked for before the first
// is used.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kLongStep = 32;   // elements of K of a step
inline constexpr int kLongStages = 4;  // steps in flight of a warp
inline constexpr int kLongRows = 16;   // outputs of a block
inline constexpr int kLongThreads = 256;

// A column of a warp's partial sums starts kLongPitch floats after the one before: lanes (g, t), at 2t * kLongPitch +
// g, are in different banks.
inline constexpr int kLongPitch = 20;

// Shared memory of a block: [stage][row g of W, row g + 8, x][thread] for what is in flight, then the partial sums.
constexpr size_t long_shared_bytes(int num_threads) {
  return size_t{3} * kLongStages * num_threads * sizeof(Words<4>) +
         num_threads / 32 * kLongPitch * kGroupRows * sizeof(float);
}

template <Arch kArch, class T, bool kVectors>
__device__ __forceinline__ void bgmv_long(const BgmvArgs& args, const Group& group, const T* w, Words<4>* shared) {
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int num_warps = blockDim.x / 32;
  const int m0 = (args.first_tile + blockIdx.y) * kLongRows;
  const int h_in = args.h_in;
  const int first = warp * args.steps * kLongStep + 8 * t;  // K of the first step of this lane

  const T* upper = w + static_cast<int64_t>(m0 + g) * h_in;
  const T* lower = upper + int64_t{8} * h_in;
  const bool has_upper = m0 + g < args.h_out, has_lower = m0 + g + 8 < args.h_out;
  const bool has_x = g < group.count;
  const T* x = static_cast<const T*>(args.x) + group.row * args.x_stride;

  const auto place = [&](int step, int operand) {
    return shared + (step % kLongStages * 3 + operand) * blockDim.x + tid;
  };
  const auto start_w = [&](int step) {
    const int k = first + step * kLongStep;
    const bool valid = step < args.steps && k < h_in;
    start_copy<4>(place(step, 0), upper + k, valid && has_upper);
    start_copy<4>(place(step, 1), lower + k, valid && has_lower);
  };
  const auto start_x = [&](int step) {
    const int k = first + step * kLongStep;
    start_copy<4>(place(step, 2), x + k, step < args.steps && k < h_in && has_x);
  };
  if constexpr (kVectors) {
#pragma unroll
    for (int i = 0; i < kLongStages; ++i) start_w(i);
  }
  if (args.early_reads) grid_dependency_wait<kArch>();
  if constexpr (kVectors) {
#pragma unroll
    for (int i = 0; i < kLongStages; ++i) {
      start_x(i);
      copy_commit();
    }
  }

  // Thread tid adds up and stores output m of column n.
  const int n = tid / kLongRows, m = tid % kLongRows;
  const bool adds = n < group.count;
  const bool stores = adds && m0 + m < args.h_out;
  T* y = static_cast<T*>(args.y) + __shfl_sync(0xffffffffu, group.row, 4 * (n % kGroupRows)) * args.y_stride + m0 + m;
  const T y_before = stores ? *y : from_float<T>(0.0f);

  float sum[2][4] = {};
  for (int s = 0; s < args.steps; ++s) {
    if constexpr (kVectors) {
      copy_wait<kLongStages - 1>();
      const Words<4> a = read_copy(place(s, 0)), b = read_copy(place(s, 1)), c = read_copy(place(s, 2));
      step_product<T>(sum, a, b, c);
      start_w(s + kLongStages);
      start_x(s + kLongStages);
      copy_commit();
    } else {
      const int k = first + s * kLongStep;
      const T* w_end = w + static_cast<int64_t>(args.h_out) * h_in;
      Unaligned<4> a, b, c;
      a.start(upper + k, has_upper ? h_in - k : 0, w, w_end);
      b.start(lower + k, has_lower ? h_in - k : 0, w, w_end);
      c.start(x + k, has_x ? h_in - k : 0, x, x + h_in);
      step_product<T>(sum, a.finish(), b.finish(), c.finish());
    }
  }

  float* of_warp = reinterpret_cast<float*>(shared + 3 * kLongStages * blockDim.x);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (2 * t + e < group.count) {
      float* column = of_warp + (warp * kGroupRows + 2 * t + e) * kLongPitch;
      column[g] = sum[0][e] + sum[1][e];
      column[g + 8] = sum[0][2 + e] + sum[1][2 + e];
    }
  }
  __syncthreads();
  float total = 0;
  if (adds) {
    total = of_warp[n * kLongPitch + m];
    for (int i = 1; i < num_warps; ++i) total += of_warp[(i * kGroupRows + n) * kLongPitch + m];
  }
  if (stores) *y = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
}

// Grid: (rows, tiles of 16 outputs).
template <Arch kArch, class T>
__global__ void __launch_bounds__(kLongThreads, 3) bgmv_long_kernel(const BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    if (!args.early_reads) grid_dependency_wait<kArch>();
    extern __shared__ Words<4> shared[];
    Group group;
    if (!find_group(args, args.first_row + blockIdx.x, &group)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const T* w = reinterpret_cast<const T*>(group.weights) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
      bgmv_long<kArch, T, true>(args, group, w, shared);
    } else {
      bgmv_long<kArch, T, false>(args, group, w, shared);
    }
  }
}

}  // namespace punica::cuda::bgmv
