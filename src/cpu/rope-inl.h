// Rotary embedding in Llama's layout: element d pairs with d + D / 2. Included by attention_kernels.cc once for each
// instruction set, after attention-inl.h.
//
// The angle position / rope_scale * theta^(-2 d / D) is computed in float64 and reduced there to one turn; only sine
// and cosine of what is left are float32. Keys of one group of kRopeGroup tokens share that: the rest is a product with
// the rotation by the place in the group, whose table a call computes once. Error: some 3e-7 rad at any position.
#include <cmath>
#include <cstring>

#if defined(PUNICA_CPU_ROPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_ROPE_INL_H_
#undef PUNICA_CPU_ROPE_INL_H_
#else
#define PUNICA_CPU_ROPE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {
namespace {

inline constexpr int64_t kRopeGroup = 16;
inline constexpr int64_t kRopeHalf = kMaxHeadDim / 2;  // a multiple of kLanes

// Cosines and sines of one position, zero behind D / 2.
struct Rotation {
  alignas(64) float cos[kRopeHalf];
  alignas(64) float sin[kRopeHalf];
};

class Rope {
 public:
  Rope(const AttentionParams& params) : half_(params.q.shape[2] / 2) {
    const double theta = *params.rope_theta, scale = params.rope_scale;
    constexpr double kTwoPi = 6.283185307179586476925;
    for (int64_t d = 0; d < half_; ++d) {
      frequency_[d] = std::pow(theta, -static_cast<double>(d) / static_cast<double>(half_)) / scale / kTwoPi;
    }
    for (int64_t i = 0; i < kRopeGroup; ++i) compute(i, offset_[i]);
  }

  // The rotation of the group that `position` is in.
  void group_rotation(int64_t position, Rotation& rotation) const {
    compute(position / kRopeGroup * kRopeGroup, rotation);
  }

  // Rotates x (D elements, any type) to `position` into out, in float32, which is kLanes longer than D. `group` is
  // group_rotation(position).
  template <class T>
  HWY_INLINE void rotate(const T* x, int64_t position, const Rotation& group, float* out) const {
    const Rotation& offset = offset_[position % kRopeGroup];
    const T* x2 = x + half_;
    // The first halves overrun into the second ones, which are written later.
    for (int64_t d = 0; d < half_; d += kLanes) {
      const VF cos = cos_of(group, offset, d), sin = sin_of(group, offset, d);
      store(hn::NegMulAdd(load_half(x2, d), sin, hn::Mul(load_half(x, d), cos)), out + d);
    }
    for (int64_t d = 0; d < half_; d += kLanes) {
      const VF cos = cos_of(group, offset, d), sin = sin_of(group, offset, d);
      store(hn::MulAdd(load_half(x, d), sin, hn::Mul(load_half(x2, d), cos)), out + half_ + d);
    }
  }

 private:
  HWY_NOINLINE void compute(int64_t position, Rotation& rotation) const {
    alignas(64) float angle[kRopeHalf] = {};
    for (int64_t d = 0; d < half_; ++d) {
      const double turns = static_cast<double>(position) * frequency_[d];
      angle[d] = static_cast<float>((turns - std::nearbyint(turns)) * 6.283185307179586476925);
    }
    for (int64_t d = 0; d < half_; d += kLanes) {
      store(hn::Cos(F32(), load(angle + d)), rotation.cos + d);
      store(hn::Sin(F32(), load(angle + d)), rotation.sin + d);
    }
  }

  // Sum of the two angles.
  static HWY_INLINE VF cos_of(const Rotation& a, const Rotation& b, int64_t d) {
    return hn::NegMulAdd(load(a.sin + d), load(b.sin + d), hn::Mul(load(a.cos + d), load(b.cos + d)));
  }
  static HWY_INLINE VF sin_of(const Rotation& a, const Rotation& b, int64_t d) {
    return hn::MulAdd(load(a.cos + d), load(b.sin + d), hn::Mul(load(a.sin + d), load(b.cos + d)));
  }
  template <class T>
  HWY_INLINE VF load_half(const T* x, int64_t d) const {
    return d + kLanes <= half_ ? load(x + d) : load_n(x + d, half_ - d);
  }

  int64_t half_;
  double frequency_[kRopeHalf];  // turns a token
  Rotation offset_[kRopeGroup];
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_ROPE_INL_H_
