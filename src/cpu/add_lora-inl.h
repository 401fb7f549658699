// The two products of add_lora: v = A x and y += scale * B v.
//
// The shrink is that of sgmv_shrink (lora_dot-inl.h): rows of A and of x run along the sum. Its result stays float32.
//
// In the expand lanes are outputs, as in lora_outer-inl.h: rows of B run along the sum and are short, so B is
// transposed in registers while it is packed. Every output is computed in the same way, whatever tile it is part of:
// the rank is cut into blocks of ExpandTile::kBlock; within a block one lane takes element after element; the blocks
// are added in order.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "src/cpu/add_lora_kernels.h"
#include "src/cpu/lora_dot-inl.h"
#include "src/cpu/lora_outer-inl.h"

#if defined(PUNICA_CPU_ADD_LORA_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_ADD_LORA_INL_H_
#undef PUNICA_CPU_ADD_LORA_INL_H_
#else
#define PUNICA_CPU_ADD_LORA_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

template <class T, bool kBf16Isa>
void add_lora_shrink(const AddLoraParams& params, const LoraTask& task) {
  PUNICA_RECORD_ISA(kBf16Isa);
  const LoraItem& item = *task.item;
  const int64_t x_stride = params.x.stride[0];
  const T* x = params.x.as<const T>();
  alignas(64) float sums[kLoraTokens * kSumsChunk];
  static_assert(kLoraTokens <= kMaxTokensPerTask && kShrinkRanks <= kSumsChunk);
  const auto row_of = [&item, x, x_stride](int64_t t) { return x + item.rows[t] * x_stride; };
  dot_sums<T, kNativeDot<T, kBf16Isa>>(static_cast<const T*>(item.a), item.rank, params.x.shape[1], task.first,
                                       task.count, item.num_tokens, row_of, sums);
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    std::memcpy(item.v + t * item.rank + task.first, sums + t * kSumsChunk,
                static_cast<size_t>(task.count) * sizeof(float));
  }
}

// v is float32, whatever T is.
template <int64_t kTokens>
using ExpandTile = OuterTile<false, kTokens, kManyRegisters ? 4 : 2>;

// rows[i], lane j becomes rows[j], lane i: log2(kLanes) rounds, each of which turns pairs of rows into their even and
// their odd lanes.
HWY_INLINE void transpose(VF* HWY_RESTRICT rows) {
  for (int64_t round = 1; round < kLanes; round *= 2) {
    VF turned[kLanes];
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      turned[i] = hn::ConcatEven(F32(), rows[2 * i + 1], rows[2 * i]);
      turned[i + kLanes / 2] = hn::ConcatOdd(F32(), rows[2 * i + 1], rows[2 * i]);
    }
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
}

// Packs columns [0, k) of the n rows of b, b_stride apart, for ExpandTile::run: [n / kOutputs, k, kOutputs], filled up
// with zeros.
template <class T>
HWY_INLINE void pack_expand(const T* HWY_RESTRICT b, int64_t b_stride, int64_t k, int64_t n,
                            float* HWY_RESTRICT packed) {
  constexpr int64_t kOutputs = ExpandTile<1>::kOutputs;
  for (int64_t i = 0; i < round_up(n, kOutputs); i += kLanes) {
    float* to = packed + i / kOutputs * k * kOutputs + i % kOutputs;
    for (int64_t j = 0; j < k; j += kLanes) {
      const int64_t columns = std::min(kLanes, k - j);
      VF rows[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        rows[r] = i + r < n ? load_some(b + (i + r) * b_stride + j, columns) : zero();
      }
      transpose(rows);
      for (int64_t c = 0; c < columns; ++c) store(rows[c], to + (j + c) * kOutputs);
    }
  }
}

// Tokens [token, token + kTokens) of the item; those behind the last are the last again: computed, never used.
template <int64_t kTokens>
HWY_INLINE void expand_tile(const LoraItem& item, int64_t token, int64_t begin, int64_t k, const float* packed,
                            float* HWY_RESTRICT sums, int64_t sums_stride) {
  const float* v[kTokens];
  for (int64_t m = 0; m < kTokens; ++m) {
    v[m] = item.v + std::min(token + m, item.num_tokens - 1) * item.rank + begin;
  }
  ExpandTile<kTokens>::run(v, packed, k, v, sums, sums_stride, begin > 0);
}

template <class T, bool kBf16Isa>
void add_lora_expand(const AddLoraParams& params, const LoraTask& task) {
  PUNICA_RECORD_ISA(kBf16Isa);
  constexpr bool kNative = kNativeDot<T, kBf16Isa>;
  constexpr int64_t kOutputs = ExpandTile<4>::kOutputs, kBlock = ExpandTile<4>::kBlock;
  static_assert(ExpandTile<1>::kOutputs == kOutputs && ExpandTile<1>::kBlock == kBlock);
  const LoraItem& item = *task.item;
  const T* b = static_cast<const T*>(item.b);
  T* y = params.y.as<T>() + item.column;
  const int64_t y_stride = params.y.stride[0], rank = item.rank;

  alignas(64) float packed[kBlock * kOutputs];
  alignas(64) float sums[std::max(kLoraTokens * kOutputs, 4 * kExpandOutputs)];
  // With one block of the rank a panel of several tiles fits, and the sums of each row of tiles are complete at once.
  const bool one_block = rank <= kBlock;
  const int64_t panel = one_block ? std::min(kExpandOutputs, kBlock / rank * kOutputs) : kOutputs;
  const int64_t sums_stride = one_block ? kExpandOutputs : kOutputs;
  const int64_t end = task.first + task.count;

  for (int64_t i = task.first; i < end; i += panel) {
    const int64_t n = std::min(panel, end - i);
    for (int64_t begin = 0; begin < rank; begin += kBlock) {
      const int64_t k = std::min(kBlock, rank - begin);
      const bool complete = begin + k == rank;
      pack_expand(b + i * item.b_row_stride + begin, item.b_row_stride, k, n, packed);
      for (int64_t t = 0; t < item.num_tokens; t += 4) {
        const int64_t tokens = std::min<int64_t>(4, item.num_tokens - t);
        float* tile_sums = sums + (one_block ? 0 : t * sums_stride);
        for (int64_t c = 0; c < n; c += kOutputs) {
          if (one_block) {
            for (int64_t m = 4; m < std::min<int64_t>(8, item.num_tokens - t); ++m) {
              prefetch(y + item.rows[t + m] * y_stride + i + c, std::min(kOutputs, n - c));
            }
          }
          if (tokens == 1) {
            expand_tile<1>(item, t, begin, k, packed + c * k, tile_sums + c, sums_stride);
          } else {
            expand_tile<4>(item, t, begin, k, packed + c * k, tile_sums + c, sums_stride);
          }
        }
        if (!complete) continue;
        for (int64_t m = 0; m < tokens; ++m) {
          accumulate_row<kNative>(y + item.rows[t + m] * y_stride + i, tile_sums + m * sums_stride, n, item.scale);
        }
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_ADD_LORA_INL_H_
