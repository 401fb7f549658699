// The fast prefill's warpgroups that multiply: scores, weights, sums.
#pragma once

#include "src/cuda/attention/prefill_output.cuh"
#include "src/cuda/common/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

enum NamedBarrier : int { kTail = 1, kQueries = 2 };

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

// tanh, absolute error below 3e-7.
__device__ __forceinline__ float tanh_fast(float x) {
  const float e = exp2_fast(__fmul_rn(x, 2.885390082f));
  return __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, e)));
}

// Of a tile: what turns scores into weights, and what has been added up of these.
struct Softening {
  float shift[2];
  float total[2];
};

template <class T, int kDim>
class Consumer : public Output<T, kDim> {
 public:
  using Base = Output<T, kDim>;
  using Base::args_, Base::shared_, Base::group_, Base::thread_, Base::lane_, Base::warp_, Base::t_;
  using Base::split_row, Base::merge;
  static constexpr int kSums = kDim / 2;
  static constexpr int kColumns = kDim / 64;
  static constexpr int kEarlySteps = 4, kWaitStep = 6;

  __device__ __forceinline__ Consumer(const AttentionArgs& args, bool wide_q, bool wide_o, PrefillShared<kDim>& shared)
      : Base(args, wide_o, shared), wide_q_(wide_q) {}

  __device__ __forceinline__ void run() {
    barrier_wait(shared_address(&shared_.item_full[0]), 0);
    load_queries(shared_.items[0]);
    uint32_t number = 0;
    float scores[64];
    start(shared_.items[0], number, scores);
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
      const PrefillItem& item = shared_.items[n % kItemsAhead];
      products_wait<0>();
      pin(scores);
      if (item.kv_head < 0) return;
      attend(item, number, n, scores);
      number += item.tiles;
      barrier_arrive(shared_address(&shared_.item_empty[n % kItemsAhead]));  // every thread has read it
    }
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

  __device__ __forceinline__ Descriptor values(uint32_t stage) const {
    return descriptor_columns(shared_address(shared_.values[stage]), kPrefillKeys * 128);
  }

  // Step k of the eight of a tile: 16 keys.
  static __device__ __forceinline__ void multiply_values(int k, const Descriptor& values,
                                                         const uint32_t (&weights)[8][4], float (&sums)[kSums]) {
    product<T>(sums, weights[k], values.behind(k * (16 * 128)), true);
  }

  // Scores of the tile whose keys begin at `first`: capped, and -inf where a row does not see the key.
  __device__ __forceinline__ void mask(int first, const int (&ends)[2], float (&scores)[64]) const {
    if (args_.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < 64; ++i) scores[i] = tanh_fast(__fmul_rn(scores[i], args_.scale));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = ends[r] - first - 2 * t_, begin = first_key(ends[r]) - first - 2 * t_;
#pragma unroll
      for (int i = 2 * r; i < 64; i += i % 2 == 0 ? 1 : 3) {
        const int key = i / 4 * 8 + i % 2;
        if (key >= end || key < begin) scores[i] = minus_infinity();
      }
    }
  }

  // The new maximum of the rows, and the factor by which sums so far shrink.
  __device__ __forceinline__ void find_maximum(const float (&scores)[64], RowPair& state, float (&decay)[2],
                                               Softening& s) const {
    float top[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2][i % 2] = scores[i];
#pragma unroll
    for (int i = 4; i < 64; ++i) top[i / 2 % 2][i % 2] = fmaxf(top[i / 2 % 2][i % 2], scores[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = fmaxf(state.maximum[r], quad_max(fmaxf(top[r][0], top[r][1])));
      const float used = finite_or_zero(maximum);
      decay[r] = exp2_fast(__fmul_rn(__fsub_rn(state.maximum[r], used), factor_));
      state.maximum[r] = maximum;
      s.shift[r] = __fmul_rn(used, factor_);
      s.total[r] = 0.0f;
    }
  }

  // Step k of the eight of a tile: scores of 16 keys to weights, in place.
  __device__ __forceinline__ void soften(int k, float (&scores)[64], Softening& s) const {
#pragma unroll
    for (int i = 8 * k; i < 8 * k + 8; ++i) {
      // In this order, between products: `volatile` keeps the compiler from gathering them at one end.
      asm volatile("ex2.approx.ftz.f32 %0, %1;"
                   : "=f"(scores[i])
                   : "f"(__fmaf_rn(scores[i], factor_, -s.shift[i / 2 % 2])));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const e = scores + 8 * k + 2 * r;
      s.total[r] = __fadd_rn(s.total[r], __fadd_rn(__fadd_rn(e[0], e[1]), __fadd_rn(e[4], e[5])));
    }
  }

  static __device__ __forceinline__ void add_weights(const float (&decay)[2], const Softening& s, RowPair& state) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.weight[r] = __fmaf_rn(state.weight[r], decay[r], s.total[r]);
    }
  }

  static __device__ __forceinline__ void pack_weights(const float (&scores)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
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
    barrier_wait(shared_address(&shared_.item_full[(n + 1) % kItemsAhead]), (n + 1) / kItemsAhead & 1);
    load_queries(shared_.items[(n + 1) % kItemsAhead]);
  }

  __device__ __forceinline__ void wait_tile(uint64_t (&full)[kPrefillStages], uint32_t tile) const {
    barrier_wait(shared_address(&full[tile % kPrefillStages]), tile / kPrefillStages & 1);
  }

  __device__ __forceinline__ void attend(const PrefillItem& item, uint32_t number, uint32_t n, float (&scores)[64]) {
    const int row = group_ * 64 + warp_ * 16 + lane_ / 4;
    const int ends[2] = {row_end(item, row), row_end(item, row + 8)};
    const int tiles = item.tiles;
    const int first_tile = item.first_tile;
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    RowPair state = {{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}}, saved = state;
    bool any_saved = false;

    if (tiles == 0 || group_ * 64 >= item.rows) {  // without rows a group only passes tiles on
      load_next_queries(n);
      for (int i = 0; i < tiles; ++i) {
        wait_tile(shared_.key_full, number + i);
        release(&shared_.key_empty[(number + i) % kPrefillStages]);
        wait_tile(shared_.value_full, number + i);
        release(&shared_.value_empty[(number + i) % kPrefillStages]);
      }
    } else {
      // Tiles [full_begin, full_end), counted from the item's first, are seen whole by all rows of the group, or by
      // none of those that count.
      const int group_rows = min(item.rows - group_ * 64, 64);
      const int least_end = row_end(item, group_ * 64),
                most_begin = first_key(row_end(item, group_ * 64 + group_rows - 1));
      const int full_begin = args_.cap > 0.0f ? tiles : (most_begin + kPrefillKeys - 1) / kPrefillKeys - first_tile;
      const int full_end = least_end / kPrefillKeys - first_tile;
      const auto masked = [&](int i) { return i < full_begin || i >= full_end; };

      uint32_t weights[8][4];
      float decay[2];
      Softening s;
      release(&shared_.key_empty[number % kPrefillStages]);
      if (tiles == 1) load_next_queries(n);
      if (masked(0)) mask(first_tile * kPrefillKeys, ends, scores);
      find_maximum(scores, state, decay, s);
#pragma unroll
      for (int k = 0; k < 8; ++k) soften(k, scores, s);
      add_weights(decay, s, state);
      pack_weights(scores, weights);
      decay[0] = decay[1] = 1.0f;

      // kPlain: every row of the group sees the whole tile, and it is not the item's last.
      const auto step = [&](int i, auto constant) {
        constexpr bool kPlain = decltype(constant)::value;
        const uint32_t stage = (number + i) % kPrefillStages, before = (number + i - 1) % kPrefillStages;
        wait_tile(shared_.key_full, number + i);
        pin(scores);
        products_fence();
        multiply_keys(stage, scores);
        products_commit();
        // Mostly nothing shrinks: times one changes no bit.
        if (__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) shrink(sums, decay);
        wait_tile(shared_.value_full, number + i - 1);
        products_wait<0>();
        pin(scores);
        release(&shared_.key_empty[stage]);
        if (!kPlain && i + 1 == tiles) load_next_queries(n);
        pin(sums);
        products_fence();
        const Descriptor v = values(before);
#pragma unroll
        for (int k = 0; k < kEarlySteps; ++k) multiply_values(k, v, weights, sums);
        const bool fresh = (first_tile + i) % kPrefillSplitTiles == 0;
        RowPair split = state;
        if (fresh) state = {{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
        if (kEarlySteps == 8) products_commit();
        if (!kPlain && masked(i)) mask((first_tile + i) * kPrefillKeys, ends, scores);
        find_maximum(scores, state, decay, s);
        // The products of the values are asked for one by one: what is not asked for does not keep the warp waiting.
        products_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k == kWaitStep) {
            products_wait<0>();
            pin(sums);
            release(&shared_.value_empty[before]);
          }
          soften(k, scores, s);
          if (k >= kWaitStep) {
            for (int j = (k - kWaitStep) * kWaitStep / (8 - kWaitStep);
                 j < (k - kWaitStep + 1) * kWaitStep / (8 - kWaitStep); ++j)
              pack_step(j, scores, weights);
            pack_step(k, scores, weights);
          }
          if (k + kEarlySteps < 8) {
            products_fence();
            multiply_values(k + kEarlySteps, v, weights, sums);
            if (k + kEarlySteps == 7) products_commit();
          }
        }
        add_weights(decay, s, state);
        if (fresh) {
          merge(saved, any_saved, split, sums);
          this->keep(sums);
          any_saved = true;
          decay[0] = decay[1] = 1.0f;
        }
      };
      // The rare steps have code of their own, so that what is repeated lies together.
      const int plain_begin = max(full_begin, 1), plain_end = min(full_end, tiles - 1);
#pragma unroll 1
      for (int i = 1; i < tiles; ++i) {
        if (kDim == 64 && i >= plain_begin) {  // with D = 128 that is 1% slower
#pragma unroll 1
          for (; i < plain_end; ++i) step(i, std::true_type());
        }
        step(i, std::false_type());
      }

      const uint32_t last = (number + tiles - 1) % kPrefillStages;
      wait_tile(shared_.value_full, number + tiles - 1);
      const int left = item.kv_len - (first_tile + tiles - 1) * kPrefillKeys;
      if (left < kPrefillKeys) clear_tail(last, left, item.rows);
      shrink(sums, decay);
      pin(sums);
      products_fence();
      const Descriptor v = values(last);
#pragma unroll
      for (int k = 0; k < 8; ++k) multiply_values(k, v, weights, sums);
      products_commit();
      products_wait<0>();
      pin(sums);
      release(&shared_.value_empty[last]);
    }
    start(shared_.items[(n + 1) % kItemsAhead], number + tiles, scores);
    merge(saved, any_saved, state, sums);
    if (item.splits == 0) {
      this->store(item, row, ends, saved, sums);
    } else if (tiles > 0) {
      this->store_partial(item, row, saved, sums);
    }
  }

  static __device__ __forceinline__ void shrink(float (&sums)[kSums], const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __fmul_rn(sums[i], decay[i / 2 % 2]);
  }

  const bool wide_q_;
  const float factor_ = args_.cap > 0.0f ? args_.cap : args_.scale;
  const int window_ =
      args_.window_left < 0 || args_.window_left > INT32_MAX ? INT32_MAX : static_cast<int>(args_.window_left);
};

}  // namespace punica::cuda::prefill

#endif
