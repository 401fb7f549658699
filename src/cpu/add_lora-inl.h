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
#include <type_traits>

#include "hwy/highway.h"
#include "src/cpu/add_lora_kernels.h"
#include "src/cpu/lora_dot-inl.h"
#include "src/cpu/lora_outer-inl.h"
#include "src/cpu/parallel.h"

#if defined(PUNICA_CPU_ADD_LORA_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_ADD_LORA_INL_H_
#undef PUNICA_CPU_ADD_LORA_INL_H_
#else
#define PUNICA_CPU_ADD_LORA_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

template <class T, bool kNative>
void shrink_task(const AddLoraParams& params, const LoraTask& task) {
  const LoraItem& item = *task.item;
  const int64_t x_stride = params.x.stride[0];
  const T* x = params.x.as<const T>();
  alignas(64) float sums[kLoraTokens * kSumsChunk];
  static_assert(kLoraTokens <= kMaxTokensPerTask && kShrinkRanks <= kSumsChunk);
  const auto row_of = [&item, x, x_stride](int64_t t) { return x + item.rows[t] * x_stride; };
  dot_sums<T, kNative>(static_cast<const T*>(item.a), item.rank, params.x.shape[1], task.first, task.count,
                       item.num_tokens, row_of, sums);
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    std::memcpy(item.v + t * item.rank + task.first, sums + t * kSumsChunk,
                static_cast<size_t>(task.count) * sizeof(float));
  }
}

// v is float32, whatever T is.
template <int64_t kTokens>
using ExpandTile = OuterTile<false, kTokens, kManyRegisters ? 4 : 2>;

// Turns pairs of vectors into their even and their odd lanes, log2(kCount) times. Seen as a table of kCount * kLanes
// entries, this exchanges the bits of a vector's number with the lowest bits of the lane's.
template <int64_t kCount, class D, class V>
HWY_INLINE void unzip(D d, V* HWY_RESTRICT v) {
  for (int64_t round = 1; round < kCount; round *= 2) {
    V turned[kCount];
    for (int64_t i = 0; i < kCount / 2; ++i) {
      turned[i] = hn::ConcatEven(d, v[2 * i + 1], v[2 * i]);
      turned[i + kCount / 2] = hn::ConcatOdd(d, v[2 * i + 1], v[2 * i]);
    }
    for (int64_t i = 0; i < kCount; ++i) v[i] = turned[i];
  }
}

// Elements of 16 bits are moved in pairs, which halves the work: these are the halves of the pairs.
using VU = hn::Vec<U32>;
template <class T>
HWY_INLINE VF low_halves(VU pairs) {
  if constexpr (std::is_same_v<T, bfloat16_t>) return hn::BitCast(F32(), hn::ShiftLeft<16>(pairs));
  const hn::Rebind<uint16_t, F32> narrow;
  alignas(64) uint16_t bits[kLanes];
  const auto low = hn::BitCast(hn::RebindToSigned<U32>(), hn::And(pairs, hn::Set(U32(), 0xFFFFu)));
  hn::StoreU(hn::DemoteTo(narrow, low), narrow, bits);
  return load(reinterpret_cast<const T*>(bits));
}
template <class T>
HWY_INLINE VF high_halves(VU pairs) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return hn::BitCast(F32(), hn::And(pairs, hn::Set(U32(), 0xFFFF0000u)));
  } else {
    return low_halves<T>(hn::ShiftRight<16>(pairs));
  }
}

// use(j, column j of kLanes rows of b) for j = 0, 1, ... 2 * kPairs - 1. Rows lie b_stride apart; where kPairs is less
// than kLanes they are dense, 2 * kPairs elements each.
template <int64_t kPairs, class T, class Use>
HWY_INLINE void pair_columns(const T* HWY_RESTRICT b, int64_t b_stride, const Use& use) {
  VU v[kPairs];
  for (int64_t i = 0; i < kPairs; ++i) {
    v[i] = hn::LoadU(U32(), reinterpret_cast<const uint32_t*>(b + i * (kPairs == kLanes ? b_stride : 2 * kLanes)));
  }
  unzip<kPairs>(U32(), v);
  for (int64_t i = 0; i < kPairs; ++i) {
    use(2 * i, low_halves<T>(v[i]));
    use(2 * i + 1, high_halves<T>(v[i]));
  }
}

// use(j, column j as float32, a row a lane) for j = 0, 1, ... k - 1, for `rows` <= kLanes rows of b; the others are
// zeros.
template <class T, class Use>
HWY_INLINE void for_columns(const T* HWY_RESTRICT b, int64_t b_stride, int64_t k, int64_t rows, const Use& use) {
  if constexpr (sizeof(T) == 2) {
    if (rows == kLanes && k == b_stride) {
      switch (k) {
        case 4:
          if constexpr (kLanes > 2) return pair_columns<2>(b, b_stride, use);
          break;
        case 8:
          if constexpr (kLanes > 4) return pair_columns<4>(b, b_stride, use);
          break;
        case 16:
          if constexpr (kLanes > 8) return pair_columns<8>(b, b_stride, use);
          break;
        default:
          break;
      }
    }
    if (rows == kLanes && k % (2 * kLanes) == 0) {
      for (int64_t j = 0; j < k; j += 2 * kLanes) {
        pair_columns<kLanes>(b + j, b_stride, [&](int64_t c, VF column) HWY_ATTR { use(j + c, column); });
      }
      return;
    }
  }
  for (int64_t j = 0; j < k; j += kLanes) {
    const int64_t columns = std::min(kLanes, k - j);
    VF v[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) v[r] = r < rows ? load_some(b + r * b_stride + j, columns) : zero();
    unzip<kLanes>(F32(), v);
    for (int64_t c = 0; c < columns; ++c) use(j + c, v[c]);
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
    if (i >= n) {
      for (int64_t j = 0; j < k; ++j) store(zero(), to + j * kOutputs);
      continue;
    }
    for_columns(b + i * b_stride, b_stride, k, std::min(kLanes, n - i),
                [to](int64_t j, VF column) HWY_ATTR { store(column, to + j * kOutputs); });
  }
}

// sums[m * kExpandOutputs + i] = row i of b . v[m] for m < kTokens, i < n; b is [n, rank] with rows b_stride apart, and
// each row of sums has room for n rounded up to kLanes. What ExpandTile computes, without packing: each column of B is
// used once, by all tokens.
template <class T, int64_t kTokens>
HWY_INLINE void expand_rows(const T* HWY_RESTRICT b, int64_t b_stride, int64_t rank, int64_t n, const float* const* v,
                            float* HWY_RESTRICT sums) {
  constexpr int64_t kBlock = ExpandTile<1>::kBlock;
  constexpr int64_t kAhead = (4 << 10) / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += kLanes) {
    VF total[kTokens];
    prefetch(b + i * b_stride + kAhead, kLanes * b_stride);
    for (int64_t begin = 0; begin < rank; begin += kBlock) {
      VF sum[kTokens];
      for (VF& s : sum) s = zero();
      for_columns(b + i * b_stride + begin, b_stride, std::min(kBlock, rank - begin), std::min(kLanes, n - i),
                  [&](int64_t j, VF column) HWY_ATTR {
                    for (int64_t m = 0; m < kTokens; ++m) {
                      sum[m] = ExpandTile<1>::Step::dot(sum[m], column, broadcast(v[m][begin + j]));
                    }
                  });
      for (int64_t m = 0; m < kTokens; ++m) total[m] = begin == 0 ? sum[m] : hn::Add(total[m], sum[m]);
    }
    for (int64_t m = 0; m < kTokens; ++m) store(total[m], sums + m * kExpandOutputs + i);
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

template <class T, bool kNative>
void expand_task(const AddLoraParams& params, const LoraTask& task) {
  constexpr int64_t kOutputs = ExpandTile<4>::kOutputs, kBlock = ExpandTile<4>::kBlock;
  static_assert(ExpandTile<1>::kOutputs == kOutputs && ExpandTile<1>::kBlock == kBlock);
  const LoraItem& item = *task.item;
  const T* b = static_cast<const T*>(item.b);
  T* y = params.y.as<T>() + item.column;
  const int64_t y_stride = params.y.stride[0], rank = item.rank;

  alignas(64) float packed[kBlock * kOutputs];
  alignas(64) float sums[std::max(kLoraTokens * kOutputs, 4 * kExpandOutputs)];
  const int64_t end = task.first + task.count;

  if (item.num_tokens <= 4) {  // too few to pay for packing
    const float* v[4];
    for (int64_t m = 0; m < 4; ++m) v[m] = item.v + std::min(m, item.num_tokens - 1) * rank;
    for (int64_t i = task.first; i < end; i += kExpandOutputs) {
      const int64_t n = std::min(kExpandOutputs, end - i);
      const T* rows = b + i * item.b_row_stride;
      switch (item.num_tokens) {
        case 1:
          expand_rows<T, 1>(rows, item.b_row_stride, rank, n, v, sums);
          break;
        case 2:
          expand_rows<T, 2>(rows, item.b_row_stride, rank, n, v, sums);
          break;
        default:
          expand_rows<T, 4>(rows, item.b_row_stride, rank, n, v, sums);
          break;
      }
      for (int64_t m = 0; m < item.num_tokens; ++m) {
        accumulate_row<kNative>(y + item.rows[m] * y_stride + i, sums + m * kExpandOutputs, n, item.scale);
      }
    }
    return;
  }

  // With one block of the rank a panel of several tiles fits, and the sums of each row of tiles are complete at once.
  const bool one_block = rank <= kBlock;
  const int64_t panel = one_block ? std::min(kExpandOutputs, kBlock / rank * kOutputs) : kOutputs;
  const int64_t sums_stride = one_block ? kExpandOutputs : kOutputs;

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

template <class T, bool kBf16Isa>
void add_lora_shrink(const AddLoraParams& params, const LoraTask* tasks, int64_t num_tasks, int num_threads) {
  PUNICA_RECORD_ISA(kBf16Isa);
  parallel_for(num_threads, num_tasks, [&](int64_t i) { shrink_task<T, kNativeDot<T, kBf16Isa>>(params, tasks[i]); });
}

template <class T, bool kBf16Isa>
void add_lora_expand(const AddLoraParams& params, const LoraTask* tasks, int64_t num_tasks, int num_threads) {
  PUNICA_RECORD_ISA(kBf16Isa);
  parallel_for(num_threads, num_tasks, [&](int64_t i) { expand_task<T, kNativeDot<T, kBf16Isa>>(params, tasks[i]); });
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_ADD_LORA_INL_H_
