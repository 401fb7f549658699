// dispatch_bgmv of float16 and bfloat16 where h_in is short (expand), on sm_80.
//
// A warp takes the whole of K for 64 outputs at a time and up to 8 rows that share the adapter: nothing is split, so
// nothing is added up between warps. The weights of its next 64 outputs are asked for as soon as those before are used.
// A lane ends with pairs of neighbouring outputs, so that y is read and written four bytes at a time.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kShortWarps = 4;
inline constexpr int kShortTiles = 4;                // tensor-core tiles of 16 outputs of a warp
inline constexpr int kShortRows = 16 * kShortTiles;  // outputs of a warp at a time

inline constexpr int kShortStages = 2;  // steps in flight of a warp
inline constexpr int kShortSteps = 4;   // of K, at most

// Shared memory of a block: [stage][row of a tile][thread], what is in flight.
template <int kCount>
using ShortStage = Words<kCount>[2 * kShortTiles][32 * kShortWarps];

// kCount words a lane and step: 2 for K up to 16, in one step; 4 otherwise.
template <Arch kArch, class T, int kCount, bool kVectors>
__device__ __forceinline__ void bgmv_short(const BgmvArgs& args, const Group& group, const T* w,
                                           ShortStage<kCount>* shared) {
  constexpr int kStep = 8 * kCount;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, h_out = args.h_out;
  const int steps = kCount == 2 ? 1 : (h_in + kStep - 1) / kStep;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kShortWarps * kShortRows;
  const int k_lane = 2 * kCount * t;  // of this lane in a step

  // What the next copies are for. Row g (h = 0) or g + 8 (h = 1) of tile j is output m0 + 16j + 2g + h.
  int64_t copy_m0 = static_cast<int64_t>(blockIdx.y * kShortWarps + threadIdx.x / 32) * kShortRows;
  int copy_step = 0, copy_stage = 0;
  int64_t m0 = copy_m0;
  const auto start_w = [&] {
    const int k = copy_step * kStep + k_lane;
    const int rows = k < h_in ? static_cast<int>(min(h_out - copy_m0, int64_t{kShortRows})) - 2 * g : 0;
    const T* base = w + (copy_m0 + 2 * g) * h_in + k;
#pragma unroll
    for (int i = 0; i < 2 * kShortTiles; ++i) {
      const int row = i / 2 * 16 + i % 2;
      start_copy<kCount>(&shared[copy_stage][i][threadIdx.x], base + row * h_in, row < rows);
    }
    copy_commit();
    copy_stage ^= 1;
    if (++copy_step == steps) {
      copy_step = 0;
      copy_m0 += stride;
    }
  };
  if constexpr (kVectors) {
#pragma unroll
    for (int i = 0; i < kShortStages; ++i) start_w();
  }
  if (args.early_reads) grid_dependency_wait<kArch>();

  const T* x = static_cast<const T*>(args.x) + group.row * args.x_stride;
  const int x_count = g < group.count ? h_in : 0;
  const auto load_x = [&](int step) {
    const int k = step * kStep + k_lane;
    if constexpr (kVectors) {
      Words<kCount> r = {};
      if (k < x_count) r = *reinterpret_cast<const Words<kCount>*>(x + k);
      return r;
    } else {
      Unaligned<kCount> r;
      r.start(x + k, x_count - k, x, x + h_in);
      return r.finish();
    }
  };
  Words<kCount> xs = load_x(0);

  T* y[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    y[e] = static_cast<T*>(args.y) + __shfl_sync(0xffffffffu, group.row, 4 * (2 * t + e)) * args.y_stride + 2 * g;
  }

  int stage = 0;
  for (; m0 < h_out; m0 += stride) {
    const int rows = static_cast<int>(min(h_out - m0, int64_t{kShortRows})) - 2 * g;
    Vec<T, 2> before[2][kShortTiles] = {};
    const auto load_y = [&](int e) {
      const T* from = y[e] + m0;
      const int count = 2 * t + e < group.count ? rows : 0;
#pragma unroll
      for (int j = 0; j < kShortTiles; ++j) {
        if constexpr (kVectors) {
          if (16 * j < count) before[e][j] = load<T, 2>(from + 16 * j);
        } else {
          if (16 * j < count) before[e][j].values[0] = from[16 * j];
          if (16 * j + 1 < count) before[e][j].values[1] = from[16 * j + 1];
        }
      }
    };
    if constexpr (kVectors) {
      load_y(0);
      load_y(1);
    }

    float sum[kShortTiles][1][4] = {};
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      if constexpr (kVectors) {
        const Words<kCount> next = steps == 1 ? xs : load_x(s + 1 == steps ? 0 : s + 1);
        copy_wait<kShortStages - 1>();
#pragma unroll
        for (int j = 0; j < kShortTiles; ++j) {
          const Words<kCount> a = read_copy(&shared[stage][2 * j][threadIdx.x]);
          const Words<kCount> b = read_copy(&shared[stage][2 * j + 1][threadIdx.x]);
          step_product<T>(sum[j], a, b, xs);
        }
        start_w();
        stage ^= 1;
        xs = next;
      } else {
        const int k = s * kStep + k_lane;
        if (s > 0 || m0 > 0) xs = load_x(s);
#pragma unroll
        for (int j = 0; j < kShortTiles; ++j) {
          const T* from = w + (m0 + 16 * j + 2 * g) * h_in + k;
          const T* w_end = w + static_cast<int64_t>(h_out) * h_in;
          Unaligned<kCount> a, b;
          a.start(from, 16 * j < rows ? h_in - k : 0, w, w_end);
          b.start(from + h_in, 16 * j + 1 < rows ? h_in - k : 0, w, w_end);
          step_product<T>(sum[j], a.finish(), b.finish(), xs);
        }
      }
    }

#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (!kVectors) load_y(e);
      T* to = y[e] + m0;
      const int count = 2 * t + e < group.count ? rows : 0;
#pragma unroll
      for (int j = 0; j < kShortTiles; ++j) {
        Vec<T, 2> after;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          after.values[h] = from_float<T>(fmaf(args.scale, sum[j][0][2 * h + e], to_float(before[e][j].values[h])));
        }
        if constexpr (kVectors) {
          if (16 * j < count) store(to + 16 * j, after);
        } else {
          if (16 * j < count) to[16 * j] = after.values[0];
          if (16 * j + 1 < count) to[16 * j + 1] = after.values[1];
        }
      }
    }
  }
}

// Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kCount>
__global__ void __launch_bounds__(32 * kShortWarps, kCount == 2 ? 8 : 4) bgmv_short_kernel(const BgmvArgs args) {
  static_assert(32 * kShortWarps >= kScanRows);
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    if (!args.early_reads) grid_dependency_wait<kArch>();
    __shared__ ShortStage<kCount> shared[kShortStages];
    Group group;
    if (!find_group(args, args.first_row + blockIdx.x, &group)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const T* w = reinterpret_cast<const T*>(group.weights) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % (4 * kCount) == 0) {
      bgmv_short<kArch, T, kCount, true>(args, group, w, shared);
    } else {
      bgmv_short<kArch, T, kCount, false>(args, group, w, shared);
    }
  }
}

}  // namespace punica::cuda::bgmv
