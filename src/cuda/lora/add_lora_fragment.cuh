// Fragments of v in add_lora_plain.cuh, as products leave them: in shared memory, added, turned round, and split into
// the pairs of numbers that the expand multiplies.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kFragment = 512;  // bytes

// A copy of 16 bytes, or zeros.
__device__ __forceinline__ void copy_16_if(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ float4 load_fragment(uint32_t from, bool there) {
  float4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
      : "r"(from), "r"(static_cast<int>(there))
      : "memory");
  return v;
}
__device__ __forceinline__ void store_fragment(uint32_t to, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// A matrix of 8 x 8 16-bit numbers, the other way round.
__device__ __forceinline__ uint32_t turn_round(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// split() of two numbers into packed pairs, of which the first is in the low half: x the high ones, y the low ones.
template <class T>
__device__ __forceinline__ uint2 split_two_large(float v0, float v1) {
  uint16_t h0, l0, h1, l1;
  split<T>(v0, &h0, &l0);
  split<T>(v1, &h1, &l1);
  return {h0 | uint32_t{h1} << 16, l0 | uint32_t{l1} << 16};
}

// The same of numbers within the range of T.
template <class T>
__device__ __forceinline__ uint2 split_two(float v0, float v1) {
  uint2 r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.x) : "f"(v1), "f"(v0));
    const float r0 = v0 - __uint_as_float(r.x << 16), r1 = v1 - __uint_as_float(r.x & 0xffff0000u);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.y) : "f"(r1), "f"(r0));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.x) : "f"(v1), "f"(v0));
    const float r0 = v0 - __half2float(__ushort_as_half(static_cast<uint16_t>(r.x)));
    const float r1 = v1 - __half2float(__ushort_as_half(static_cast<uint16_t>(r.x >> 16)));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.y) : "f"(r1), "f"(r0));
  }
  return r;
}

}  // namespace punica::cuda::fused_lora
