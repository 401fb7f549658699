// dispatch_bgmv of float16 and bfloat16 on sm_90 where the weights go straight to the registers that multiply them: the
// sums of bgmv_row.cuh for h_in = 4096 (shrink) and h_in = 16 (expand), where x is aligned.
//
// In a chain the next kernel asks for its weights when this one's wait returns, and what this one then loads and stores
// stands in line behind them. So few of them are on their way at a time: each load waits for an earlier one. Weights
// that are not aligned are read by the same lanes from the aligned pieces that hold them.
#pragma once

#include "src/cuda/lora/bgmv_row.cuh"

namespace punica::cuda::bgmv {

// The address of a row's adapter, for chains: with the index the first 64 addresses are asked for, so that the one it
// needs, if it is among them, takes no second wait.
struct RowEntriesAhead {
  int64_t index, addresses[2];

  __device__ __forceinline__ void load(const BgmvArgs& args, int64_t b) {
    const unsigned lane = threadIdx.x % 32;
    index = load_entry(args.indices + b);
    addresses[0] = addresses[1] = 0;
    if (lane < args.num_adapters) addresses[0] = load_entry(args.w_ptr + lane);
    if (lane + 32 < args.num_adapters) addresses[1] = load_entry(args.w_ptr + lane + 32);
  }
  __device__ __forceinline__ bool find(const BgmvArgs& args, int64_t* weights) {
    if (index < 0 || index >= args.num_adapters) return false;
    if (index < 64) {
      *weights = __shfl_sync(0xffffffffu, index < 32 ? addresses[0] : addresses[1], static_cast<unsigned>(index) % 32);
    } else {
      *weights = load_entry(args.w_ptr + index);
    }
    return true;
  }
};

// Weights, at their place among the other loads; few of them are read by more than one block.
__device__ __forceinline__ Words<4> load_weights16(const void* from) {
  Words<4> r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.values[0]), "=r"(r.values[1]), "=r"(r.values[2]), "=r"(r.values[3])
               : "l"(from)
               : "memory");
  return r;
}
__device__ __forceinline__ Words<2> load_weights8(const void* from) {
  Words<2> r;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(r.values[0]), "=r"(r.values[1])
               : "l"(from)
               : "memory");
  return r;
}

// Functions of their own: what they need takes no registers of the common way.
static __device__ __noinline__ Words<4> load_unaligned16(const void* from, const void* begin, const void* end) {
  Unaligned<4> piece;
  piece.start(from, 8, begin, end);
  return piece.finish();
}
static __device__ __noinline__ Words<2> load_unaligned8(const void* from, const void* begin, const void* end) {
  Unaligned<2> piece;
  piece.start(from, 4, begin, end);
  return piece.finish();
}

// Load i of a row's weights waits for load after(i), if that is not negative: kGroup loads are asked for at a time, and
// kDepth such groups are on their way.
template <int kGroup, int kDepth>
__device__ constexpr int load_after(int i) {
  return i % kGroup == 0 && i / kGroup >= kDepth ? (i / kGroup - kDepth) * kGroup + kGroup - 1 : -1;
}

// kOutputs of a row a block. kAhead: under early reads alone. Grid: (blocks that share the outputs, rows).
template <Arch kArch, class T, int kOutputs, int kGroup, int kDepth, bool kAhead>
__global__ void __launch_bounds__(256, 4) bgmv_direct_shrink_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kStride = kDiagonalStep * kDiagonalWarps, kLoads = 2 * kOutputs;
    const bool early = kAhead || args.early_reads;
    if (early) launch_dependents<kArch>();
    __shared__ __align__(16) float sums[kOutputs * kDiagonalWarps * kSlices];
    std::conditional_t<kAhead, RowEntriesAhead, RowEntries> entries;
    if (early) entries.load(args, args.first_row + blockIdx.y);
    const unsigned tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const unsigned k_lane = warp * kDiagonalStep + 8 * lane;
    const T* const x_row = static_cast<const T*>(args.x) + (args.first_row + blockIdx.y) * args.x_stride;
    prefetch_row<kRowIn>(x_row);
    const int m_block = (args.first_tile + static_cast<int>(blockIdx.x)) * kOutputs;
    if (tid == 32) prefetch_line(row_output<T, kOutputs>(args));
    const T* const x = x_row + k_lane;
    Words<4> xs[2];
    T y_before = from_float<T>(0.0f);
    const bool stores = warp == 0 && lane % kDiagonalWarps == 0 && lane < kOutputs * kDiagonalWarps;
    const auto load_rows = [&] {
      xs[0] = load_if(true, x);
      xs[1] = load_if(true, x + kStride);
      if (stores) y_before = *row_output<T, kOutputs>(args);
    };
    if (!early) {
      grid_dependency_wait<kArch>();
      entries.load(args, args.first_row + blockIdx.y);
      launch_dependents<kArch>();
      load_rows();
    }
    int64_t address;
    if (!entries.find(args, &address)) {
      if (early) grid_dependency_wait<kArch>();
      return;
    }
    const T* const layer = reinterpret_cast<const T*>(address) + args.layer_offset;
    const T* w = layer + static_cast<int64_t>(m_block) * kRowIn + k_lane;
    Words<4> a[kLoads];
    if (reinterpret_cast<uintptr_t>(layer) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (load_after<kGroup, kDepth>(i) >= 0) {
          w += a[load_after<kGroup, kDepth>(i) < 0 ? 0 : load_after<kGroup, kDepth>(i)].values[3] & args.zero;
        }
        a[i] = load_weights16(w + i % kOutputs * kRowIn + i / kOutputs * kStride);
      }
    } else {
      const T* const end = layer + static_cast<int64_t>(args.h_out) * kRowIn;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        a[i] = load_unaligned16(w + i % kOutputs * kRowIn + i / kOutputs * kStride, layer, end);
      }
    }
    if (early) {
      grid_dependency_wait<kArch>();
      load_rows();
    }
    float sum[kOutputs] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int p = 0; p < (kOutputs + 1) / 2; ++p) {
        float product[4];
        constexpr Words<4> kNothing = {};
        step_product_from_zero<T>(product, a[kOutputs * s + 2 * p],
                                  kOutputs == 1 ? kNothing : a[kOutputs * s + (2 * p + 1) % kOutputs], xs[s]);
        sum[2 * p] += g % 2 != 0 ? product[1] : product[0];
        if (kOutputs > 1) sum[(2 * p + 1) % kOutputs] += g % 2 != 0 ? product[3] : product[2];
      }
    }
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kOutputs; ++q) sums[(q * kDiagonalWarps + warp) * kSlices + g] = sum[q];
    }
    __syncthreads();
    if (warp != 0) return;
    const float total = add_warps(add_slices(sums + min(lane, kOutputs * kDiagonalWarps - 1u) * kSlices));
    if (stores) *row_output<T, kOutputs>(args) = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
  }
}

inline constexpr int kDirectWarps = 4;

// A warp takes kTiles times 32 outputs. Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kTiles, int kWarps, int kGroup, int kDepth, bool kAhead>
__global__ void __launch_bounds__(32 * kWarps, 32 / kWarps)
    bgmv_direct_expand_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    if (args.early_reads) launch_dependents<kArch>();
    std::conditional_t<kAhead, RowEntriesAhead, RowEntries> entries;
    if (args.early_reads) entries.load(args, args.first_row + blockIdx.x);
    const unsigned tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int64_t m = static_cast<int64_t>((args.first_tile + blockIdx.y) * (blockDim.x / 32) + warp) * (32 * kTiles);
    const bool inside = m < args.h_out;
    T* const y_row = static_cast<T*>(args.y) + (args.first_row + blockIdx.x) * args.y_stride + m;
    const T* const x_row = static_cast<const T*>(args.x) + (args.first_row + blockIdx.x) * args.x_stride;
    if (inside && lane < (kTiles + 1) / 2) prefetch_line(y_row + lane * 64);
    if (tid == 8) prefetch_line(x_row);
    T* const y = y_row + 8 * t + g;
    Words<2> xs;
    T before[kTiles];
    const auto load_rows = [&] {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(xs.values[0]), "=r"(xs.values[1])
                   : "l"(x_row + 4 * t)
                   : "memory");
#pragma unroll
      for (int i = 0; i < kTiles; ++i) before[i] = y[32 * i];
    };
    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      entries.load(args, args.first_row + blockIdx.x);
      launch_dependents<kArch>();
      if (inside) load_rows();
    }
    int64_t address;
    if (!entries.find(args, &address) || !inside) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const T* const layer = reinterpret_cast<const T*>(address) + args.layer_offset;
    const T* w = layer + m * 16 + 4 * lane;
    Words<2> a[4 * kTiles];  // rows g of each run of eight
    if (reinterpret_cast<uintptr_t>(layer) % 8 == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        if (load_after<kGroup, kDepth>(i) >= 0) {
          w += a[load_after<kGroup, kDepth>(i) < 0 ? 0 : load_after<kGroup, kDepth>(i)].values[1] & args.zero;
        }
        a[i] = load_weights8(w + 128 * i);
      }
    } else {
      const T* const end = layer + static_cast<int64_t>(args.h_out) * 16;
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) a[i] = load_unaligned8(w + 128 * i, layer, end);
    }
    if (args.early_reads) {
      grid_dependency_wait<kArch>();
      load_rows();
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      // All columns of a product are the one row of x, so that lane (g, t) has the outputs of rows g and g + 8; it
      // keeps that of row 8 t + g.
      float product[2][4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Words<2>&upper = a[4 * i + 2 * e], &lower = a[4 * i + 2 * e + 1];
        mma_from_zero<T>(product[e], upper.values[0], lower.values[0], upper.values[1], lower.values[1], xs.values[0],
                         xs.values[1]);
      }
      const float low = t % 2 == 0 ? product[0][0] : product[0][2], high = t % 2 == 0 ? product[1][0] : product[1][2];
      y[32 * i] = from_float<T>(fmaf(args.scale, t < 2 ? low : high, to_float(before[i])));
    }
  }
}

}  // namespace punica::cuda::bgmv
