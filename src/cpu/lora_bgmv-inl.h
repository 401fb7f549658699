// LoRA of single rows, W: [h_out, h_in] (dispatch_bgmv). What counts is how fast the weights, each used once, come from
// memory: they are read in the order in which they lie there.
#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "src/cpu/lora_common-inl.h"

#if defined(PUNICA_CPU_LORA_BGMV_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_LORA_BGMV_INL_H_
#undef PUNICA_CPU_LORA_BGMV_INL_H_
#else
#define PUNICA_CPU_LORA_BGMV_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

// The end of a task's weights, and the weights of a task that follows: where the stream of loads goes on. The
// processor's own prefetching follows a run of loads, if not too much work lies between them, but does not know the
// next adapter.
template <class T>
struct Stream {
  static constexpr int64_t kAhead = (16 << 10) / static_cast<int64_t>(sizeof(T));

  const T* end;
  const T* next;

  // Fetches n elements of what will be used kAhead after p.
  HWY_INLINE void fetch(const T* p, int64_t n) const {
    const int64_t left = end - p;
    prefetch(left > kAhead ? p + kAhead : next + (kAhead - left), n);
  }

  // The same, only if it is the next task's.
  HWY_INLINE void fetch_next(const T* p, int64_t n) const {
    const int64_t left = end - p;
    if (left <= kAhead) prefetch(next + (kAhead - left), n);
  }
};

// ---- Long rows -----------------------------------------------------------------------------------------------------

// The lanes' shares of the dot product of w and x, [k]. Steps go to four sums in turn, which hide the latency of
// adding; the last step is filled up with zeros. Loads may go on up to w_end.
template <class T, bool kNative>
HWY_INLINE VF long_dot(const T* HWY_RESTRICT w, const T* HWY_RESTRICT x, int64_t k, const T* w_end,
                       typename DotStep<T, kNative>::Operand x_rest, const Stream<T>& stream) {
  using Step = DotStep<T, kNative>;
  constexpr int64_t kStep = Step::kStep;
  VF sum0 = zero(), sum1 = zero(), sum2 = zero(), sum3 = zero();
  int64_t j = 0;
  for (; j + 4 * kStep <= k; j += 4 * kStep) {
    stream.fetch_next(w + j, 4 * kStep);
    sum0 = Step::dot(sum0, Step::load(w + j), Step::load(x + j));
    sum1 = Step::dot(sum1, Step::load(w + j + kStep), Step::load(x + j + kStep));
    sum2 = Step::dot(sum2, Step::load(w + j + 2 * kStep), Step::load(x + j + 2 * kStep));
    sum3 = Step::dot(sum3, Step::load(w + j + 3 * kStep), Step::load(x + j + 3 * kStep));
  }
  for (; j + kStep <= k; j += kStep) sum0 = Step::dot(sum0, Step::load(w + j), Step::load(x + j));
  if (j < k) sum1 = Step::dot(sum1, Step::load_n(w + j, k - j, w_end), x_rest);
  return hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
}

// y[i] += scale * (row i of w) . x, for i in [first, last).
template <class T, bool kNative>
HWY_INLINE void bgmv_long(const T* HWY_RESTRICT w, int64_t h_out, int64_t h_in, const T* HWY_RESTRICT x, float scale,
                          int64_t first, int64_t last, const Stream<T>& stream, T* HWY_RESTRICT y) {
  using Step = DotStep<T, kNative>;
  constexpr int64_t kChunk = 64;
  const T* w_end = w + h_out * h_in;
  const int64_t rest = h_in % Step::kStep;
  typename Step::Operand x_rest{};
  if (rest > 0) x_rest = Step::load_n(x + h_in - rest, rest, x + h_in);
  alignas(64) float sums[kChunk];
  for (int64_t i = first; i < last; i += kChunk) {
    const int64_t n = std::min(kChunk, last - i);
    for (int64_t r = 0; r < n; r += 4) {
      VF rows[4];
      for (int64_t q = 0; q < 4; ++q) {
        const int64_t row = i + r + q;
        rows[q] = row < last ? long_dot<T, kNative>(w + row * h_in, x, h_in, w_end, x_rest, stream) : zero();
      }
      hn::StoreU(reduce4(rows[0], rows[1], rows[2], rows[3]), F32x4(), sums + r);
    }
    accumulate_row<kNative>(y + i, sums, n, scale);
  }
}

// ---- Short rows ----------------------------------------------------------------------------------------------------
//
// Where a row takes 1, 2, 4, ... lanes (or whole vectors), the weights are one stream of full vectors, which hold
// several rows each. Neighbouring lanes are added, level by level, until kLanes rows fill one vector.

// Rows of weights and what they are multiplied with.
template <class T, bool kNative>
struct ShortRows {
  using Step = DotStep<T, kNative>;

  const T* w;
  const T* x;     // [steps * kStep]: x, repeated until it fills a vector
  int64_t steps;  // vectors of a row; 1 if a vector holds several rows
  typename Step::Operand x0;

  // Lane shares of the rows in the i-th vector (or vectors) of w.
  HWY_INLINE VF leaf(int64_t i) const {
    const T* p = w + i * steps * Step::kStep;
    VF sum = Step::dot(zero(), Step::load(p), x0);
    for (int64_t s = 1; s < steps; ++s)
      sum = Step::dot(sum, Step::load(p + s * Step::kStep), Step::load(x + s * Step::kStep));
    return sum;
  }

  // Leaves [first, first + kLeaves), added up until they fill one vector.
  template <int64_t kLeaves>
  HWY_INLINE VF tree(int64_t first) const {
    if constexpr (kLeaves == 1) {
      return leaf(first);
    } else {
      const VF low = tree<kLeaves / 2>(first), high = tree<kLeaves / 2>(first + kLeaves / 2);
      return hn::Add(hn::ConcatEven(F32(), high, low), hn::ConcatOdd(F32(), high, low));
    }
  }
};

// Elements of y from what is written to what is fetched meanwhile.
inline constexpr int64_t kAheadOutputs = 512;

// As bgmv_long; kLeaves vectors (times the steps) hold kLanes rows.
template <class T, bool kNative, int64_t kLeaves>
HWY_INLINE void bgmv_short(ShortRows<T, kNative> rows, int64_t h_in, float scale, int64_t first, int64_t last,
                           const Stream<T>& stream, T* HWY_RESTRICT y) {
  const VF factor = broadcast(scale);
  const T* w = rows.w;
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    rows.w = w + i * h_in;
    stream.fetch(rows.w, kLanes * h_in);
    hwy::Prefetch(y + i + kAheadOutputs);
    store_rounded<kNative>(hn::MulAdd(rows.template tree<kLeaves>(0), factor, load(y + i)), y + i);
  }
  if (i < last) {
    // Rows before these are computed again: h_out >= kLanes.
    const int64_t begin = last - kLanes;
    rows.w = w + begin * h_in;
    alignas(64) float sums[kLanes];
    store(rows.template tree<kLeaves>(0), sums);
    accumulate_row<kNative>(y + i, sums + (i - begin), last - i, scale);
  }
}

// Rows of at most this many vectors are short.
inline constexpr int64_t kMaxSteps = 8;

template <class T, bool kNative>
void run_bgmv(const BgmvParams& params, const BgmvSplit& split) {
  using Step = DotStep<T, kNative>;
  constexpr int64_t kStep = Step::kStep, kPair = kStep / kLanes;
  const int64_t h_out = params.y.shape[1], h_in = params.x.shape[1];
  // Lanes that a row takes, or 0 if rows are long.
  int64_t row_lanes = h_in % kPair == 0 ? h_in / kPair : 0;
  const bool is_power = (row_lanes & (row_lanes - 1)) == 0;
  if (h_out < kLanes || row_lanes > kMaxSteps * kLanes || !(is_power || row_lanes % kLanes == 0)) row_lanes = 0;
  const int64_t tasks_per_row = round_up(h_out, split.outputs_per_task) / split.outputs_per_task;
  const int64_t num_tasks = params.y.shape[0] * tasks_per_row;
  parallel_for(split.num_threads, num_tasks, [&](int64_t task) {
    const int64_t b = task / tasks_per_row;
    const int64_t index = params.indices.as<const int64_t>()[b];
    if (index < 0 || index >= params.w_ptr.shape[0]) return;
    const T* w = layer_weights<T>(params.w_ptr, index, params.layer_idx, h_out * h_in);
    const T* x = params.x.as<const T>() + b * params.x.stride[0];
    T* y = params.y.as<T>() + b * params.y.stride[0];
    const int64_t first = task % tasks_per_row * split.outputs_per_task;
    const int64_t last = std::min(first + split.outputs_per_task, h_out);
    const int64_t next_task = std::min(task + split.num_threads, num_tasks - 1);
    const int64_t next_index = params.indices.as<const int64_t>()[next_task / tasks_per_row];
    Stream<T> stream{w + last * h_in, w};
    if (next_index >= 0 && next_index < params.w_ptr.shape[0]) {
      stream.next = layer_weights<T>(params.w_ptr, next_index, params.layer_idx, h_out * h_in) +
                    next_task % tasks_per_row * split.outputs_per_task * h_in;
    }
    if (row_lanes == 0) {
      bgmv_long<T, kNative>(w, h_out, h_in, x, params.scale, first, last, stream, y);
      return;
    }
    alignas(64) T repeated[kStep];
    if (h_in < kStep) {
      for (int64_t i = 0; i < kStep; ++i) repeated[i] = x[i & (h_in - 1)];
      x = repeated;
    }
    const ShortRows<T, kNative> rows{w, x, std::max<int64_t>(1, h_in / kStep), Step::load(x)};
    switch (std::min(row_lanes, kLanes)) {
      case 1:
        return bgmv_short<T, kNative, 1>(rows, h_in, params.scale, first, last, stream, y);
      case 2:
        return bgmv_short<T, kNative, 2>(rows, h_in, params.scale, first, last, stream, y);
      case 4:
        return bgmv_short<T, kNative, 4>(rows, h_in, params.scale, first, last, stream, y);
      case 8:
        if constexpr (kLanes >= 8) return bgmv_short<T, kNative, 8>(rows, h_in, params.scale, first, last, stream, y);
        return;
      default:
        if constexpr (kLanes >= 16) return bgmv_short<T, kNative, 16>(rows, h_in, params.scale, first, last, stream, y);
        return;
    }
  });
}

template <class T, bool kBf16Isa>
void bgmv(const BgmvParams& params, const BgmvSplit& split) {
  PUNICA_RECORD_ISA(kBf16Isa);
  run_bgmv<T, kNativeDot<T, kBf16Isa>>(params, split);
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_LORA_BGMV_INL_H_
