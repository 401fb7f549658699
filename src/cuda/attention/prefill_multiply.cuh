// The fast prefill's warpgroups that multiply: scores, weights, sums.
#pragma once

#include "src/cuda/attention/prefill_output.cuh"
#include "src/cuda/attention/prefill_rotate.cuh"
#include "src/cuda/common/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

// Hardware barriers: of the groups that clear a tile's tail, of each group whose queries are there, of each group whose
// turn it is.
enum NamedBarrier : int { kTail = 1, kQueries = 2, kTurn = 5, kItem = 8 };

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

// tanh, absolute error below 3e-7.
__device__ __forceinline__ float tanh_fast(float x) {
  const float e = exp2_fast(__fmul_rn(x, 2.885390082f));
  return __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, e)));
}

template <class T, int kDim, bool kRope>
class Consumer : public Output<T, kDim> {
 public:
  using Base = Output<T, kDim>;
  using Base::args_, Base::call_, Base::shared_, Base::group_, Base::thread_, Base::lane_, Base::row_, Base::t_;
  using Base::split_row, Base::merge;
  static constexpr int kSums = kDim / 2;
  static constexpr int kColumns = kDim / 64;
  static constexpr int kGroups = kPrefillGroups<kDim>;
  // Of the eight steps of a tile's weights: before this one the products of the tile before have ended.
  static constexpr int kWaitStep = 1;
  // Weights may grow to 2^8 before their reference moves.
  static constexpr float kSlack = 8.0f;

  __device__ __forceinline__ Consumer(const AttentionArgs& args, const PrefillCall& call, const CUtensorMap& outputs,
                                      PrefillShared<kDim>& shared)
      : Base(args, call, outputs, shared) {}

  __device__ __forceinline__ void run() {
    if (group_ == kGroups - 1) pass_turn();
    wait_item(0);
    if (!call_.copy_q) load_queries(shared_.items[0]);
    float scores[64], sums[kSums];
    uint32_t weights[8][4];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = 0;
    wait_queries(shared_.items[0], 0);
    wait_first_keys(shared_.items[0], 0);
    pin(scores);
    products_fence();
    multiply_keys(0, scores);
    products_commit();
    products_wait<0>();

    RowPair state;
    uint32_t number = 0;  // of tiles before the item
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
      // On their way: the scores of the item's first tile, and behind them the last products of the item before.
      const PrefillItem& item = shared_.items[n % kItemsAhead];
      const int tiles = item.tiles;
      products_wait<1>();
      pin(scores);
      if (tiles > 0) release(&shared_.key_empty[number % kPrefillStages]);
      if (tiles <= 1 && item.kv_head >= 0) load_next_queries(n);
      products_wait<0>();
      pin(sums);
      if (n > 0) {
        finish(shared_.items[(n - 1) % kItemsAhead], number, state, sums);
        barrier_arrive(shared_address(&shared_.item_empty[(n - 1) % kItemsAhead]));  // every thread has read it
      }
      if (item.kv_head < 0) break;
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      state.clear();
      attend(item, number, n, state, scores, weights, sums);

      // The first scores of the next item beside the last products of this one.
      const PrefillItem& next = shared_.items[(n + 1) % kItemsAhead];
      if (call_.copy_q) wait_item(n + 1);
      wait_queries(next, n + 1);
      number += tiles;
      if (tiles > 0) {
        wait_tile(shared_.value_full, number - 1);
        const int left = item.kv_len - (item.first_tile + tiles - 1) * kPrefillKeys;
        if (left < kPrefillKeys && group_ * 64 < item.rows) {
          clear_tail((number - 1) % kPrefillStages, left, item.rows);
        }
      }
      // Groups that have rows of an item share kTail in it, and the next item may have rows of more groups, or fewer.
      // So nobody rotates its keys before all are done with this one.
      if constexpr (kRope) named_barrier_sync(kItem, 128 * kGroups);
      wait_first_keys(next, number);
      multiply(number, scores, weights, sums);
    }
    if (group_ == 0) take_turn();  // the last one that was passed
    if (lane_ == 0) store_wait_read();
  }

 private:
  __device__ __forceinline__ int row_end(const PrefillItem& item, int row) const {
    return row < item.rows ? max(item.first_position + split_row(item, row).query + 1, 0) : 0;
  }

  // The first key that the last query of keys [.., end) sees.
  __device__ __forceinline__ int first_key(int end) const { return max(end - 1 - window_, 0); }

  // The group's 64 rows, into rows of 128 bytes.
  __device__ __forceinline__ void load_queries(const PrefillItem& item) {
    if (item.kv_head < 0) return;
    constexpr int kPieces = kDim / 8;  // of 16 bytes, of a row
    unsigned char* const to = shared_.queries + group_ * (64 * kDim * 2);
    const T* const q = static_cast<const T*>(args_.q) + item.first_query * args_.q_stride +
                       item.kv_head * static_cast<int64_t>(args_.group_size) * kDim;
#pragma unroll 4
    for (int i = thread_; i < 64 * kPieces; i += 128) {
      const int row = i / kPieces, piece = i % kPieces, tile_row = group_ * 64 + row;
      const bool valid = tile_row < item.rows;
      const auto place = split_row(item, valid ? tile_row : 0);
      const T* const from = q + place.query * args_.q_stride + place.head * kDim + piece * 8;
      unsigned char* const at = to + piece / 8 * (64 * 128) + row * 128 + ((piece ^ row) % 8) * 16;
      if (call_.wide_q) {
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

  __device__ __forceinline__ Descriptor values(uint32_t stage) const {
    return descriptor_columns(shared_address(shared_.values[stage]), kPrefillKeys * 128);
  }

  // Step k of the eight of a tile: 16 keys.
  static __device__ __forceinline__ void multiply_values(int k, const Descriptor& values,
                                                         const uint32_t (&weights)[8][4], float (&sums)[kSums]) {
    product<T>(sums, weights[k], values.behind(k * (16 * 128)), true);
  }

  // Scores of the tile whose keys begin at `first`: capped, and -inf where a row does not see the key.
  __device__ __forceinline__ void mask(const PrefillItem& item, int first, float (&scores)[64]) const {
    if (args_.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < 64; ++i) scores[i] = tanh_fast(__fmul_rn(scores[i], args_.scale));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = row_end(item, row_ + 8 * r);
      const int first_seen = scores_below(first_key(end) - first - 2 * t_),
                end_seen = scores_below(end - first - 2 * t_);
      uint32_t seen;
      asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(seen) : "r"(first_seen), "r"(max(end_seen - first_seen, 0)));
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float& score = scores[i / 2 * 4 + 2 * r + i % 2];
        score = seen >> i & 1 ? score : minus_infinity();
      }
    }
  }

  // Of the 32 scores that a thread has of a row, keys 8 i and 8 i + 1, how many are those of keys below `keys`.
  static __device__ __forceinline__ int scores_below(int keys) {
    const int some = min(max(keys, 0), kPrefillKeys);
    return some / 8 * 2 + min(some % 8, 2);
  }

  // Whether one of the warp's references moves: then the factors by which the sums so far shrink; the rows' weights do
  // so here.
  __device__ __forceinline__ bool find_reference(const float (&scores)[64], RowPair& state, float (&decay)[2]) const {
    float top[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2][i % 2] = scores[i];
#pragma unroll
    for (int i = 4; i < 64; ++i) top[i / 2 % 2][i % 2] = fmaxf(top[i / 2 % 2][i % 2], scores[i]);
    const float own[2] = {fmaxf(top[0][0], top[0][1]), fmaxf(top[1][0], top[1][1])};
    const auto beyond = [&](int r, float maximum) { return maximum > __fadd_rn(state.maximum[r], slack_); };
    if (!__any_sync(~0u, beyond(0, own[0]) || beyond(1, own[1]))) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = quad_max(own[r]);
      decay[r] = 1.0f;
      if (beyond(r, maximum)) {
        decay[r] = exp2_fast(__fmul_rn(__fsub_rn(state.maximum[r], maximum), factor_));
        state.maximum[r] = maximum;
        state.weight[r] = __fmul_rn(state.weight[r], decay[r]);
      }
    }
    return true;
  }

  // Step k of the eight of a tile: scores of 16 keys to weights, in place, and their sums.
  __device__ __forceinline__ void soften(int k, float (&scores)[64], const float (&shift)[2], RowPair& state) const {
#pragma unroll
    for (int i = 8 * k; i < 8 * k + 8; ++i) {
      scores[i] = exp2_fast(__fmaf_rn(scores[i], factor_, -shift[i / 2 % 2]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const e = scores + 8 * k + 2 * r;
      state.weight[r] = __fadd_rn(state.weight[r], __fadd_rn(__fadd_rn(e[0], e[1]), __fadd_rn(e[4], e[5])));
    }
  }

  static __device__ __forceinline__ void pack_step(int k, const float (&scores)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
  }

  __device__ __forceinline__ void release(uint64_t* empty) const {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(shared_address(empty));
  }

  // Values behind the sequence's end, where anything may lie, become zeros. By the groups that have rows.
  __device__ __forceinline__ void clear_tail(uint32_t stage, int first_row, int rows) const {
    constexpr int kRowPieces = 8 * kColumns;
    const int threads = (rows + 63) / 64 * 128;
    for (int i = group_ * 128 + thread_; i < (kPrefillKeys - first_row) * kRowPieces; i += threads) {
      const int row = first_row + i / kRowPieces, piece = i % kRowPieces;
      *reinterpret_cast<uint4*>(shared_.values[stage] + piece / 8 * (kPrefillKeys * 128) + row * 128 + piece % 8 * 16) =
          make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    named_barrier_sync(kTail, threads);
  }

  // Groups take turns at asking for products, so that the weights of one are computed beside the products of another.
  __device__ __forceinline__ void take_turn() const { named_barrier_sync(kTurn + group_, 256); }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kTurn + (group_ == kGroups - 1 ? 0 : group_ + 1), 256);
  }

  // Asks for the scores of tile `tile`, and behind them for the products of the tile before.
  __device__ __forceinline__ void multiply(uint32_t tile, float (&scores)[64], const uint32_t (&weights)[8][4],
                                           float (&sums)[kSums]) const {
    take_turn();
    pin(scores);
    pin(sums);
    products_fence();
    multiply_keys(tile % kPrefillStages, scores);
    products_commit();
    const Descriptor v = values((tile - 1) % kPrefillStages);
#pragma unroll
    for (int k = 0; k < 8; ++k) multiply_values(k, v, weights, sums);
    products_commit();
    pass_turn();
  }

  __device__ __forceinline__ void wait_item(uint32_t n) const {
    barrier_wait(shared_address(&shared_.item_full[n % kItemsAhead]), n / kItemsAhead & 1);
  }

  // The queries of item n.
  __device__ __forceinline__ void wait_queries(const PrefillItem& item, uint32_t n) const {
    if (call_.copy_q) {
      if (item.kv_head >= 0) barrier_wait(shared_address(&shared_.query_full[group_]), n & 1);
      if constexpr (!kRope) return;
    } else {
      copy_wait<0>();
      if constexpr (kRope) named_barrier_sync(kQueries + group_, 128);
    }
    if constexpr (kRope) rotate_queries(item);
    fence_async_proxy();
    named_barrier_sync(kQueries + group_, 128);
  }

  __device__ __forceinline__ void wait_first_keys(const PrefillItem& item, uint32_t number) const {
    if (item.tiles == 0) return;
    wait_tile(shared_.key_full, number);
    if (kRope && item.pages_before < 0 && group_ * 64 < item.rows) rotate_keys(item, number, 0);
  }

  __device__ __forceinline__ void rotate_queries(const PrefillItem& item) const {
    const int rows = min(item.rows - group_ * 64, 64);
    if (rows <= 0) return;
    const auto place = split_row(item, group_ * 64);
    prefill::rotate_queries<T, kDim>(shared_.turns, item.first_position + place.query, place.head, rows,
                                     args_.group_size, shared_.queries + group_ * (64 * kDim * 2), thread_);
  }

  // Tile i of the item, whose first is `number`, by the groups that have rows.
  __device__ __forceinline__ void rotate_keys(const PrefillItem& item, uint32_t number, int i) const {
    const int threads = (min(item.rows, kPrefillRows<kDim>) + 63) / 64 * 128;
    prefill::rotate_keys<T, kDim>(shared_.turns, (item.first_tile + i) * kPrefillKeys,
                                  shared_.keys[(number + i) % kPrefillStages], group_ * 128 + thread_, threads);
    fence_async_proxy();
    named_barrier_sync(kTail, threads);
  }

  // As soon as the queries of this item are no longer needed: those of the next.
  __device__ __forceinline__ void load_next_queries(uint32_t n) {
    if (call_.copy_q) {
      release(&shared_.query_empty[group_]);
      return;
    }
    named_barrier_sync(kQueries + group_, 128);
    wait_item(n + 1);
    load_queries(shared_.items[(n + 1) % kItemsAhead]);
  }

  __device__ __forceinline__ void wait_tile(uint64_t (&full)[kPrefillStages], uint32_t tile) const {
    barrier_wait(shared_address(&full[tile % kPrefillStages]), tile / kPrefillStages & 1);
  }

  // From the scores of the item's first tile to the weights of its last.
  __device__ __forceinline__ void attend(const PrefillItem& item, uint32_t number, uint32_t n, RowPair& state,
                                         float (&scores)[64], uint32_t (&weights)[8][4], float (&sums)[kSums]) {
    const int tiles = item.tiles, first_tile = item.first_tile;
    if (tiles == 0 || group_ * 64 >= item.rows) {  // without rows a group only passes tiles on
      for (int i = 1; i < tiles; ++i) {
        take_turn();
        pass_turn();
        wait_tile(shared_.key_full, number + i);
        release(&shared_.key_empty[(number + i) % kPrefillStages]);
        wait_tile(shared_.value_full, number + i - 1);
        release(&shared_.value_empty[(number + i - 1) % kPrefillStages]);
        if (i + 1 == tiles) load_next_queries(n);
      }
      return;
    }
    // Tiles [full_begin, full_end), counted from the item's first, are seen whole by all rows of the group, or by none
    // of those that count.
    const int group_rows = min(item.rows - group_ * 64, 64);
    const int least_end = row_end(item, group_ * 64),
              most_begin = first_key(row_end(item, group_ * 64 + group_rows - 1));
    const int full_begin = args_.cap > 0.0f ? tiles : (most_begin + kPrefillKeys - 1) / kPrefillKeys - first_tile;
    const int full_end = least_end / kPrefillKeys - first_tile;

    float decay[2];
    const auto shifts = [&](float (&shift)[2]) {
      shift[0] = __fmul_rn(finite_or_zero(state.maximum[0]), factor_);
      shift[1] = __fmul_rn(finite_or_zero(state.maximum[1]), factor_);
    };
    {
      if (0 < full_begin || 0 >= full_end) mask(item, first_tile * kPrefillKeys, scores);
      find_reference(scores, state, decay);
      float shift[2];
      shifts(shift);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        soften(k, scores, shift, state);
        pack_step(k, scores, weights);
      }
    }

#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      const uint32_t stage = (number + i) % kPrefillStages, before = (number + i - 1) % kPrefillStages;
      wait_tile(shared_.key_full, number + i);
      if (kRope && item.pages_before < 0) rotate_keys(item, number, i);
      wait_tile(shared_.value_full, number + i - 1);
      multiply(number + i, scores, weights, sums);
      products_wait<1>();
      pin(scores);
      release(&shared_.key_empty[stage]);
      if (i + 1 == tiles) load_next_queries(n);
      if ((first_tile + i) % kPrefillSplitTiles == 0) {
        products_wait<0>();
        pin(sums);
        this->keep((first_tile + i) / kPrefillSplitTiles - 1 > first_tile / kPrefillSplitTiles, state, sums);
      }
      if (i < full_begin || i >= full_end) mask(item, (first_tile + i) * kPrefillKeys, scores);
      const bool moved = find_reference(scores, state, decay);
      float shift[2];
      shifts(shift);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k == kWaitStep) {
          products_wait<0>();
          pin(sums);
          pin(scores);
          release(&shared_.value_empty[before]);
#pragma unroll
          for (int j = 0; j < k; ++j) pack_step(j, scores, weights);
        }
        soften(k, scores, shift, state);
        if (k >= kWaitStep) pack_step(k, scores, weights);
      }
      if (moved) shrink(sums, decay);
    }
  }

  // The item's result, when its last products have ended; `number` counts its tiles too.
  __device__ __forceinline__ void finish(const PrefillItem& item, uint32_t number, RowPair& state,
                                         float (&sums)[kSums]) const {
    if (item.tiles > 0) release(&shared_.value_empty[(number - 1) % kPrefillStages]);
    if (group_ * 64 >= item.rows) return;
    merge((item.first_tile + item.tiles - 1) / kPrefillSplitTiles > item.first_tile / kPrefillSplitTiles, state, sums);
    if (item.splits == 0) {
      this->store(item, state, sums);
    } else if (item.tiles > 0) {
      this->store_partial(item, state, sums);
    }
  }

  static __device__ __forceinline__ void shrink(float (&sums)[kSums], const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __fmul_rn(sums[i], decay[i / 2 % 2]);
  }

  const float factor_ = args_.cap > 0.0f ? args_.cap : args_.scale;
  const float slack_ = fminf(__fdiv_rn(kSlack, factor_), 0x1p126f);  // of scores
  const int window_ =
      args_.window_left < 0 || args_.window_left > INT32_MAX ? INT32_MAX : static_cast<int>(args_.window_left);
};

}  // namespace punica::cuda::prefill

#endif
