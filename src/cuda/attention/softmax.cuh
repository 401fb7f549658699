// The online softmax of a row, the same arithmetic in every kernel: explicit intrinsics, so that no compiler choice
// (contraction to a multiply-add) makes two kernels differ.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace punica::cuda {

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// 2^x, zero below 2^-126; exact for 0 and -inf, within 2 ulp otherwise. NaN stays NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What a maximum subtracts: all scores may be -inf, and -inf - -inf is not a number.
__device__ __forceinline__ float finite_or_zero(float maximum) { return maximum == minus_infinity() ? 0.0f : maximum; }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Of one row: sums[d] = sum_j 2^(s_j - maximum) v_jd, and the same without v in `weight`. -inf and zeros before the
// first key.
template <int kCount>
struct RowState {
  float maximum;
  float weight;
  float sums[kCount];

  __device__ __forceinline__ void clear() {
    maximum = minus_infinity();
    weight = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
  }

  // Adds the state of later keys. One that saw nothing changes no bit.
  __device__ __forceinline__ void merge(const RowState& later) {
    if (later.weight == 0.0f) return;
    if (weight == 0.0f) {
      *this = later;
      return;
    }
    const float top = fmaxf(maximum, later.maximum);
    const float decay = exp2_fast(__fsub_rn(maximum, finite_or_zero(top)));
    const float later_decay = exp2_fast(__fsub_rn(later.maximum, finite_or_zero(top)));
    maximum = top;
    weight = __fmaf_rn(later.weight, later_decay, __fmul_rn(weight, decay));
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = __fmaf_rn(later.sums[i], later_decay, __fmul_rn(sums[i], decay));
  }

  __device__ __forceinline__ float log_sum() const { return __fadd_rn(maximum, log2f(weight)); }
};

}  // namespace punica::cuda
