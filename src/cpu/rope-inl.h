// Rotary embedding in Llama's layout: element d pairs with d + D / 2. Included by attention_kernels.cc once for each
// instruction set, after attention-inl.h.
//
// The angle position / rope_scale * theta^(-2 d / D) is computed in float64 and reduced there to one turn; only sine
// and cosine of what is left are float32. That is done for anchors, kRopeAnchor tokens apart; the rotation of any
// position is the product of its anchor's, its group's and its own within the group, the latter two from tables that a
// call computes once. Error: some 5e-7 rad at any position.
#include <cmath>

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
inline constexpr int64_t kRopeAnchor = 256;
inline constexpr int64_t kRopeHalf = kMaxHeadDim / 2;  // a multiple of kLanes

// Cosines and sines of one position.
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
    for (int64_t i = 0; i < kRopeGroup; ++i) compute(i, token_[i]);
    for (int64_t i = 0; i < kRopeAnchor / kRopeGroup; ++i) compute(i * kRopeGroup, group_[i]);
  }

  // What stays the same from one position to the next: the rotation of its anchor, and that of its group.
  struct Place {
    int64_t anchor_position = -1;
    int64_t group_position = -1;
    Rotation anchor;
    Rotation group;
  };

  void move_to(int64_t position, Place& place) const {
    const int64_t anchor_position = position / kRopeAnchor * kRopeAnchor;
    const int64_t group_position = position / kRopeGroup * kRopeGroup;
    if (place.group_position == group_position) return;
    if (place.anchor_position != anchor_position) compute(anchor_position, place.anchor);
    place.anchor_position = anchor_position;
    place.group_position = group_position;
    const Rotation& group = group_[(group_position - anchor_position) / kRopeGroup];
    for (int64_t d = 0; d < half_; d += kLanes) {
      store(cos_of(place.anchor, group, d), place.group.cos + d);
      store(sin_of(place.anchor, group, d), place.group.sin + d);
    }
  }

  // Rotates x (D elements, any type) to `position`, where `place` has been moved to, into out, in float32.
  template <class T>
  HWY_INLINE void rotate(const T* x, int64_t position, const Place& place, float* out) const {
    const Rotation& token = token_[position % kRopeGroup];
    const T* x2 = x + half_;
    int64_t d = 0;
    for (; d + kLanes <= half_; d += kLanes) {
      const VF cos = cos_of(place.group, token, d), sin = sin_of(place.group, token, d);
      const VF a = load(x + d), b = load(x2 + d);
      store(hn::NegMulAdd(b, sin, hn::Mul(a, cos)), out + d);
      store(hn::MulAdd(a, sin, hn::Mul(b, cos)), out + half_ + d);
    }
    if (const int64_t n = half_ - d; n > 0) {
      const VF cos = cos_of(place.group, token, d), sin = sin_of(place.group, token, d);
      const VF a = load_n(x + d, n), b = load_n(x2 + d, n);
      store_n(hn::NegMulAdd(b, sin, hn::Mul(a, cos)), out + d, n);
      store_n(hn::MulAdd(a, sin, hn::Mul(b, cos)), out + half_ + d, n);
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
  int64_t half_;
  double frequency_[kRopeHalf];  // turns a token
  Rotation token_[kRopeGroup];
  Rotation group_[kRopeAnchor / kRopeGroup];
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_ROPE_INL_H_
