// dispatch_bgmv of float32, with ordinary multiply-adds.
//
// A team of threads shares rows of W: thread q takes the elements 4 (q + team * i) .. + 3, i = 0, 1, ..., in this
// order; its sums are added over the warp by a butterfly and, where the team is the whole block, over the warps in
// their order. The team's size follows from h_in alone.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kFloatThreads = 256;
inline constexpr int kFloatRows = 2;   // rows of W of a team at a time
inline constexpr int kFloatBatch = 4;  // loads of each in flight

// Four floats, zeros from `count` on.
template <bool kVectors>
__device__ __forceinline__ Words<4> load_floats(const float* from, int count) {
  if constexpr (kVectors) {
    return load_if(count > 0, from);
  } else {
    Words<4> r;
#pragma unroll
    for (int i = 0; i < 4; ++i) r.values[i] = i < count ? __float_as_uint(from[i]) : 0u;
    return r;
  }
}

template <Arch kArch, bool kVectors>
__device__ __forceinline__ void bgmv_float32(const BgmvArgs& args, const Group& group, const float* w) {
  __shared__ int64_t rows[kGroupRows];
  __shared__ float partial[kFloatThreads / 32][kGroupRows * kFloatRows];
  const int tid = threadIdx.x, lane = tid % 32, team = args.team;
  const int q = tid & (team - 1);
  const int h_in = args.h_in, h_out = args.h_out, count = group.count;
  const int teams = kFloatThreads / team;
  const int64_t m0 = (static_cast<int64_t>(args.first_tile + blockIdx.y) * teams + tid / team) * kFloatRows;
  if (tid < 32 && lane % 4 == 0) rows[lane / 4] = group.row;

  Words<4> a[kFloatRows][kFloatBatch];
  const auto load_w = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kFloatBatch; ++i) {
      const int k = k0 + 4 * (q + team * i);
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) {
        a[r][i] = load_floats<kVectors>(w + (m0 + r) * h_in + k, m0 + r < h_out ? h_in - k : 0);
      }
    }
  };
  load_w(0);
  if (args.early_reads) grid_dependency_wait<kArch>();
  __syncthreads();

  float sum[kGroupRows][kFloatRows] = {};
  const int stride = 4 * team * kFloatBatch;
  for (int k0 = 0; k0 < h_in; k0 += stride) {
    if (k0 > 0) load_w(k0);
#pragma unroll
    for (int n = 0; n < kGroupRows; ++n) {
      if (n < count) {
        const float* x = static_cast<const float*>(args.x) + rows[n] * args.x_stride;
        Words<4> xs[kFloatBatch];
#pragma unroll
        for (int i = 0; i < kFloatBatch; ++i) {
          const int k = k0 + 4 * (q + team * i);
          xs[i] = load_floats<kVectors>(x + k, h_in - k);
        }
#pragma unroll
        for (int i = 0; i < kFloatBatch; ++i) {
#pragma unroll
          for (int r = 0; r < kFloatRows; ++r) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sum[n][r] = fmaf(__uint_as_float(a[r][i].values[e]), __uint_as_float(xs[i].values[e]), sum[n][r]);
            }
          }
        }
      }
    }
  }

  const int width = min(team, 32);
#pragma unroll
  for (int n = 0; n < kGroupRows; ++n) {
    if (n < count) {
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) {
        for (int distance = width / 2; distance > 0; distance /= 2) {
          sum[n][r] += __shfl_xor_sync(0xffffffffu, sum[n][r], distance);
        }
      }
    }
  }
  const auto update = [&](int n, int r, float total) {
    if (m0 + r >= h_out) return;
    float* y = static_cast<float*>(args.y) + rows[n] * args.y_stride + m0 + r;
    *y = fmaf(args.scale, total, *y);
  };
  if (team <= 32) {
    // Every thread of the team has all its sums; it stores every team'th.
#pragma unroll
    for (int n = 0; n < kGroupRows; ++n) {
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) {
        if (n < count && ((n * kFloatRows + r) & (team - 1)) == q) update(n, r, sum[n][r]);
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kGroupRows; ++n) {
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) {
      if (lane == n * kFloatRows + r) partial[tid / 32][lane] = sum[n][r];
    }
  }
  __syncthreads();
  if (tid < count * kFloatRows) {
    float total = partial[0][tid];
#pragma unroll
    for (int i = 1; i < kFloatThreads / 32; ++i) total += partial[i][tid];
    update(tid / kFloatRows, tid % kFloatRows, total);
  }
}

// Grid: (rows, blocks of kFloatRows outputs a team). The team is a power of two from 4 to 32, or the block.
template <Arch kArch>
__global__ void __launch_bounds__(kFloatThreads) bgmv_float32_kernel(const BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    if (!args.early_reads) grid_dependency_wait<kArch>();
    Group group;
    if (!find_group(args, args.first_row + blockIdx.x, &group)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const float* w = reinterpret_cast<const float*>(group.weights) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
      bgmv_float32<kArch, true>(args, group, w);
    } else {
      bgmv_float32<kArch, false>(args, group, w);
    }
  }
}

}  // namespace punica::cuda::bgmv
