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
  // What the weights are relative to, before the factor: the greatest score as it was when one was last greater by
  // more than a factor of 2^8. So sums seldom have to shrink.
  float maximum[2];
  float weight[2];

  __device__ __forceinline__ void clear() {
    maximum[0] = maximum[1] = minus_infinity();
    weight[0] = weight[1] = 0.0f;
  }
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
  __device__ __forceinline__ Output(const AttentionArgs& args, const PrefillCall& call, const CUtensorMap& outputs,
                                    PrefillShared<kDim>& shared)
      : args_(args), shared_(shared), call_(call), outputs_(outputs) {}

  // Row `row` of the item: query and head in the group.
  struct Row {
    int query, head;
  };
  __device__ __forceinline__ Row split_row(const PrefillItem& item, int row) const {
    const uint32_t at = item.first_head + row;
    const uint32_t query = args_.group_size == 1 ? at : __umulhi(at, group_inverse_);
    return {static_cast<int>(query), static_cast<int>(at - query * args_.group_size)};
  }

  // A split is finished: the weights are summed up, the maximum is that of the scores after the factor. Adds the saved
  // splits before it, if there are any: RowState::merge for two rows.
  __device__ __forceinline__ void merge(bool any_saved, RowPair& state, float (&sums)[kSums]) const {
    const float factor = args_.cap > 0.0f ? args_.cap : args_.scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.weight[r] = quad_sum(state.weight[r]);
      state.maximum[r] = __fmul_rn(state.maximum[r], factor);
    }
    if (!any_saved) return;
    // A side that saw nothing changes no bit of the other.
    bool before_alone[2], split_alone[2];
    float decay[2], split_decay[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 saved = shared_.saved_states[row_ + 8 * r];
      split_alone[r] = saved.y == 0.0f;
      before_alone[r] = state.weight[r] == 0.0f;
      decay[r] = split_decay[r] = 1.0f;
      if (split_alone[r]) continue;
      if (before_alone[r]) {
        state.maximum[r] = saved.x;
        state.weight[r] = saved.y;
      } else {
        const float top = fmaxf(saved.x, state.maximum[r]);
        decay[r] = exp2_fast(__fsub_rn(saved.x, finite_or_zero(top)));
        split_decay[r] = exp2_fast(__fsub_rn(state.maximum[r], finite_or_zero(top)));
        state.maximum[r] = top;
        state.weight[r] = __fmaf_rn(state.weight[r], split_decay[r], __fmul_rn(saved.y, decay[r]));
      }
    }
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float4 four = shared_.saved[warp_][j][lane_];
      const float before[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2;
        float& sum = sums[4 * j + i];
        const float both = __fmaf_rn(sum, split_decay[r], __fmul_rn(before[i], decay[r]));
        sum = split_alone[r] ? sum : before_alone[r] ? before[i] : both;
      }
    }
  }

  // Saves a finished split with those before it; the next one begins with nothing.
  __device__ __forceinline__ void keep(bool any_saved, RowPair& state, float (&sums)[kSums]) const {
    if (lane_ == 0) store_wait_read();
    merge(any_saved, state, sums);
    __syncwarp();  // all have read
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (t_ == 0) shared_.saved_states[row_ + 8 * r] = make_float2(state.maximum[r], state.weight[r]);
    }
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      shared_.saved[warp_][j][lane_] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      sums[4 * j] = sums[4 * j + 1] = sums[4 * j + 2] = sums[4 * j + 3] = 0.0f;
    }
    state.clear();
    __syncwarp();
  }

  // What prefill_merge_kernel reads.
  __device__ __forceinline__ void store_partial(const PrefillItem& item, const RowPair& state,
                                                const float (&sums)[kSums]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row_ + 8 * r >= item.rows) continue;
      const Row place = split_row(item, row_ + 8 * r);
      const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
      const int64_t index = (item.first_slot + int64_t{place.query} * item.splits) * args_.num_heads() + head;
      float2* const to = reinterpret_cast<float2*>(args_.partial_sums + index * kDim) + t_;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) to[4 * j] = make_float2(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1]);
      if (t_ == 0) args_.partial_states[index] = make_float2(state.maximum[r], state.weight[r]);
    }
  }

  // Rounded, through the warp's part of shared_.saved, which merge has read: an access to memory is whole rows.
  __device__ __forceinline__ void store(const PrefillItem& item, const RowPair& state, float (&sums)[kSums]) const {
    constexpr int kPieces = kDim / 8;  // of 16 bytes, of a row
    float inverse[2] = {inverse_weight(state.weight[0]), inverse_weight(state.weight[1])};
    if (item.first_position < 0 || args_.lse != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Row place = split_row(item, row_ + 8 * r);
        const bool empty = item.first_position + place.query < 0;  // no key seen: zeros
        if (empty) {
          inverse[r] = 0.0f;
#pragma unroll
          for (int i = 0; i < kSums; ++i) sums[i] = i / 2 % 2 == r ? 0.0f : sums[i];
        }
        if (args_.lse != nullptr && t_ == 0 && row_ + 8 * r < item.rows) {
          const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
          args_.lse[(int64_t{item.first_query} + place.query) * args_.num_heads() + head] =
              empty ? minus_infinity() : __fadd_rn(state.maximum[r], log2f(state.weight[r]));
        }
      }
    }
    // Piece p of row r of the warp's 16, as tensor copies read it.
    const uint32_t base = shared_address(shared_.saved[warp_]);
    const auto place_of = [&](int r, int p) { return base + p / 8 * (16 * 128) + r * 128 + (p ^ r) % 8 * 16; };
    if (lane_ == 0) store_wait_read();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kPieces; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // + 0: tiles of zero weights turn -0 into 0, wherever they are.
        const float* const two = sums + 4 * j + 2 * i;
        words[i] = pack<T>(__fmaf_rn(two[0], inverse[i % 2], 0.0f), __fmaf_rn(two[1], inverse[i % 2], 0.0f));
      }
      store_matrices(place_of(lane_ % 8 + lane_ / 8 % 2 * 8, j + lane_ / 16), words[0], words[1], words[2], words[3]);
    }
    const int first_row = row_ - lane_ / 4;
    if (call_.copy_o && first_row + 16 <= item.rows) {
      fence_async_proxy();
      __syncwarp();
      if (lane_ == 0) {
#pragma unroll
        for (int c = 0; c < kDim / 64; ++c) {
          store_box(base + c * (16 * 128), &outputs_, c * 64, item.kv_head * args_.group_size,
                    item.first_query + split_row(item, first_row).query);
        }
        store_commit();
      }
      return;
    }
    __syncwarp();
    // Each of 16 lanes knows where one of the rows goes.
    const int known_row = first_row + lane_ % 16;
    const Row known = split_row(item, min(known_row, item.rows - 1));
    const int64_t known_offset = (int64_t{item.first_query} + known.query) * args_.o_stride +
                                 (item.kv_head * static_cast<int64_t>(args_.group_size) + known.head) * kDim;
    constexpr int kRowsAtOnce = 32 / kPieces;
#pragma unroll
    for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
      const int r = i * kRowsAtOnce + lane_ / kPieces, p = lane_ % kPieces;
      const uint4 piece = load_shared_16(place_of(r, p));
      const int64_t offset = __shfl_sync(~0u, known_offset, r);
      if (first_row + r >= item.rows) continue;
      T* const to = static_cast<T*>(args_.o) + offset + p * 8;
      if (call_.wide_o) {
        *reinterpret_cast<uint4*>(to) = piece;
      } else {
        const uint32_t halves[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          reinterpret_cast<uint16_t*>(to)[e] = static_cast<uint16_t>(halves[e / 2] >> e % 2 * 16);
        }
      }
    }
    __syncwarp();
  }

  const AttentionArgs& args_;
  PrefillShared<kDim>& shared_;
  const PrefillCall& call_;
  const CUtensorMap& outputs_;
  // 2^32 / group_size, rounded up: quotients by multiplication are exact for what is asked (serves_prefill).
  const uint32_t group_inverse_ = 0xffffffffu / args_.group_size + 1;
  const int thread_ = threadIdx.x % 128, lane_ = threadIdx.x % 32, t_ = lane_ % 4;
  const int warp_ = static_cast<int>(uniform(threadIdx.x / 32)) - 4;  // of those that multiply
  const int group_ = static_cast<int>(uniform(threadIdx.x / 128)) - 1;
  const int row_ = group_ * 64 + thread_ / 32 * 16 + lane_ / 4;  // of the item; the other one is 8 behind
};

}  // namespace punica::cuda::prefill

#endif
