// What the families' kernels share: vectors of float32, loaded from and stored to any element type. Part of a
// translation unit that foreach_target.h includes once for each instruction set; include it after hwy/highway.h.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

#if defined(PUNICA_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_SIMD_INL_H_
#undef PUNICA_CPU_SIMD_INL_H_
#else
#define PUNICA_CPU_SIMD_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using hwy::bfloat16_t;
using hwy::float16_t;

using F32 = hn::ScalableTag<float>;
using U32 = hn::ScalableTag<uint32_t>;
using VF = hn::Vec<F32>;

// float32 lanes of a vector: 4, 8 or 16, a compile-time constant on every instruction set that is compiled.
inline constexpr int64_t kLanes = HWY_LANES(float);

HWY_INLINE VF zero() { return hn::Zero(F32()); }
HWY_INLINE VF broadcast(float value) { return hn::Set(F32(), value); }

// kLanes elements at p, as float32. No alignment needed.
HWY_INLINE VF load(const float* p) { return hn::LoadU(F32(), p); }
HWY_INLINE VF load(const bfloat16_t* p) {
  const hn::Rebind<uint16_t, F32> narrow;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(U32(), bits)));
}
#if HWY_TARGET == HWY_EMU128
// Highway 1.0's emulation knows neither infinities nor rounding in float16: the usual integer ways, after Fabian
// Giesen's "half_to_float_fast5" and "float_to_half_fast3_rtne" (public domain).
HWY_INLINE VF load(const float16_t* p) {
  const U32 u;
  const hn::Rebind<uint16_t, F32> narrow;
  const auto bits = hn::PromoteTo(u, hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(p)));
  const auto magnitude = hn::And(bits, hn::Set(u, 0x7FFFu));
  // The exponent is off by 127 - 15; a product puts it right, for subnormals too.
  const auto scaled = hn::Mul(hn::BitCast(F32(), hn::ShiftLeft<13>(magnitude)), hn::Set(F32(), 0x1p112f));
  const auto is_special = hn::Ge(magnitude, hn::Set(u, 0x7C00u));
  const auto special = hn::IfThenElseZero(is_special, hn::Set(u, 0x7F800000u));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(u, 0x8000u)));
  return hn::BitCast(F32(), hn::Or(hn::Or(hn::BitCast(u, scaled), special), sign));
}
#else
HWY_INLINE VF load(const float16_t* p) { return hn::PromoteTo(F32(), hn::LoadU(hn::Rebind<float16_t, F32>(), p)); }
#endif

// The first n < kLanes elements at p, zeros behind them; nothing behind them is read.
template <class T>
HWY_INLINE VF load_n(const T* p, int64_t n) {
  alignas(64) T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

// One element, as float32.
HWY_INLINE float to_float(float value) { return value; }
HWY_INLINE float to_float(bfloat16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
HWY_INLINE float to_float(float16_t value) { return hn::GetLane(load_n(&value, 1)); }

// Rounds to nearest, ties to even, and stores kLanes elements at p. NaN stays NaN.
HWY_INLINE void store(VF v, float* p) { hn::StoreU(v, F32(), p); }
HWY_INLINE void store(VF v, bfloat16_t* p) {
  const U32 u;
  const auto bits = hn::BitCast(u, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(u, 0x7FFFu)));
  // Adding could carry a NaN over into zero: it keeps its upper half, made quiet.
  const auto quiet = hn::Or(bits, hn::Set(u, 0x00400000u));
  const auto is_nan = hn::RebindMask(u, hn::IsNaN(v));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  const hn::Rebind<uint16_t, F32> narrow;
  hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(hn::RebindToSigned<U32>(), upper)), narrow,
             reinterpret_cast<uint16_t*>(p));
}
#if HWY_TARGET == HWY_EMU128
HWY_INLINE void store(VF v, float16_t* p) {
  const U32 u;
  const auto bits = hn::BitCast(u, v);
  const auto sign = hn::And(bits, hn::Set(u, 0x80000000u));
  const auto magnitude = hn::Xor(bits, sign);
  const auto is_nan = hn::Gt(magnitude, hn::Set(u, 0x7F800000u));
  const auto special = hn::IfThenElse(is_nan, hn::Set(u, 0x7E00u), hn::Set(u, 0x7C00u));
  // Subnormal results: adding 0.5 moves the bits that stay to the bottom of the mantissa and rounds the rest.
  const auto half = hn::Set(F32(), 0.5f);
  const auto subnormal = hn::Sub(hn::BitCast(u, hn::Add(hn::BitCast(F32(), magnitude), half)), hn::BitCast(u, half));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(u, 1u));
  const auto rebiased = hn::Sub(magnitude, hn::Set(u, (127u - 15u) << 23));
  const auto normal = hn::ShiftRight<13>(hn::Add(rebiased, hn::Add(odd, hn::Set(u, 0xFFFu))));
  const auto finite = hn::IfThenElse(hn::Lt(magnitude, hn::Set(u, 113u << 23)), subnormal, normal);
  const auto result = hn::IfThenElse(hn::Ge(magnitude, hn::Set(u, (127u + 16u) << 23)), special, finite);
  const hn::Rebind<uint16_t, F32> narrow;
  const auto with_sign = hn::BitCast(hn::RebindToSigned<U32>(), hn::Or(result, hn::ShiftRight<16>(sign)));
  hn::StoreU(hn::DemoteTo(narrow, with_sign), narrow, reinterpret_cast<uint16_t*>(p));
}
#else
HWY_INLINE void store(VF v, float16_t* p) {
  const hn::Rebind<float16_t, F32> narrow;
  hn::StoreU(hn::DemoteTo(narrow, v), narrow, p);
}
#endif

// Stores the first n < kLanes elements.
template <class T>
HWY_INLINE void store_n(VF v, T* p, int64_t n) {
  alignas(64) T lanes[kLanes];
  store(v, lanes);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
HWY_INLINE T from_float(float value) {
  T result;
  store_n(broadcast(value), &result, 1);
  return result;
}

// Sum of all lanes, in an order that is fixed for the instruction set.
HWY_INLINE float sum_lanes(VF v) { return hn::GetLane(hn::SumOfLanes(F32(), v)); }

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_SIMD_INL_H_
