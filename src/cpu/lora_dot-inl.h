// LoRA of segments with weights whose rows run along the sum, W: [outputs, K] (sgmv_shrink): dot products of rows of x
// and rows of W, both dense along K.
//
// Every dot product is computed in the same way, whatever tile it is part of: K is cut into blocks of kDotBlock; within
// a block, lane i of one accumulator takes the elements i (or the pair i, where bfloat16 is native) of step after step,
// the last step filled up with zeros; the lanes are added in the order of reduce4(); the blocks are added in order.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "src/cpu/lora_common-inl.h"
#include "src/cpu/lora_outer-inl.h"

#if defined(PUNICA_CPU_LORA_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_LORA_DOT_INL_H_
#undef PUNICA_CPU_LORA_DOT_INL_H_
#else
#define PUNICA_CPU_LORA_DOT_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

// Elements of K that one accumulator takes before its lanes are added: bounds the rounding error, and lets the weights
// of a block stay in the L1 cache.
template <bool kNative>
inline constexpr int64_t kDotBlock = kNative ? 1024 : 512;

// Outputs that a chunk of sums holds.
inline constexpr int64_t kSumsChunk = kDotOutputsPerTask;

// sums[m * kSumsChunk + i] = dot product of x[m] and row `row + i` of w, for m < kTokens, i < n <= kSumsChunk; sums has
// room for n rounded up to 4. w is [num_rows, k], x[m] is [k].
template <class T, bool kNative, int64_t kTokens>
HWY_INLINE void dot_rows(const T* HWY_RESTRICT w, int64_t num_rows, int64_t k, int64_t row, int64_t n,
                         const T* const* x, float* HWY_RESTRICT sums) {
  using Step = DotStep<T, kNative>;
  const int64_t whole = k / Step::kStep * Step::kStep;
  const int64_t rest = k - whole;
  const T* w_end = w + num_rows * k;
  for (int64_t i = 0; i < n; i += 4) {
    // Rows behind the last are the last again: computed, never used.
    const T* row0 = w + (row + i) * k;
    const T* row1 = w + (row + std::min(i + 1, n - 1)) * k;
    const T* row2 = w + (row + std::min(i + 2, n - 1)) * k;
    const T* row3 = w + (row + std::min(i + 3, n - 1)) * k;
    V4 total[kTokens];
    for (V4& t : total) t = hn::Zero(F32x4());
    for (int64_t begin = 0; begin < k; begin += kDotBlock<kNative>) {
      VF sum[kTokens][4];
      for (auto& of_token : sum) {
        for (VF& s : of_token) s = zero();
      }
      const int64_t end = std::min(begin + kDotBlock<kNative>, whole);
      for (int64_t j = begin; j < end; j += Step::kStep) {
        // The next four rows, or what comes behind w: asking for it is harmless.
        for (const T* p : {row0, row1, row2, row3}) hwy::Prefetch(p + 4 * k + j);
        const auto w0 = Step::load(row0 + j), w1 = Step::load(row1 + j);
        const auto w2 = Step::load(row2 + j), w3 = Step::load(row3 + j);
        for (int64_t m = 0; m < kTokens; ++m) {
          const auto xm = Step::load(x[m] + j);
          sum[m][0] = Step::dot(sum[m][0], w0, xm);
          sum[m][1] = Step::dot(sum[m][1], w1, xm);
          sum[m][2] = Step::dot(sum[m][2], w2, xm);
          sum[m][3] = Step::dot(sum[m][3], w3, xm);
        }
      }
      if (rest > 0 && begin + kDotBlock<kNative> >= k) {
        const auto w0 = Step::load_n(row0 + whole, rest, w_end), w1 = Step::load_n(row1 + whole, rest, w_end);
        const auto w2 = Step::load_n(row2 + whole, rest, w_end), w3 = Step::load_n(row3 + whole, rest, w_end);
        for (int64_t m = 0; m < kTokens; ++m) {
          const auto xm = Step::load_n(x[m] + whole, rest, x[m] + k);
          sum[m][0] = Step::dot(sum[m][0], w0, xm);
          sum[m][1] = Step::dot(sum[m][1], w1, xm);
          sum[m][2] = Step::dot(sum[m][2], w2, xm);
          sum[m][3] = Step::dot(sum[m][3], w3, xm);
        }
      }
      for (int64_t m = 0; m < kTokens; ++m) {
        total[m] = hn::Add(total[m], reduce4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
      }
    }
    for (int64_t m = 0; m < kTokens; ++m) hn::StoreU(total[m], F32x4(), sums + m * kSumsChunk + i);
  }
}

// Tokens of a tile: its accumulators and operands fit the registers.
inline constexpr int64_t kDotTokens = kManyRegisters ? 4 : 2;

// sums[m * kSumsChunk + i] += dot product of x[m] and row i of w, for all m < kDotTokens, i < 4. w is [4, k], k a
// multiple of the step. Meanwhile k elements at each of next0, next1 are brought into the cache.
template <class T, class P, bool kNative>
HWY_INLINE void dot_tile(const P* const* x, const P* HWY_RESTRICT w, int64_t k, const T* next0, const T* next1,
                         float* HWY_RESTRICT sums) {
  using Step = DotStep<P, kNative>;
  VF sum[kDotTokens][4];
  for (auto& row : sum) {
    for (VF& s : row) s = zero();
  }
  for (int64_t j = 0; j < k; j += Step::kStep) {
    hwy::Prefetch(next0 + j);
    hwy::Prefetch(next1 + j);
    const auto w0 = Step::load(w + j), w1 = Step::load(w + k + j);
    const auto w2 = Step::load(w + 2 * k + j), w3 = Step::load(w + 3 * k + j);
    for (int64_t m = 0; m < kDotTokens; ++m) {
      const auto xm = Step::load(x[m] + j);
      sum[m][0] = Step::dot(sum[m][0], w0, xm);
      sum[m][1] = Step::dot(sum[m][1], w1, xm);
      sum[m][2] = Step::dot(sum[m][2], w2, xm);
      sum[m][3] = Step::dot(sum[m][3], w3, xm);
    }
  }
  const F32x4 d;
  for (int64_t m = 0; m < kDotTokens; ++m) {
    float* s = sums + m * kSumsChunk;
    hn::StoreU(hn::Add(hn::LoadU(d, s), reduce4(sum[m][0], sum[m][1], sum[m][2], sum[m][3])), d, s);
  }
}

// What the tiles read: elements as they are where bfloat16 is native, else float32, so that conversions happen once.
template <class T, bool kNative>
using Packed = std::conditional_t<kNative, T, float>;

// Copies n elements, filled up with zeros to a multiple of the step.
template <class T, bool kNative>
HWY_INLINE void pack_row(const T* HWY_RESTRICT src, int64_t n, Packed<T, kNative>* HWY_RESTRICT dst) {
  if constexpr (kNative) {
    copy_padded(src, n, dst);
  } else {
    to_floats(src, n, dst);
  }
}

// sums[t * kSumsChunk + i] = dot product of row_of(t) and row first + i of w, for t < num_tokens <= kMaxTokensPerTask
// and i < num_outputs <= kSumsChunk. w is [num_rows, d_in]; row_of(t) is [d_in]. sums has room for the tokens rounded
// up to kDotTokens.
template <class T, bool kNative, class RowOf>
HWY_INLINE void dot_sums(const T* HWY_RESTRICT w, int64_t num_rows, int64_t d_in, int64_t first, int64_t num_outputs,
                         int64_t num_tokens, const RowOf& row_of, float* HWY_RESTRICT sums) {
  using P = Packed<T, kNative>;
  constexpr int64_t kStep = DotStep<P, kNative>::kStep;
  constexpr int64_t kBlock = kDotBlock<kNative>;
  // Rows of W that are packed at a time: 32 KiB.
  constexpr int64_t kRows = 16;

  // Too few tokens to pay for packing: those that fit the registers share every load of W.
  if (num_tokens < 4) {
    for (int64_t t = 0; t < num_tokens;) {
      const int64_t left = num_tokens - t;
      const T* x[3];
      for (int64_t m = 0; m < left; ++m) x[m] = row_of(t + m);
      float* to = sums + t * kSumsChunk;
      if (kManyRegisters && left == 3) {
        dot_rows<T, kNative, 3>(w, num_rows, d_in, first, num_outputs, x, to);
        return;
      }
      if (left == 1) {
        dot_rows<T, kNative, 1>(w, num_rows, d_in, first, num_outputs, x, to);
        return;
      }
      dot_rows<T, kNative, 2>(w, num_rows, d_in, first, num_outputs, x, to);
      t += 2;
    }
    return;
  }

  alignas(64) P w_packed[kRows * kBlock];
  alignas(64) P x_packed[kDotTokens * kBlock];
  std::memset(sums, 0, static_cast<size_t>(round_up(num_tokens, kDotTokens) * kSumsChunk) * sizeof(float));
  for (int64_t begin = 0; begin < d_in; begin += kBlock) {
    const int64_t k = std::min(kBlock, d_in - begin);
    const int64_t k_padded = round_up(k, kStep);
    const bool pack_x = !std::is_same_v<T, P> || k != k_padded;
    for (int64_t i = 0; i < num_outputs; i += kRows) {
      const int64_t rows = std::min(kRows, num_outputs - i);
      for (int64_t r = 0; r < round_up(rows, 4); ++r) {
        const int64_t row = first + i + std::min(r, rows - 1);
        const T* p = w + row * d_in + begin;
        prefetch(p + d_in, k);
        pack_row<T, kNative>(p, k, w_packed + r * k_padded);
      }
      for (int64_t t = 0; t < num_tokens; t += kDotTokens) {
        const P* tile_x[kDotTokens];
        for (int64_t m = 0; m < kDotTokens; ++m) {
          const T* row = row_of(std::min(t + m, num_tokens - 1)) + begin;
          if (pack_x) {
            pack_row<T, kNative>(row, k, x_packed + m * k_padded);
            tile_x[m] = x_packed + m * k_padded;
          } else {
            tile_x[m] = reinterpret_cast<const P*>(row);
          }
        }
        // x comes from memory, in runs too short for the processor to guess the next one.
        const bool last_tile = t + kDotTokens >= num_tokens;
        const int64_t next_token = last_tile ? 0 : t + kDotTokens;
        const int64_t next_begin = last_tile ? std::min(begin + kBlock, d_in - 1) : begin;
        const int64_t per_tile = rows > 8 ? 1 : 2;
        for (int64_t r = 0; r < rows; r += 4) {
          const int64_t m = next_token + r / 4 * per_tile;
          const T* next0 = row_of(std::min(m, num_tokens - 1)) + next_begin;
          const T* next1 = row_of(std::min(m + per_tile - 1, num_tokens - 1)) + next_begin;
          dot_tile<T, P, kNative>(tile_x, w_packed + r * k_padded, k_padded, next0, next1,
                                  sums + t * kSumsChunk + i + r);
        }
      }
    }
  }
}

template <class T, bool kNative>
void sgmv_dot_task(const SgmvParams& params, const SgmvTask& task) {
  const int64_t d_out = params.y.shape[1], d_in = params.x.shape[1];
  const T* w = layer_weights<T>(params.w_ptr, task.segment, params.layer_idx, d_out * d_in);
  const int64_t x_stride = params.x.stride[0], y_stride = params.y.stride[0];
  const T* x = params.x.as<const T>() + task.token * x_stride;
  T* y = params.y.as<T>() + task.token * y_stride + task.output;
  alignas(64) float sums[kMaxTokensPerTask * kSumsChunk];
  const auto row_of = [x, x_stride](int64_t t) { return x + t * x_stride; };
  dot_sums<T, kNative>(w, d_out, d_in, task.output, task.num_outputs, task.num_tokens, row_of, sums);
  for (int64_t t = 0; t < task.num_tokens; ++t) {
    accumulate_row<kNative>(y + t * y_stride, sums + t * kSumsChunk, task.num_outputs, 1.0f);
  }
}

template <class T, bool kBf16Isa>
void sgmv_out_in(const SgmvParams& params, const SgmvSplit& split) {
  PUNICA_RECORD_ISA(kBf16Isa);
  const bool lanes_are_outputs = sgmv_lanes_are_outputs(params);
  for_each_sgmv_task(params, split, [&](const SgmvTask& task) {
    if (lanes_are_outputs) {
      sgmv_outer_task<T, kNativeDot<T, kBf16Isa>, true>(params, task);
    } else {
      sgmv_dot_task<T, kNativeDot<T, kBf16Isa>>(params, task);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_LORA_DOT_INL_H_
