// The inner loops of attention: scores of a block of keys, its softmax, the weighted sum of its values. Included by
// attention_kernels.cc once for each instruction set, after simd-inl.h and bf16_dot-inl.h.
#include <algorithm>

#include "src/cpu/attention_kernels.h"

#if defined(PUNICA_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_ATTENTION_INL_H_
#undef PUNICA_CPU_ATTENTION_INL_H_
#else
#define PUNICA_CPU_ATTENTION_INL_H_
#endif

#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {
namespace {

inline constexpr int64_t kPair = 2 * kLanes;

// Rows that share the loads of keys and values: what the registers hold, 32 of them with AVX-512 and NEON, else 16.
inline constexpr int kRowTile = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 4 : 2;

// ---- Pairs of vectors: kPair elements, in an order of lanes that is the type's own, the same for load and store.

template <class T>
HWY_INLINE void load_pair(const T* p, VF& a, VF& b) {
  a = load(p);
  b = load(p + kLanes);
}
// The even elements and the odd ones: cheaper than widening.
HWY_INLINE void load_pair(const bfloat16_t* p, VF& a, VF& b) {
  const U32 u;
  const auto bits = hn::BitCast(u, hn::LoadU(hn::ScalableTag<uint16_t>(), reinterpret_cast<const uint16_t*>(p)));
  a = hn::BitCast(F32(), hn::ShiftLeft<16>(bits));
  b = hn::BitCast(F32(), hn::And(bits, hn::Set(u, 0xFFFF0000u)));
}

template <class T>
HWY_INLINE void store_pair(VF a, VF b, T* p) {
  store(a, p);
  store(b, p + kLanes);
}
HWY_INLINE void store_pair(VF a, VF b, bfloat16_t* p) {
  alignas(64) bfloat16_t even[kLanes], odd[kLanes];
  store(a, even);
  store(b, odd);
  for (int64_t i = 0; i < kLanes; ++i) {
    p[2 * i] = even[i];
    p[2 * i + 1] = odd[i];
  }
}

// ---- Scores: dot products of queries and keys.

// Four vectors become one: in each 128-bit block, lane i is the sum of that block of vector i.
HWY_INLINE VF sum_blocks(VF v0, VF v1, VF v2, VF v3) {
  const F32 d;
  const hn::Repartition<uint64_t, F32> d64;
  const auto t0 = hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1)));
  const auto t1 = hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3)));
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, t0, t1)), hn::BitCast(d, hn::InterleaveUpper(d64, t0, t1)));
}

// Sums over the blocks of each vector; block i of the result is that of vector i.
HWY_INLINE VF sum_across_blocks(const float* v) {
  const F32 d;
#if HWY_MAX_BYTES == 16
  return hn::Load(d, v);
#else
  const VF v0 = hn::Load(d, v), v1 = hn::Load(d, v + kLanes);
#if HWY_MAX_BYTES == 32
  return hn::Add(hn::ConcatLowerLower(d, v1, v0), hn::ConcatUpperUpper(d, v1, v0));
#else
  const VF v2 = hn::Load(d, v + 2 * kLanes), v3 = hn::Load(d, v + 3 * kLanes);
  const VF even = hn::Add(hn::ConcatLowerLower(d, v2, v0), hn::ConcatUpperUpper(d, v2, v0));
  const VF odd = hn::Add(hn::ConcatLowerLower(d, v3, v1), hn::ConcatUpperUpper(d, v3, v1));
  return hn::Add(hn::OddEvenBlocks(odd, even), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(even, odd)));
#endif
#endif
}

// Pages lie anywhere, so the hardware cannot know which row comes next: rows are asked for in the order of their use,
// which is the keys of a block of one head, its values, then the next head's, after the last head the next block's. A
// core drops a prefetch when too many of its loads wait for memory already (measured on Zen 5: of 64 cache lines asked
// for in a row none arrived, of 8 all). Hence they are spread over the steps of a block by the time that each takes,
// and every row is asked for three times, first kBytesAhead before its use, for what was dropped.
inline constexpr int64_t kBytesAhead = 24 << 10;
inline constexpr int64_t kTimesAsked = 3;
inline constexpr int64_t kMaxRowsAhead = 2 * kBlockTokens;
// Rows asked for while a block's keys are read; the softmax asks for the others of kBlockTokens, the values for as
// many.
inline constexpr int64_t kAheadInScores = 48;
inline constexpr int64_t kAheadInSoftmax = kBlockTokens - kAheadInScores;
inline constexpr int64_t kLineBytes = 64;

// Rows in use; those to ask for are kTimesAsked multiples of `step` behind them. Null if there is nothing to ask for.
template <class T>
struct RowsAhead {
  const T* const* rows = nullptr;
  int64_t step = 0;

  explicit operator bool() const { return rows != nullptr; }
  // Asks for all `dim` elements of what comes after row i.
  HWY_INLINE void ask(int64_t i, int64_t dim) const {
    for (int64_t d = 0; d < dim; d += kLine) ask_for_line(i, d);
  }
  // Asks for kCount elements from element d on. Where that is less than a cache line, the step that begins one asks.
  template <int64_t kCount>
  HWY_INLINE void ask_part(int64_t i, int64_t d) const {
    if (kCount < kLine && d % kLine != 0) return;
    for (int64_t e = 0; e < kCount; e += kLine) ask_for_line(i, d + e);
  }

 private:
  static constexpr int64_t kLine = kLineBytes / int64_t{sizeof(T)};
  HWY_INLINE void ask_for_line(int64_t i, int64_t d) const {
    for (int64_t k = kTimesAsked; k > 0; --k) __builtin_prefetch(rows[i + k * step] + d, 0, 3);
  }
};

// scores[m * kBlockTokens + j] = q[m] . keys[j] for kRows rows of q (q_stride apart) and the keys [begin, end) of the
// block, widened to whole vectors of keys. Rows are padded to a multiple of kPair with zeros. KT is the type of the
// keys; q is float32 in load_pair's order of KT, or bfloat16 where kNative. Asks for the first kAheadInScores rows of
// `ahead` if there is one.
template <class KT, bool kNative, int kRows>
HWY_NOINLINE void score_block(const void* q, int64_t q_stride, const KT* const* keys, int64_t padded_dim, int64_t begin,
                              int64_t end, RowsAhead<KT> ahead, float* scores) {
  alignas(64) float partial[kRows][kLanes / 4][kLanes];
  for (int64_t group = begin / kLanes * kLanes; group < end; group += kLanes) {
    HWY_UNROLL(1)
    for (int64_t j = 0; j < kLanes / 4; ++j) {
      const KT* const* k = keys + group + 4 * j;
      const KT *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
      VF sum[kRows][4];
      for (int m = 0; m < kRows; ++m) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = zero();
      HWY_UNROLL(1)
      for (int64_t d = 0; d < padded_dim; d += kPair) {
        if (ahead) {
          constexpr int64_t kShare = kAheadInScores / (kBlockTokens / 4);
          for (int64_t i = 0; i < kShare; ++i) ahead.template ask_part<kPair>((group / 4 + j) * kShare + i, d);
        }
        if constexpr (kNative) {
#if HWY_TARGET == HWY_AVX3
          const auto x0 = load_bf16(k0 + d), x1 = load_bf16(k1 + d), x2 = load_bf16(k2 + d), x3 = load_bf16(k3 + d);
          for (int m = 0; m < kRows; ++m) {
            const auto y = load_bf16(static_cast<const bfloat16_t*>(q) + m * q_stride + d);
            sum[m][0] = dot_bf16(sum[m][0], x0, y);
            sum[m][1] = dot_bf16(sum[m][1], x1, y);
            sum[m][2] = dot_bf16(sum[m][2], x2, y);
            sum[m][3] = dot_bf16(sum[m][3], x3, y);
          }
#endif
        } else {
          const float* y = static_cast<const float*>(q) + d;
          VF a, b;
          load_pair(k0 + d, a, b);
          for (int m = 0; m < kRows; ++m) {
            sum[m][0] = hn::MulAdd(a, load(y + m * q_stride), sum[m][0]);
            sum[m][0] = hn::MulAdd(b, load(y + m * q_stride + kLanes), sum[m][0]);
          }
          load_pair(k1 + d, a, b);
          for (int m = 0; m < kRows; ++m) {
            sum[m][1] = hn::MulAdd(a, load(y + m * q_stride), sum[m][1]);
            sum[m][1] = hn::MulAdd(b, load(y + m * q_stride + kLanes), sum[m][1]);
          }
          load_pair(k2 + d, a, b);
          for (int m = 0; m < kRows; ++m) {
            sum[m][2] = hn::MulAdd(a, load(y + m * q_stride), sum[m][2]);
            sum[m][2] = hn::MulAdd(b, load(y + m * q_stride + kLanes), sum[m][2]);
          }
          load_pair(k3 + d, a, b);
          for (int m = 0; m < kRows; ++m) {
            sum[m][3] = hn::MulAdd(a, load(y + m * q_stride), sum[m][3]);
            sum[m][3] = hn::MulAdd(b, load(y + m * q_stride + kLanes), sum[m][3]);
          }
        }
      }
      for (int m = 0; m < kRows; ++m) {
        hn::Store(sum_blocks(sum[m][0], sum[m][1], sum[m][2], sum[m][3]), F32(), partial[m][j]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      hn::Store(sum_across_blocks(partial[m][0]), F32(), scores + m * kBlockTokens + group);
    }
  }
}

// ---- Softmax.

// 2^x for x <= 0, zero below -126 (where float32 ends); NaN stays NaN. 2^f - 1 = f * polynomial(f) on [-0.5, 0.5] has
// a relative error of 1.6e-8 (least squares reweighted to the minimax solution), so rounding decides: 2 ulp.
HWY_INLINE VF exp2_negative(VF x) {
  const F32 d;
  const hn::RebindToSigned<F32> i;
  const VF n = hn::Round(x);
  const VF f = hn::Sub(x, n);
  VF p = hn::Set(d, 0x1.41fbbcp-13f);
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.5f3e52p-10f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2d4cp-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aee8p-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbdcp-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e43p-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(i, n), hn::Set(i, 127))));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, power));
}

constexpr float kMinusInfinity = -__builtin_huge_valf();

// From q . k to the exponent of 2 in the softmax.
struct ScoreMap {
  float scale;      // without a cap: sm_scale / ln 2; with one: sm_scale / cap
  float cap = 0.0;  // the cap / ln 2, or 0
};

// The state of the online softmax of one row: sum_j 2^(s_j - max) v_j in sum, and without v in denominator. -inf and
// zeros before the first key.
struct SoftmaxRow {
  float max;
  float denominator;
  float* sum;
};

// What a maximum subtracts: all scores may be -inf, and -inf - -inf is not a number.
HWY_INLINE VF finite_or_zero(VF max) { return hn::IfThenZeroElse(hn::Eq(max, broadcast(kMinusInfinity)), max); }

// Takes a block of keys into kRows rows, of which row m sees the keys seen[m]: scores (q . k) become weights
// 2^(score - max), zero for unseen keys in the same vectors, and decay[m] what the row's sum has yet to be multiplied
// by. The rows are taken through every step together, because each step alone waits for its latency; nothing depends on
// a branch, because whether a maximum moves cannot be predicted. A row that sees nothing gets a decay that changes
// nothing. Only its own keys decide a row's bits.
template <int kRows, class T>
HWY_NOINLINE void softmax_block(float* scores, const KeyRange* seen, const ScoreMap& map, SoftmaxRow* row, float* decay,
                                RowsAhead<T> ahead, int64_t dim) {
  int64_t asked = ahead ? 0 : kAheadInSoftmax;
  const F32 d;
  const VF minus_infinity = hn::Set(d, kMinusInfinity);
  VF max[kRows], old_max[kRows], total[kRows];
  for (int m = 0; m < kRows; ++m) {
    max[m] = minus_infinity;
    for (int64_t j = seen[m].begin / kLanes * kLanes; j < seen[m].end; j += kLanes) {
      float* at = scores + m * kBlockTokens + j;
      VF s = hn::Mul(load(at), hn::Set(d, map.scale));
      if (map.cap > 0) s = hn::Mul(hn::Tanh(d, s), hn::Set(d, map.cap));
      const auto before_end = hn::FirstN(d, static_cast<size_t>(seen[m].end - j));
      const auto before_begin = hn::FirstN(d, static_cast<size_t>(std::max<int64_t>(seen[m].begin - j, 0)));
      s = hn::IfThenElse(before_begin, minus_infinity, hn::IfThenElse(before_end, s, minus_infinity));
      store(s, at);
      max[m] = hn::Max(max[m], s);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    old_max[m] = broadcast(row[m].max);
    const VF block_max = hn::MaxOfLanes(d, max[m]);
    const VF new_max = hn::IfThenElse(hn::Gt(block_max, old_max[m]), block_max, old_max[m]);
    row[m].max = hn::GetLane(new_max);
    max[m] = finite_or_zero(new_max);
  }
  for (int m = 0; m < kRows; ++m) {
    total[m] = zero();
    for (int64_t j = seen[m].begin / kLanes * kLanes; j < seen[m].end; j += kLanes) {
      constexpr int64_t kVectors = kRows * kBlockTokens / kLanes;
      constexpr int64_t kShare = (kAheadInSoftmax + kVectors - 1) / kVectors;
      for (int64_t i = 0; i < kShare && asked < kAheadInSoftmax; ++i) ahead.ask(asked++, dim);
      float* at = scores + m * kBlockTokens + j;
      const VF p = exp2_negative(hn::Sub(load(at), max[m]));
      store(p, at);
      total[m] = hn::Add(total[m], p);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const VF factor = exp2_negative(hn::Sub(old_max[m], max[m]));
    decay[m] = hn::GetLane(factor);
    row[m].denominator = hn::GetLane(hn::MulAdd(broadcast(row[m].denominator), factor, hn::SumOfLanes(d, total[m])));
  }
}

// Adds the partial result of later keys. One that saw nothing changes no bit.
HWY_NOINLINE void merge_rows(SoftmaxRow& row, const SoftmaxRow& later, int64_t padded_dim) {
  if (later.denominator == 0.0f) return;
  if (row.denominator == 0.0f) {
    row.max = later.max;
    row.denominator = later.denominator;
    for (int64_t e = 0; e < padded_dim; e += kLanes) store(load(later.sum + e), row.sum + e);
    return;
  }
  const float max = later.max > row.max ? later.max : row.max;
  const VF row_decay = exp2_negative(hn::Sub(broadcast(row.max), finite_or_zero(broadcast(max))));
  const VF later_decay = exp2_negative(hn::Sub(broadcast(later.max), finite_or_zero(broadcast(max))));
  row.max = max;
  row.denominator = hn::GetLane(
      hn::MulAdd(broadcast(later.denominator), later_decay, hn::Mul(broadcast(row.denominator), row_decay)));
  for (int64_t e = 0; e < padded_dim; e += kLanes) {
    store(hn::MulAdd(load(later.sum + e), later_decay, hn::Mul(load(row.sum + e), row_decay)), row.sum + e);
  }
}

// ---- Values.

HWY_INLINE void scale_sum(float factor, int64_t padded_dim, float* sum) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) store(hn::Mul(load(sum + d), broadcast(factor)), sum + d);
}

// sums[m] = decay[m] * sums[m] + sum_j weights[m * kBlockTokens + j] * values[j] over the keys [begin, end) in
// ascending order, for kPairs pairs of vectors from element d on. Asks for a row of [ahead, ahead_end) every `period`
// keys.
template <class T, int kRows, int kPairs>
HWY_INLINE void add_values_slab(const float* decay, const float* weights, const T* const* values, int64_t d,
                                int64_t begin, int64_t end, RowsAhead<T> ahead, float* sums, int64_t sum_stride) {
  VF sum[kRows][2 * kPairs];
  for (int m = 0; m < kRows; ++m) {
    const VF factor = broadcast(decay[m]);
    for (int i = 0; i < 2 * kPairs; ++i) sum[m][i] = hn::Mul(load(sums + m * sum_stride + d + i * kLanes), factor);
  }
  for (int64_t j = begin; j < end; ++j) {
    const T* v = values[j] + d;
    if (ahead) ahead.template ask_part<kPairs * kPair>(j, d);
    VF w[kRows];
    for (int m = 0; m < kRows; ++m) w[m] = broadcast(weights[m * kBlockTokens + j]);
    for (int i = 0; i < kPairs; ++i) {
      VF a, b;
      load_pair(v + i * kPair, a, b);
      for (int m = 0; m < kRows; ++m) {
        sum[m][2 * i] = hn::MulAdd(w[m], a, sum[m][2 * i]);
        sum[m][2 * i + 1] = hn::MulAdd(w[m], b, sum[m][2 * i + 1]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < 2 * kPairs; ++i) store(sum[m][i], sums + m * sum_stride + d + i * kLanes);
  }
}

// The same for all elements, in slabs: enough sums in flight to hide the latency of a multiply-add, few enough for the
// registers. Asks for kBlockTokens rows of `ahead` over a whole block.
template <class T, int kRows>
HWY_NOINLINE void add_values(const float* decay, const float* weights, const T* const* values, int64_t padded_dim,
                             int64_t begin, int64_t end, RowsAhead<T> ahead, float* sums, int64_t sum_stride) {
  if (begin >= end) return;
  constexpr int kPairs = kRows == 1 ? 4 : 2;
  int64_t d = 0;
  for (; d + kPairs * kPair <= padded_dim; d += kPairs * kPair) {
    add_values_slab<T, kRows, kPairs>(decay, weights, values, d, begin, end, ahead, sums, sum_stride);
  }
  if (kRows == 1 && d + 2 * kPair <= padded_dim) {
    add_values_slab<T, kRows, 2>(decay, weights, values, d, begin, end, ahead, sums, sum_stride);
    d += 2 * kPair;
  }
  if (d < padded_dim) {
    add_values_slab<T, kRows, 1>(decay, weights, values, d, begin, end, ahead, sums, sum_stride);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_ATTENTION_INL_H_
