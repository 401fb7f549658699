// LoRA with weights whose rows run along the outputs, W: [K, outputs] (sgmv_cutlass, and sgmv_shrink with few inputs):
// lanes are outputs, and each element of x (or pair of them, where bfloat16 is native) is broadcast.
//
// Every output is computed in the same way, whatever tile it is part of: K is cut into blocks, whose size follows from
// the number of outputs; within a block one lane takes element after element (pair after pair); the blocks are added in
// order.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "src/cpu/lora_common-inl.h"

#if defined(PUNICA_CPU_LORA_OUTER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PUNICA_CPU_LORA_OUTER_INL_H_
#undef PUNICA_CPU_LORA_OUTER_INL_H_
#else
#define PUNICA_CPU_LORA_OUTER_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

// One step along K: kPair elements, for kLanes outputs.
template <bool kNative>
struct OuterStep {
  static constexpr int64_t kPair = 1;
  using Packed = float;
  using Operand = VF;

  static HWY_INLINE Operand load_weights(const float* p) { return load(p); }
  static HWY_INLINE Operand broadcast_x(const float* p) { return broadcast(*p); }
  static HWY_INLINE VF dot(VF sum, Operand w, Operand x) { return hn::MulAdd(w, x, sum); }
};

#if HWY_TARGET == HWY_AVX3
template <>
struct OuterStep<true> {
  static constexpr int64_t kPair = 2;
  using Packed = bfloat16_t;
  using Operand = VBF16;

  static HWY_INLINE Operand load_weights(const bfloat16_t* p) { return load_bf16(p); }
  static HWY_INLINE Operand broadcast_x(const bfloat16_t* p) { return broadcast_bf16_pair(p); }
  // The pair (p[0], 0).
  static HWY_INLINE Operand broadcast_last_x(const bfloat16_t* p) {
    return hn::BitCast(hn::ScalableTag<bfloat16_t>(), hn::Set(U32(), p->bits));
  }
  static HWY_INLINE VF dot(VF sum, Operand w, Operand x) { return dot_bf16(sum, w, x); }
};
#endif

// Packed weights take this much: they stay in the L1 cache while the tokens pass.
inline constexpr int64_t kPanelBytes = 32 << 10;

// A tile has kTokens tokens and kVectors vectors of outputs.
template <bool kNative, int64_t kTileTokens, int64_t kVectors>
struct OuterTile {
  using Step = OuterStep<kNative>;
  using P = typename Step::Packed;
  static constexpr int64_t kPair = Step::kPair;
  static constexpr int64_t kTokens = kTileTokens;
  static constexpr int64_t kOutputs = kVectors * kLanes;
  static constexpr int64_t kBlock = kPanelBytes / (kOutputs * static_cast<int64_t>(sizeof(P)));

  // out[m * out_stride + i] (+)= sum over j < k of x[m][j] * w[j][i], for m < kTokens, i < kOutputs.
  // w is packed: [ceil(k / kPair), kOutputs, kPair].
  // Meanwhile k elements at each of next_x[m] are brought into the cache.
  template <class T>
  static HWY_INLINE void run(const P* const* x, const P* HWY_RESTRICT w, int64_t k, const T* const* next_x,
                             float* HWY_RESTRICT out, int64_t out_stride, bool accumulate) {
    VF sum[kTokens][kVectors];
    for (auto& row : sum) {
      for (VF& s : row) s = zero();
    }
    const auto step = [&](int64_t j, auto broadcast_element) HWY_ATTR {
      typename Step::Operand weights[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        weights[v] = Step::load_weights(w + j * kOutputs + v * kLanes * kPair);
      }
      for (int64_t m = 0; m < kTokens; ++m) {
        const auto element = broadcast_element(x[m] + j);
        for (int64_t v = 0; v < kVectors; ++v) sum[m][v] = Step::dot(sum[m][v], weights[v], element);
      }
    };
    int64_t j = 0;
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    while (j + kPair <= k) {
      for (int64_t m = 0; m < kTokens; ++m) hwy::Prefetch(next_x[m] + j);
      const int64_t end = std::min(j + kLine, k / kPair * kPair);
      for (; j < end; j += kPair) step(j, [](const P* p) HWY_ATTR { return Step::broadcast_x(p); });
    }
    if constexpr (kPair == 2) {
      if (j < k) step(j, [](const P* p) HWY_ATTR { return Step::broadcast_last_x(p); });
    }
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t v = 0; v < kVectors; ++v) {
        float* p = out + m * out_stride + v * kLanes;
        store(accumulate ? hn::Add(load(p), sum[m][v]) : sum[m][v], p);
      }
    }
  }
};

// kLanes elements of a row of weights, of which n exist, as float32.
template <class T>
HWY_INLINE VF load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  return n > 0 ? load_n(p, n) : zero();
}

// Packs rows [0, k) and columns [0, n) of w for Tile::run: [ceil(n / kOutputs)] panels, filled up with zeros.
template <class Tile, class T>
HWY_INLINE void pack_weights(const T* HWY_RESTRICT w, int64_t w_stride, int64_t k, int64_t n,
                             typename Tile::P* HWY_RESTRICT packed) {
  for (int64_t panel = 0; panel < n; panel += Tile::kOutputs) {
    for (int64_t j = 0; j < k; j += Tile::kPair) {
      for (int64_t i = panel; i < panel + Tile::kOutputs; i += kLanes) {
        const T* p = w + j * w_stride + i;
        if constexpr (Tile::kPair == 2) {
          // A bfloat16 is the upper half of a float32.
          const U32 u;
          const auto low = hn::BitCast(u, load_some(p, n - i));
          const auto high = j + 1 < k ? hn::BitCast(u, load_some(p + w_stride, n - i)) : hn::Zero(u);
          hn::StoreU(hn::Or(hn::ShiftRight<16>(low), high), u, reinterpret_cast<uint32_t*>(packed));
        } else {
          store(load_some(p, n - i), packed);
        }
        packed += kLanes * Tile::kPair;
      }
    }
  }
}

// The same from weights whose rows run along the sum: w is [n, k], rows w_stride apart.
template <class Tile, class T>
HWY_INLINE void pack_transposed(const T* HWY_RESTRICT w, int64_t w_stride, int64_t k, int64_t n,
                                typename Tile::P* HWY_RESTRICT packed) {
  using P = typename Tile::P;
  constexpr int64_t kPair = Tile::kPair;
  const int64_t panel_size = round_up(k, kPair) * Tile::kOutputs;
  alignas(64) P row[round_up(kMaxTransposedInputs, 2 * kLanes)];
  for (int64_t i = 0; i < round_up(n, Tile::kOutputs); ++i) {
    if (i >= n) {
      std::memset(row, 0, sizeof(row));
    } else if constexpr (kPair == 2) {
      copy_padded(w + i * w_stride, k, row);
    } else {
      to_floats(w + i * w_stride, k, row);
    }
    P* dst = packed + i / Tile::kOutputs * panel_size + i % Tile::kOutputs * kPair;
    for (int64_t j = 0; j < k; j += kPair) std::memcpy(dst + j * Tile::kOutputs, row + j, kPair * sizeof(P));
  }
}

template <class T, bool kNative, class Tile, bool kTransposed>
HWY_INLINE void sgmv_outer_tiles(const SgmvParams& params, const SgmvTask& task) {
  using P = typename Tile::P;
  constexpr int64_t kTokens = Tile::kTokens, kOutputs = Tile::kOutputs, kBlock = Tile::kBlock;
  const int64_t d_out = params.y.shape[1], d_in = params.x.shape[1];
  const T* w = layer_weights<T>(params.w_ptr, task.segment, params.layer_idx, d_in * d_out);
  const int64_t x_stride = params.x.stride[0], y_stride = params.y.stride[0];
  const T* x = params.x.as<const T>() + task.token * x_stride;
  T* y = params.y.as<T>() + task.token * y_stride;

  alignas(64) P packed[kPanelBytes / sizeof(P)];
  alignas(64) float x_floats[std::is_same_v<T, P> ? 1 : kTokens * kBlock];
  alignas(64) float sums[std::max(kMaxTokensPerTask * kOutputs, kTokens * kOuterOutputsPerTask)];
  // With one block of K a panel of several tiles fits, and the sums of each row of tiles are complete at once.
  const bool one_block = d_in <= kBlock;
  const int64_t panel_outputs =
      one_block ? std::min(kOuterOutputsPerTask, kBlock / round_up(d_in, Tile::kPair) * kOutputs) : kOutputs;
  const int64_t sums_stride = one_block ? kOuterOutputsPerTask : kOutputs;

  for (int64_t i = task.output; i < task.output + task.num_outputs; i += panel_outputs) {
    const int64_t n = std::min(panel_outputs, task.output + task.num_outputs - i);
    for (int64_t begin = 0; begin < d_in; begin += kBlock) {
      const int64_t k = std::min(kBlock, d_in - begin);
      if constexpr (kTransposed) {
        pack_transposed<Tile>(w + i * d_in + begin, d_in, k, n, packed);
      } else {
        const T* w_block = w + begin * d_out + i;
        if (d_out > n) {
          for (int64_t j = 0; j < k; ++j) prefetch(w_block + j * d_out, n);
        }
        pack_weights<Tile>(w_block, d_out, k, n, packed);
      }
      for (int64_t t = 0; t < task.num_tokens; t += kTokens) {
        const P* tile_x[kTokens];
        const T* next_x[kTokens];
        for (int64_t m = 0; m < kTokens; ++m) {
          // Tokens behind the last are the last again: computed, never stored to y.
          const T* row = x + std::min(t + m, task.num_tokens - 1) * x_stride + begin;
          next_x[m] = x + std::min(t + m + kTokens, task.num_tokens - 1) * x_stride + begin;
          if constexpr (std::is_same_v<T, P>) {
            tile_x[m] = row;
          } else {
            to_floats(row, k, x_floats + m * kBlock);
            tile_x[m] = x_floats + m * kBlock;
          }
        }
        float* tile_sums = sums + (one_block ? 0 : t * sums_stride);
        for (int64_t c = 0; c < n; c += kOutputs) {
          if (one_block) {
            for (int64_t m = kTokens; m < std::min(2 * kTokens, task.num_tokens - t); ++m) {
              prefetch(y + (t + m) * y_stride + i + c, kOutputs);
            }
          }
          Tile::run(tile_x, packed + c * round_up(k, Tile::kPair), k, next_x, tile_sums + c, sums_stride, begin > 0);
        }
        if (begin + kBlock < d_in) continue;
        for (int64_t m = 0; m < std::min(kTokens, task.num_tokens - t); ++m) {
          accumulate_row<kNative>(y + (t + m) * y_stride + i, tile_sums + m * sums_stride, n, 1.0f);
        }
      }
    }
  }
}

template <class T, bool kNative, bool kTransposed>
void sgmv_outer_task(const SgmvParams& params, const SgmvTask& task) {
  // Few outputs (a shrink): taller tiles.
  if (params.y.shape[1] <= 2 * kLanes) {
    sgmv_outer_tiles<T, kNative, OuterTile<kNative, 8, 1>, kTransposed>(params, task);
  } else {
    sgmv_outer_tiles<T, kNative, OuterTile<kNative, 4, kManyRegisters ? 4 : 2>, kTransposed>(params, task);
  }
}

template <class T, bool kBf16Isa>
void sgmv_in_out(const SgmvParams& params, const SgmvSplit& split) {
  PUNICA_RECORD_ISA(kBf16Isa);
  for_each_sgmv_task(params, split,
                     [&](const SgmvTask& task) { sgmv_outer_task<T, kNativeDot<T, kBf16Isa>, false>(params, task); });
}

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#endif  // PUNICA_CPU_LORA_OUTER_INL_H_
