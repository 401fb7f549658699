// The fast prefill's warpgroups that multiply: scores, weights, sums, output.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"
#include "src/cuda/common/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

enum NamedBarrier : int { kTurn = 1, kTail = 3, kQueries = 4 };

// Rows g and g + 8 of a warp's 16, of which a thread has a quarter: the weights of its columns are not yet summed up
// over the four.
struct RowPair {
  float maximum[2];  // of the scores before the factor
  float weight[2];
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(~0u, v, 1));
  return __fadd_rn(v, __shfl_xor_sync(~0u, v, 2));
}

// tanh, absolute error below 3e-7.
__device__ __forceinline__ float tanh_fast(float x) {
  const float e = exp2_fast(__fmul_rn(x, 2.885390082f));
  return __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, e)));
}

template <class T, int kDim>
class Consumer {
 public:
  static constexpr int kSums = kDim / 2;
  static constexpr int kColumns = kDim / 64;

  __device__ __forceinline__ Consumer(const AttentionArgs& args, bool wide_q, bool wide_o, PrefillShared<kDim>& shared)
      : args_(args), shared_(shared), wide_q_(wide_q), wide_o_(wide_o) {}

  __device__ __forceinline__ void run() {
    if (group_ == 1) named_barrier_arrive(kTurn, 256);  // the first turn is that of warpgroup 0
    barrier_wait(shared_address(&shared_.item_full[0]), 0);
    load_queries(shared_.items[0]);
    uint32_t number = 0;
    float scores[64];
    start(shared_.items[0], number, scores);
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
      const PrefillItem& item = shared_.items[n % 2];
      products_wait<0>();
      pin(scores);
      if (item.kv_head < 0) return;
      attend(item, number, n, scores);
      number += item.tiles;
      barrier_arrive(shared_address(&shared_.item_empty[n % 2]));
    }
  }

 private:
  // Row `row` of the item: query and head in the group.
  struct Row {
    int query, head;
  };
  __device__ __forceinline__ Row split_row(const PrefillItem& item, int row) const {
    const uint32_t at = item.first_head + row;
    const uint32_t query = args_.group_size == 1 ? at : __umulhi(at, group_inverse_);
    return {static_cast<int>(query), static_cast<int>(at - query * args_.group_size)};
  }

  __device__ __forceinline__ int64_t row_end(const PrefillItem& item, int row) const {
    if (row >= item.rows) return 0;
    return max(item.first_position + split_row(item, row).query + 1, int64_t{0});
  }

  // The group's 64 rows, into rows of 128 bytes.
  __device__ __forceinline__ void load_queries(const PrefillItem& item) {
    if (item.kv_head < 0) return;
    constexpr int kPieces = kDim / 8;  // of 16 bytes, of a row
    unsigned char* const to = shared_.queries + group_ * (64 * kDim * 2);
#pragma unroll 4
    for (int i = thread_; i < 64 * kPieces; i += 128) {
      const int row = i / kPieces, piece = i % kPieces, tile_row = group_ * 64 + row;
      const bool valid = tile_row < item.rows;
      const Row place = split_row(item, valid ? tile_row : 0);
      const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
      const T* const from =
          static_cast<const T*>(args_.q) + (item.first_query + place.query) * args_.q_stride + head * kDim + piece * 8;
      unsigned char* const at = to + piece / 8 * (64 * 128) + row * 128 + ((piece ^ row) % 8) * 16;
      if (wide_q_) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(at)), "l"(from),
                     "r"(valid ? 16 : 0)
                     : "memory");
      } else {
        Vec<T, 8> v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.values[e] = valid ? from[e] : from_float<T>(0.0f);
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(&v);
      }
    }
    copy_commit();
  }

  __device__ __forceinline__ void multiply_keys(uint32_t stage, float (&scores)[64]) const {
    const Descriptor queries = descriptor_rows(shared_address(shared_.queries) + group_ * (64 * kDim * 2));
    const Descriptor keys = descriptor_rows(shared_address(shared_.keys[stage]));
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      product<T>(scores, queries.behind(k / 4 * (64 * 128) + k % 4 * 32),
                 keys.behind(k / 4 * (kPrefillKeys * 128) + k % 4 * 32), k > 0);
    }
  }

  __device__ __forceinline__ void multiply_values(uint32_t stage, const uint32_t (&weights)[8][4], float (&sums)[kSums],
                                                  bool add) const {
    const Descriptor values = descriptor_columns(shared_address(shared_.values[stage]), kPrefillKeys * 128);
#pragma unroll
    for (int k = 0; k < kPrefillKeys / 16; ++k) {
      product<T>(sums, weights[k], values.behind(k * (16 * 128)), add || k > 0);
    }
  }

  // Scores to weights, in place; the factor by which sums so far shrink.
  __device__ __forceinline__ void soften(const PrefillItem& item, int64_t tile, const int64_t (&ends)[2], bool masked,
                                         float (&scores)[64], RowPair& state, float (&decay)[2]) const {
    const float factor = args_.cap > 0.0f ? args_.cap : args_.scale;
    if (args_.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < 64; ++i) scores[i] = tanh_fast(__fmul_rn(scores[i], args_.scale));
    }
    if (masked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t first = tile * kPrefillKeys;
        const int end = static_cast<int>(min(max(ends[r] - first, int64_t{0}), int64_t{kPrefillKeys}));
        const int64_t begin_all = ends[r] > 0 ? args_.first_key(ends[r] - 1) : 0;
        const int begin = static_cast<int>(min(max(begin_all - first, int64_t{0}), int64_t{kPrefillKeys}));
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = 8 * j + 2 * t_ + e;
            if (key < begin || key >= end) scores[4 * j + 2 * r + e] = minus_infinity();
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
      for (int j = 1; j < 16; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
      top = fmaxf(state.maximum[r], quad_max(top));
      const float used = finite_or_zero(top);
      decay[r] = exp2_fast(__fmul_rn(__fsub_rn(state.maximum[r], used), factor));
      state.maximum[r] = top;
      const float shift = __fmul_rn(used, factor);
      float total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * j + 2 * r + e];
          score = exp2_fast(__fmaf_rn(score, factor, -shift));
          total[e] = __fadd_rn(total[e], score);
        }
      }
      state.weight[r] = __fmaf_rn(state.weight[r], decay[r], __fadd_rn(total[0], total[1]));
    }
  }

  static __device__ __forceinline__ void pack_weights(const float (&scores)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    }
  }

  __device__ __forceinline__ void release(uint64_t* empty) const {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(shared_address(empty));
  }

  // Adds a finished split to the saved ones, or both, in the end, to `sums`: RowState::merge for two rows.
  template <bool kLast>
  __device__ __forceinline__ void merge(RowPair& saved, bool any_saved, RowPair& split, float (&sums)[kSums]) const {
    const float factor = args_.cap > 0.0f ? args_.cap : args_.scale;
    constexpr float kNothing = -1.0f;
    float decay[2], later_decay[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      split.weight[r] = quad_sum(split.weight[r]);
      split.maximum[r] = __fmul_rn(split.maximum[r], factor);
      // A side that saw nothing changes no bit of the other.
      if (!any_saved || saved.weight[r] == 0.0f) {
        decay[r] = kNothing;
        later_decay[r] = 1.0f;
        saved.maximum[r] = split.maximum[r];
        saved.weight[r] = split.weight[r];
      } else if (split.weight[r] == 0.0f) {
        decay[r] = 1.0f;
        later_decay[r] = kNothing;
      } else {
        const float top = fmaxf(saved.maximum[r], split.maximum[r]);
        decay[r] = exp2_fast(__fsub_rn(saved.maximum[r], finite_or_zero(top)));
        later_decay[r] = exp2_fast(__fsub_rn(split.maximum[r], finite_or_zero(top)));
        saved.maximum[r] = top;
        saved.weight[r] = __fmaf_rn(split.weight[r], later_decay[r], __fmul_rn(saved.weight[r], decay[r]));
      }
    }
    float (*const place)[kPrefillThreads - 128] = shared_.saved;
    const int thread = group_ * 128 + thread_;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int r = i / 2 % 2;
      float sum = sums[i];
      if (any_saved) {
        const float before = place[i][thread];
        sum = decay[r] == kNothing         ? sum
              : later_decay[r] == kNothing ? before
                                           : __fmaf_rn(sum, later_decay[r], __fmul_rn(before, decay[r]));
      }
      if constexpr (kLast) {
        sums[i] = sum;
      } else {
        place[i][thread] = sum;
      }
    }
  }

  // Values behind the sequence's end, where anything may lie, become zeros.
  __device__ __forceinline__ void clear_tail(uint32_t stage, int first_row) const {
    constexpr int kRowPieces = 8 * kColumns;
    for (int i = group_ * 128 + thread_; i < (kPrefillKeys - first_row) * kRowPieces; i += 256) {
      const int row = first_row + i / kRowPieces, piece = i % kRowPieces;
      *reinterpret_cast<uint4*>(shared_.values[stage] + piece / 8 * (kPrefillKeys * 128) + row * 128 + piece % 8 * 16) =
          make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    named_barrier_sync(kTail, 256);
  }

  // The scores of an item's first tile, on their way when this returns. Its queries have been asked for.
  __device__ __forceinline__ void start(const PrefillItem& item, uint32_t number, float (&scores)[64]) const {
    copy_wait<0>();
    fence_async_proxy();
    named_barrier_sync(kQueries + group_, 128);
    // Without keys too, of whatever there is: products in flight may not depend on a condition.
    const uint32_t stage = number % kPrefillStages;
    if (item.kv_head >= 0 && item.tiles > 0) {
      barrier_wait(shared_address(&shared_.key_full[stage]), number / kPrefillStages & 1);
    }
    pin(scores);
    products_fence();
    multiply_keys(stage, scores);
    products_commit();
  }

  // As soon as the queries of this item are no longer needed: those of the next.
  __device__ __forceinline__ void load_next_queries(uint32_t n) {
    named_barrier_sync(kQueries + group_, 128);
    barrier_wait(shared_address(&shared_.item_full[(n + 1) % 2]), (n + 1) / 2 & 1);
    load_queries(shared_.items[(n + 1) % 2]);
  }

  __device__ __forceinline__ void attend(const PrefillItem& item, uint32_t number, uint32_t n, float (&scores)[64]) {
    const int row = group_ * 64 + warp_ * 16 + lane_ / 4;
    const int64_t ends[2] = {row_end(item, row), row_end(item, row + 8)};
    const int tiles = item.tiles;
    const int64_t first_tile = item.first_tile;
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    RowPair state = {{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}}, saved = state;
    bool any_saved = false;

    if (tiles == 0) {
      load_next_queries(n);
    } else {
      // Tiles that all rows of the group see whole need no mask.
      const int group_rows = min(item.rows - group_ * 64, 64);
      const int64_t least_end = group_rows > 0 ? row_end(item, group_ * 64) : 0;
      const int64_t last_end = group_rows > 0 ? row_end(item, group_ * 64 + group_rows - 1) : 0;
      const int64_t most_begin = last_end > 0 ? args_.first_key(last_end - 1) : 0;
      const auto masked = [&](int64_t tile) {
        return (tile + 1) * kPrefillKeys > least_end || tile * kPrefillKeys < most_begin;
      };
      const auto stage_of = [&](int i) { return (number + i) % kPrefillStages; };
      const auto parity_of = [&](int i) { return (number + i) / kPrefillStages & 1; };

      uint32_t weights[8][4];
      float decay[2];
      release(&shared_.key_empty[stage_of(0)]);
      if (tiles == 1) load_next_queries(n);
      soften(item, first_tile, ends, masked(first_tile), scores, state, decay);
      pack_weights(scores, weights);

      bool add = false;
#pragma unroll 1
      for (int i = 1; i < tiles; ++i) {
        barrier_wait(shared_address(&shared_.key_full[stage_of(i)]), parity_of(i));
        named_barrier_sync(kTurn + group_, 256);
        pin(scores);
        pin(sums);
        products_fence();
        multiply_keys(stage_of(i), scores);
        products_commit();
        barrier_wait(shared_address(&shared_.value_full[stage_of(i - 1)]), parity_of(i - 1));
        multiply_values(stage_of(i - 1), weights, sums, add);
        products_commit();
        named_barrier_arrive(kTurn + 1 - group_, 256);
        products_wait<1>();
        pin(scores);
        release(&shared_.key_empty[stage_of(i)]);
        if (i + 1 == tiles) load_next_queries(n);
        const int64_t tile = first_tile + i;
        const bool fresh = tile % (kPrefillSplitTokens / kPrefillKeys) == 0;
        RowPair split = state;
        if (fresh) state = {{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
        soften(item, tile, ends, masked(tile), scores, state, decay);
        // The weights are to be computed beside the products, not behind them: never true, but the assembler, which
        // moves the wait up to where a block of code begins, cannot know.
        if (state.weight[0] + state.weight[1] < 0.0f) __trap();
        products_wait<0>();
        pin(sums);
        release(&shared_.value_empty[stage_of(i - 1)]);
        if (fresh) {
          merge<false>(saved, any_saved, split, sums);
          any_saved = true;
        } else {
#pragma unroll
          for (int j = 0; j < kSums; ++j) sums[j] = __fmul_rn(sums[j], decay[j / 2 % 2]);
        }
        add = !fresh;
        pack_weights(scores, weights);
      }

      const uint32_t last = stage_of(tiles - 1);
      barrier_wait(shared_address(&shared_.value_full[last]), parity_of(tiles - 1));
      const int64_t left = item.kv_len - (first_tile + tiles - 1) * kPrefillKeys;
      if (left < kPrefillKeys) clear_tail(last, static_cast<int>(left));
      pin(sums);
      products_fence();
      multiply_values(last, weights, sums, add);
      products_commit();
      products_wait<0>();
      pin(sums);
      release(&shared_.value_empty[last]);
    }
    start(shared_.items[(n + 1) % 2], number + tiles, scores);
    merge<true>(saved, any_saved, state, sums);
    if (item.splits == 0) {
      store(item, row, ends, saved, sums);
    } else if (tiles > 0) {
      store_partial(item, row, saved, sums);
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

  __device__ __forceinline__ void store(const PrefillItem& item, int row, const int64_t (&ends)[2],
                                        const RowPair& state, float (&sums)[kSums]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile_row = row + 8 * r;
      const bool valid = tile_row < item.rows;
      const Row place = split_row(item, valid ? tile_row : 0);
      const int64_t head = item.kv_head * static_cast<int64_t>(args_.group_size) + place.head;
      const int64_t query = item.first_query + place.query;
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
  const bool wide_q_, wide_o_;
  // 2^32 / group_size, rounded up: quotients by multiplication are exact for what is asked (serves_prefill).
  const uint32_t group_inverse_ = 0xffffffffu / args_.group_size + 1;
  const int thread_ = threadIdx.x % 128, lane_ = threadIdx.x % 32, warp_ = thread_ / 32, t_ = lane_ % 4;
  const int group_ = threadIdx.x / 128 - 1;
};

}  // namespace punica::cuda::prefill

#endif
