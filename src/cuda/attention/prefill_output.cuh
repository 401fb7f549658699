// The fast prefill's results: splits merged, rows or partial results written.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"
#include "src/cuda/common/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

// Rows g and g + 8 of a warp's 16, of which a thread has a quarter: the weights of its columns are not yet summed up
// over the four.
struct RowPair {
  float maximum[2];  // of the scores before the factor
  float weight[2];
};

__device__ __forceinline__ float quad_sum(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(~0u, v, 1));
  return __fadd_rn(v, __shfl_xor_sync(~0u, v, 2));
}

// What a thread of a warpgroup that multiplies does with its sums.
template <class T, int kDim>
class Output {
 public:
  static constexpr int kSums = kDim / 2;

 protected:
  __device__ __forceinline__ Output(const AttentionArgs& args, bool wide_o, PrefillShared<kDim>& shared)
      : args_(args), shared_(shared), wide_o_(wide_o) {}

  // Row `row` of the item: query and head in the group.
  struct Row {
    int query, head;
  };
  __device__ __forceinline__ Row split_row(const PrefillItem& item, int row) const {
    const uint32_t at = item.first_head + row;
    const uint32_t query = args_.group_size == 1 ? at : __umulhi(at, group_inverse_);
    return {static_cast<int>(query), static_cast<int>(at - query * args_.group_size)};
  }

  // Adds the saved splits to a finished one, which becomes the sum of all: RowState::merge for two rows.
  __device__ __forceinline__ void merge(RowPair& saved, bool any_saved, RowPair& split, float (&sums)[kSums]) const {
    const float factor = args_.cap > 0.0f ? args_.cap : args_.scale;
    // A side that saw nothing changes no bit of the other.
    bool before_alone[2], split_alone[2];
    float decay[2], split_decay[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      split.weight[r] = quad_sum(split.weight[r]);
      split.maximum[r] = __fmul_rn(split.maximum[r], factor);
      split_alone[r] = !any_saved || saved.weight[r] == 0.0f;
      before_alone[r] = split.weight[r] == 0.0f;
      decay[r] = split_decay[r] = 1.0f;
      if (split_alone[r]) {
        saved.maximum[r] = split.maximum[r];
        saved.weight[r] = split.weight[r];
      } else if (!before_alone[r]) {
        const float top = fmaxf(saved.maximum[r], split.maximum[r]);
        decay[r] = exp2_fast(__fsub_rn(saved.maximum[r], finite_or_zero(top)));
        split_decay[r] = exp2_fast(__fsub_rn(split.maximum[r], finite_or_zero(top)));
        saved.maximum[r] = top;
        saved.weight[r] = __fmaf_rn(split.weight[r], split_decay[r], __fmul_rn(saved.weight[r], decay[r]));
      }
    }
    if (!any_saved) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int r = i / 2 % 2;
      const float before = shared_.saved[i][threadIdx.x - 128];
      const float both = __fmaf_rn(sums[i], split_decay[r], __fmul_rn(before, decay[r]));
      sums[i] = split_alone[r] ? sums[i] : before_alone[r] ? before : both;
    }
  }

  // Saves the sums; a split begins with zeros.
  __device__ __forceinline__ void keep(float (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      shared_.saved[i][threadIdx.x - 128] = sums[i];
      sums[i] = 0.0f;
    }
  }

  // What prefill_merge_kernel reads.
  __device__ __forceinline__ void store_partial(const PrefillItem& item, int row, const RowPair& state,
                                                const float (&sums)[kSums]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= item.rows) continue;
      const Row place = split_row(item, row + 8 * r);
      const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
      const int64_t index = (item.first_slot + int64_t{place.query} * item.splits) * args_.num_heads() + head;
      float2* const to = reinterpret_cast<float2*>(args_.partial_sums + index * kDim) + t_;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) to[4 * j] = make_float2(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1]);
      if (t_ == 0) args_.partial_states[index] = make_float2(state.maximum[r], state.weight[r]);
    }
  }

  __device__ __forceinline__ void store(const PrefillItem& item, int row, const int (&ends)[2], const RowPair& state,
                                        float (&sums)[kSums]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile_row = row + 8 * r;
      const bool valid = tile_row < item.rows;
      const Row place = split_row(item, valid ? tile_row : 0);
      const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
      const int64_t query = int64_t{item.first_query} + place.query;
      T* const to = static_cast<T*>(args_.o) + query * args_.o_stride + head * kDim;
      // No key seen: zeros. + 0: tiles of zero weights turn -0 into 0, wherever they are.
      const bool empty = ends[r] == 0;
      const float inverse = empty ? 0.0f : __fdiv_rn(1.0f, state.weight[r]);
      uint32_t words[kDim / 8];
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const float a = empty ? 0.0f : __fadd_rn(__fmul_rn(sums[4 * j + 2 * r], inverse), 0.0f);
        const float b = empty ? 0.0f : __fadd_rn(__fmul_rn(sums[4 * j + 2 * r + 1], inverse), 0.0f);
        words[j] = pack<T>(a, b);
      }
      if (wide_o_) {
        // Four lanes exchange words, so that each stores 16 bytes: of piece 4 i + t.
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) {
          uint32_t out[4];
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            // The word of piece t ^ s goes to lane t ^ s.
            const uint32_t a = t_ & 1 ? words[4 * i + (s ^ 1)] : words[4 * i + s];
            const uint32_t b = t_ & 1 ? words[4 * i + (s ^ 3)] : words[4 * i + (s ^ 2)];
            out[s] = __shfl_xor_sync(~0u, t_ & 2 ? b : a, s);
          }
          // out[s] came from lane t ^ s.
          uint4 piece;
          const uint32_t x0 = t_ & 1 ? out[1] : out[0], x1 = t_ & 1 ? out[0] : out[1];
          const uint32_t x2 = t_ & 1 ? out[3] : out[2], x3 = t_ & 1 ? out[2] : out[3];
          piece.x = t_ & 2 ? x2 : x0, piece.y = t_ & 2 ? x3 : x1;
          piece.z = t_ & 2 ? x0 : x2, piece.w = t_ & 2 ? x1 : x3;
          if (valid) *reinterpret_cast<uint4*>(to + (4 * i + t_) * 8) = piece;
        }
      } else if (valid) {
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
          uint16_t* const at = reinterpret_cast<uint16_t*>(to) + 8 * j + 2 * t_;
          at[0] = static_cast<uint16_t>(words[j]);
          at[1] = static_cast<uint16_t>(words[j] >> 16);
        }
      }
      if (args_.lse != nullptr && valid && t_ == 0) {
        args_.lse[query * args_.num_heads() + head] =
            empty ? minus_infinity() : __fadd_rn(state.maximum[r], log2f(state.weight[r]));
      }
    }
  }

  const AttentionArgs& args_;
  PrefillShared<kDim>& shared_;
  const bool wide_o_;
  // 2^32 / group_size, rounded up: quotients by multiplication are exact for what is asked (serves_prefill).
  const uint32_t group_inverse_ = 0xffffffffu / args_.group_size + 1;
  const int thread_ = threadIdx.x % 128, lane_ = threadIdx.x % 32, warp_ = thread_ / 32, t_ = lane_ % 4;
  const int group_ = static_cast<int>(uniform(threadIdx.x / 128)) - 1;
};

}  // namespace punica::cuda::prefill

#endif
