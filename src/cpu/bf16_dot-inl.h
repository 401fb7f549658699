// The native bfloat16 dot product of AVX-512-BF16, which Highway 1.0 has no target for. Included by kernels beside
// simd-inl.h; empty in every pass but AVX-512.
//
// Written as assembly because a compiler accepts the intrinsic only in functions compiled for avx512bf16, and the
// kernels' templates are compiled for Highway's AVX3 target, which both of its tables share. Only the table
// kernels_bf16() leads here.
#include "hwy/highway.h"

#if defined(PUNICA_CPU_BF16_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_BF16_DOT_INL_H_
#undef PUNICA_CPU_BF16_DOT_INL_H_
#else
#define PUNICA_CPU_BF16_DOT_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3

// 32 bfloat16 as they lie in memory.
using VBF16 = hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<hwy::bfloat16_t>>;

HWY_INLINE VBF16 load_bf16(const hwy::bfloat16_t* p) {
  return hwy::HWY_NAMESPACE::LoadU(hwy::HWY_NAMESPACE::ScalableTag<hwy::bfloat16_t>(), p);
}

// The pair (p[0], p[1]) in every 32-bit lane.
HWY_INLINE VBF16 broadcast_bf16_pair(const hwy::bfloat16_t* p) {
  VBF16 pair;
  asm("vpbroadcastd %[p], %[pair]" : [pair] "=v"(pair.raw) : [p] "m"(*reinterpret_cast<const uint8_t (*)[4]>(p)));
  return pair;
}

// sum[i] + a[2i + 1] * b[2i + 1] + a[2i] * b[2i] in each of the 16 lanes: products added in that order, rounded to
// nearest, subnormal inputs and results taken as zero.
HWY_INLINE hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<float>> dot_bf16(
    hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<float>> sum, VBF16 a, VBF16 b) {
  asm("vdpbf16ps %[b], %[a], %[sum]" : [sum] "+v"(sum.raw) : [a] "v"(a.raw), [b] "v"(b.raw));
  return sum;
}

// Rounds to nearest, ties to even, and stores 16 elements at p. NaN stays NaN; subnormal results become zero.
HWY_INLINE void store_bf16(hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<float>> v, hwy::bfloat16_t* p) {
  hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::FixedTag<uint16_t, 16>> rounded;
  asm("vcvtneps2bf16 %[v], %[rounded]" : [rounded] "=v"(rounded.raw) : [v] "v"(v.raw));
  hwy::HWY_NAMESPACE::StoreU(rounded, hwy::HWY_NAMESPACE::FixedTag<uint16_t, 16>(), reinterpret_cast<uint16_t*>(p));
}

#endif  // HWY_TARGET == HWY_AVX3

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_BF16_DOT_INL_H_
