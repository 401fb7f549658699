// What both LoRA kernels share. Part of a translation unit that foreach_target.h includes once for each instruction
// set.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "src/cpu/bf16_dot-inl.h"
#include "src/cpu/lora_kernels.h"
#include "src/cpu/parallel.h"
#include "src/cpu/simd-inl.h"

#if defined(PUNICA_CPU_LORA_COMMON_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_LORA_COMMON_INL_H_
#undef PUNICA_CPU_LORA_COMMON_INL_H_
#else
#define PUNICA_CPU_LORA_COMMON_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

// More than 16 vector registers: larger tiles.
inline constexpr bool kManyRegisters = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON;

template <class T, bool kBf16Isa>
inline constexpr bool kNativeDot = kBf16Isa && std::is_same_v<T, bfloat16_t>;

inline constexpr int64_t kLineBytes = 64;

// Brings n elements at p into the cache.
template <class T>
HWY_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLineBytes / static_cast<int64_t>(sizeof(T))) hwy::Prefetch(p + i);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One step of a dot product: kStep elements of either side.
template <class T, bool kNative>
struct DotStep {
  static constexpr int64_t kStep = kLanes;
  using Operand = VF;

  static HWY_INLINE Operand load(const T* p) { return HWY_NAMESPACE::load(p); }
  // The first n < kStep elements, zeros behind them. Reads up to kStep elements if these lie before `end`.
  static HWY_INLINE Operand load_n(const T* p, int64_t n, const T* end) {
    // The mask also drops what would be NaN times zero.
    if (end - p >= kStep) return hn::IfThenElseZero(hn::FirstN(F32(), static_cast<size_t>(n)), load(p));
    return HWY_NAMESPACE::load_n(p, n);
  }
  static HWY_INLINE VF dot(VF sum, Operand a, Operand b) { return hn::MulAdd(a, b, sum); }
};

#if HWY_TARGET == HWY_AVX3
template <>
struct DotStep<bfloat16_t, true> {
  static constexpr int64_t kStep = 2 * kLanes;
  using Operand = VBF16;

  static HWY_INLINE Operand load(const bfloat16_t* p) { return load_bf16(p); }
  static HWY_INLINE Operand load_n(const bfloat16_t* p, int64_t n, const bfloat16_t*) {
    const hn::ScalableTag<uint16_t> bits;
    const auto first = hn::FirstN(bits, static_cast<size_t>(n));
    return hn::BitCast(hn::ScalableTag<bfloat16_t>(),
                       hn::MaskedLoad(first, bits, reinterpret_cast<const uint16_t*>(p)));
  }
  static HWY_INLINE VF dot(VF sum, Operand a, Operand b) { return dot_bf16(sum, a, b); }
};
#endif

using F32x4 = hn::FixedTag<float, 4>;
using V4 = hn::Vec<F32x4>;

// Sum of the 128-bit blocks of v, halves first.
template <class D>
HWY_INLINE V4 sum_blocks(D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return sum_blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// The sums of the lanes of four vectors. Each is added in the same order.
HWY_INLINE V4 reduce4(VF a, VF b, VF c, VF d) {
  const F32 f;
  const hn::Repartition<double, F32> wide;
  const VF ab = hn::Add(hn::InterleaveLower(f, a, b), hn::InterleaveUpper(f, a, b));
  const VF cd = hn::Add(hn::InterleaveLower(f, c, d), hn::InterleaveUpper(f, c, d));
  const auto low = hn::InterleaveLower(wide, hn::BitCast(wide, ab), hn::BitCast(wide, cd));
  const auto high = hn::InterleaveUpper(wide, hn::BitCast(wide, ab), hn::BitCast(wide, cd));
  return sum_blocks(f, hn::Add(hn::BitCast(f, low), hn::BitCast(f, high)));
}

// dst[i] = src[i] for i < n, and zeros up to the next multiple of kLanes.
template <class T>
HWY_INLINE void to_floats(const T* HWY_RESTRICT src, int64_t n, float* HWY_RESTRICT dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(load(src + i), dst + i);
  if (i < n) store(load_n(src + i, n - i), dst + i);
}

#if HWY_TARGET == HWY_AVX3
// The same without a conversion, up to the next multiple of 2 * kLanes.
HWY_INLINE void copy_padded(const bfloat16_t* HWY_RESTRICT src, int64_t n, bfloat16_t* HWY_RESTRICT dst) {
  using Step = DotStep<bfloat16_t, true>;
  const hn::ScalableTag<bfloat16_t> d;
  int64_t i = 0;
  for (; i + Step::kStep <= n; i += Step::kStep) hn::StoreU(Step::load(src + i), d, dst + i);
  if (i < n) hn::StoreU(Step::load_n(src + i, n - i, src + n), d, dst + i);
}
#endif

// The one rounding of a result. Where bfloat16 is native, subnormals become zero, as they do in its dot products.
template <bool kNative, class T>
HWY_INLINE void store_rounded(VF v, T* p) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    store_bf16(v, p);
    return;
  }
#endif
  store(v, p);
}

// y[i] = T(y[i] + scale * sums[i])
template <bool kNative, class T>
HWY_INLINE void accumulate_row(T* HWY_RESTRICT y, const float* HWY_RESTRICT sums, int64_t n, float scale) {
  const VF factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_rounded<kNative>(hn::MulAdd(load(sums + i), factor, load(y + i)), y + i);
  }
  if (i < n) {
    alignas(64) T last[kLanes];
    store_rounded<kNative>(hn::MulAdd(load_n(sums + i, n - i), factor, load_n(y + i, n - i)), last);
    std::memcpy(y + i, last, static_cast<size_t>(n - i) * sizeof(T));
  }
}

// One task of sgmv: rows [token, token + num_tokens) with segment `segment`, outputs [output, output + num_outputs).
struct SgmvTask {
  int64_t segment;
  int64_t token;
  int64_t num_tokens;
  int64_t output;
  int64_t num_outputs;
};

// Calls body(task) for all tasks of the call.
template <class Body>
void for_each_sgmv_task(const SgmvParams& params, const SgmvSplit& split, const Body& body) {
  const int64_t num_segments = params.w_ptr.shape[0], d_out = params.y.shape[1];
  const int64_t output_blocks = round_up(d_out, split.outputs_per_task) / split.outputs_per_task;
  const int64_t* first_block = split.first_block;
  parallel_for(split.num_threads, first_block[num_segments] * output_blocks, [&](int64_t index) {
    const int64_t block = index / output_blocks;
    const int64_t segment = std::upper_bound(first_block, first_block + num_segments + 1, block) - first_block - 1;
    const Segment rows = sgmv_segment(params, segment);
    SgmvTask task;
    task.segment = segment;
    task.token = rows.begin + (block - first_block[segment]) * split.tokens_per_task;
    task.num_tokens = std::min(split.tokens_per_task, rows.end - task.token);
    task.output = index % output_blocks * split.outputs_per_task;
    task.num_outputs = std::min(split.outputs_per_task, d_out - task.output);
    body(task);
  });
}

// Layer layer_idx of the weights at an address of a w_ptr table.
template <class T>
HWY_INLINE const T* layer_weights(const TensorView& w_ptr, int64_t index, int64_t layer_idx, int64_t layer_size) {
  return reinterpret_cast<const T*>(w_ptr.as<const int64_t>()[index]) + layer_idx * layer_size;
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_LORA_COMMON_INL_H_
