// Attention over the paged cache: what one task does. The inner loops are in attention-inl.h.
#include "src/cpu/attention_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "src/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/attention_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/simd-inl.h"
//
#include "src/cpu/bf16_dot-inl.h"
//
#include "src/cpu/attention-inl.h"
//
#include "src/cpu/rope-inl.h"

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {
namespace {

// Rows of q that one task computes: pairs (query, head of the group) of a run of KV heads, in that order within each.
struct TileRows {
  int64_t sequence;
  int64_t kv_head;  // the first
  int64_t num_kv_heads;
  int64_t rows_per_kv_head;
  int64_t count;
  KeyRange keys;                 // of all rows together
  KeyRange row_keys[kTileRows];  // what each sees
  int64_t query[kTileRows];      // row of q and o
  int64_t head[kTileRows];       // of q and o
  int64_t position[kTileRows];   // of the query in its sequence
};

TileRows tile_rows(const AttentionPlan& plan, int64_t sequence, int64_t run, int64_t tile) {
  const int64_t q_len = plan.num_queries(sequence), group_size = plan.group_size();
  const int64_t kv_len = plan.params->kv.sequence(sequence).kv_len;
  TileRows rows;
  rows.sequence = sequence;
  rows.kv_head = run * plan.kv_heads_per_tile;
  rows.num_kv_heads = std::min(plan.kv_heads_per_tile, plan.num_kv_heads() - rows.kv_head);
  rows.rows_per_kv_head = std::min(kTileRows, q_len * group_size - tile * kTileRows);
  rows.count = rows.num_kv_heads * rows.rows_per_kv_head;
  rows.keys = {0, 0};
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t kv_head = rows.kv_head + r / rows.rows_per_kv_head;
    const int64_t pair = tile * kTileRows + r % rows.rows_per_kv_head;
    const int64_t query = pair / group_size;
    rows.query[r] = plan.row_begin(sequence) + query;
    rows.head[r] = kv_head * group_size + pair % group_size;
    rows.position[r] = kv_len - q_len + query;
    const KeyRange keys = plan.keys_of(rows.position[r]);
    rows.row_keys[r] = keys;
    if (keys.empty()) continue;
    if (rows.keys.empty()) rows.keys = keys;
    rows.keys = {std::min(rows.keys.begin, keys.begin), std::max(rows.keys.end, keys.end)};
  }
  return rows;
}

// Works through the keys of one tile. KT is the type of the keys as they enter the dot products: T, or float32 once
// they are rotated. Lives on the stack of the thread, 250 KiB at most; what a call does not need is not touched.
template <class T, class KT, bool kNative>
class TileAttention {
 public:
  TileAttention(const AttentionPlan& plan, const Rope* rope, const TileRows& rows)
      : plan_(plan),
        params_(*plan.params),
        rope_(rope),
        rows_(rows),
        head_dim_(plan.head_dim()),
        padded_dim_((head_dim_ + kPair - 1) / kPair * kPair),
        sequence_(params_.kv.sequence(rows.sequence)) {
    constexpr double kLog2E = 1.442695040888963407360;
    const double scale = params_.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim_)));
    const double cap = params_.logits_soft_cap;
    map_ = cap > 0 ? ScoreMap{static_cast<float>(scale / cap), static_cast<float>(cap * kLog2E)}
                   : ScoreMap{static_cast<float>(scale * kLog2E)};
    const PageShape shape = params_.kv.page_shape(head_dim_);
    key_offset_ = shape.head_offset(params_.kv.layer_idx, KvPart::kKey, rows.kv_head);
    value_offset_ = shape.head_offset(params_.kv.layer_idx, KvPart::kValue, rows.kv_head) - key_offset_;
    head_stride_ = shape.head_offset(0, KvPart::kKey, 1);
    const int64_t bytes_ahead = rows.rows_per_kv_head > 2 * kRowTile ? kBytesAhead / 3 : kBytesAhead;
    step_ =
        std::clamp<int64_t>(bytes_ahead / (head_dim_ * int64_t{sizeof(T)}), kTimesAsked, kMaxRowsAhead) / kTimesAsked;
    load_queries();
    if (head_dim_ != padded_dim_) {
      if (rope == nullptr) std::memset(key_scratch_, 0, static_cast<size_t>(kBlockTokens * padded_dim_) * sizeof(KT));
      std::memset(value_scratch_, 0, static_cast<size_t>(kBlockTokens * padded_dim_) * sizeof(T));
    }
  }

  // Partial results of all rows over the splits [begin, end), which the tile sees keys of, merged in order.
  void attend(int64_t begin, int64_t end) {
    const int64_t first = std::max(begin * kSplitTokens, rows_.keys.begin / kBlockTokens * kBlockTokens);
    const int64_t last = std::min(end * kSplitTokens, rows_.keys.end);
    find_block(first, next_rows());
    for (int64_t j = 0; j < step_; ++j) RowsAhead<T>{next_rows() - step_, step_}.ask(j, head_dim_);
    start_split(total_, total_sums_);
    for (int64_t block = first; block < last; block += kBlockTokens) {
      const bool in_total = block / kSplitTokens == begin;
      if (!in_total && block % kSplitTokens == 0) start_split(part_, part_sums_);
      for (int64_t i = 0; i < rows_.num_kv_heads; ++i) {
        std::copy_n(next_rows(), 2 * kBlockTokens, block_rows_);
        if (i + 1 < rows_.num_kv_heads) {
          for (int64_t j = 0; j < 2 * kBlockTokens; ++j) next_rows()[j] = block_rows_[j] + head_stride_;
        } else if (block + kBlockTokens < last) {
          find_block(block + kBlockTokens, next_rows());
        }
        attend_block(block, i * rows_.rows_per_kv_head, in_total ? total_ : part_, in_total ? total_sums_ : part_sums_);
      }
      const bool ends = block + kBlockTokens >= last || (block + kBlockTokens) % kSplitTokens == 0;
      if (in_total || !ends) continue;
      for (int64_t r = 0; r < rows_.count; ++r) merge_rows(total_[r], part_[r], padded_dim_);
    }
  }

  // Writes partial results where a later task finds them: row r at partials + head * partial_stride.
  void save(float* partials) const {
    const int64_t stride = partial_stride(head_dim_);
    for (int64_t r = 0; r < rows_.count; ++r) {
      float* to = partials + rows_.head[r] * stride;
      std::memcpy(to, total_[r].sum, static_cast<size_t>(padded_dim_) * sizeof(float));
      to[stride - 2] = total_[r].max;
      to[stride - 1] = total_[r].denominator;
    }
  }

  // The saved partial results of `count` splits, split_stride apart, merged in order.
  void restore(float* partials, int64_t split_stride, int64_t count) {
    const int64_t stride = partial_stride(head_dim_);
    for (int64_t r = 0; r < rows_.count; ++r) {
      for (int64_t split = 0; split < count; ++split) {
        float* from = partials + split * split_stride + rows_.head[r] * stride;
        const SoftmaxRow row = {from[stride - 2], from[stride - 1], from};
        if (split == 0) {
          total_[r] = row;
        } else {
          merge_rows(total_[r], row, padded_dim_);
        }
      }
    }
  }

  // Rounds and writes o and lse.
  void finish() const {
    const TensorView &o = params_.o, &lse = params_.lse;
    for (int64_t r = 0; r < rows_.count; ++r) {
      T* to = o.as<T>() + rows_.query[r] * o.stride[0] + rows_.head[r] * o.stride[1];
      float log_sum = kMinusInfinity;
      if (rows_.row_keys[r].empty()) {
        std::memset(to, 0, static_cast<size_t>(head_dim_) * sizeof(T));
      } else {
        alignas(64) T row[kMaxHeadDim];
        const VF denominator = broadcast(total_[r].denominator);
        for (int64_t d = 0; d < padded_dim_; d += kPair) {
          store_pair(hn::Div(load(total_[r].sum + d), denominator),
                     hn::Div(load(total_[r].sum + d + kLanes), denominator), row + d);
        }
        std::memcpy(to, row, static_cast<size_t>(head_dim_) * sizeof(T));
        log_sum = total_[r].max + std::log2(total_[r].denominator);
      }
      if (lse.has_value()) {
        lse.as<float>()[rows_.query[r] * lse.stride[0] + rows_.head[r] * lse.stride[1]] = log_sum;
      }
    }
  }

 private:
  // q of every row, in the form that score_block takes.
  void load_queries() {
    for (int64_t r = 0; r < rows_.count; ++r) {
      const T* q = params_.q.as<const T>() + rows_.query[r] * params_.q.stride[0] + rows_.head[r] * params_.q.stride[1];
      alignas(64) T row[kMaxHeadDim] = {};
      std::memcpy(row, q, static_cast<size_t>(head_dim_) * sizeof(T));
      if constexpr (kNative) {
        std::memcpy(native_queries() + r * padded_dim_, row, static_cast<size_t>(padded_dim_) * sizeof(T));
        continue;
      }
      float* to = queries_ + r * padded_dim_;
      if (rope_ != nullptr) {
        const int64_t position = std::max<int64_t>(rows_.position[r], 0);
        rope_->move_to(position, place_);
        rope_->rotate(row, position, place_, to);
        std::fill(to + head_dim_, to + padded_dim_, 0.0f);
        continue;
      }
      for (int64_t d = 0; d < padded_dim_; d += kPair) {
        VF a, b;
        load_pair(row + d, a, b);
        store(a, to + d);
        store(b, to + d + kLanes);
      }
    }
  }
  bfloat16_t* native_queries() { return reinterpret_cast<bfloat16_t*>(queries_); }

  // Of the keys of the block from token `block` on, those that the tile sees.
  KeyRange seen_in(int64_t block) const {
    return {std::max<int64_t>(rows_.keys.begin - block, 0), std::min(rows_.keys.end - block, kBlockTokens)};
  }

  // Where the keys and then the values of a block lie, of the first head and of those that the tile sees. The places of
  // all others repeat one that is seen: score_block takes whole vectors of keys.
  void find_block(int64_t block, const T** rows) const {
    const KeyRange seen = seen_in(block);
    const int64_t* kv_ptrs = params_.kv.kv_ptrs.template as<const int64_t>() + sequence_.first_page;
    TokenPlace place = token_place(block + seen.begin, params_.kv.page_size);
    for (int64_t j = seen.begin; j < seen.end;) {
      const T* key = reinterpret_cast<const T*>(kv_ptrs[place.page]) + key_offset_ + place.slot * head_dim_;
      const int64_t run_end = std::min(seen.end, j + params_.kv.page_size - place.slot);
      for (; j < run_end; ++j, key += head_dim_) {
        rows[j] = key;
        rows[kBlockTokens + j] = key + value_offset_;
      }
      place = {place.page + 1, 0};
    }
    fill_unseen(seen, rows);
    fill_unseen(seen, rows + kBlockTokens);
  }
  // What to ask for while these rows, of block_rows_, are in use.
  RowsAhead<T> ahead_of(const T* const* rows) const { return {rows, step_}; }
  const T** next_rows() { return block_rows_ + 2 * kBlockTokens; }

  template <class Row>
  static void fill_unseen(KeyRange seen, Row* rows) {
    std::fill(rows, rows + seen.begin, rows[seen.begin]);
    std::fill(rows + seen.end, rows + kBlockTokens, rows[seen.begin]);
  }

  void start_split(SoftmaxRow* row, float* sums) const {
    for (int64_t r = 0; r < rows_.count; ++r) row[r] = {kMinusInfinity, 0.0f, sums + r * padded_dim_};
    std::memset(sums, 0, static_cast<size_t>(rows_.count * padded_dim_) * sizeof(float));
  }

  // The rows of one KV head, from row `first` on.
  void attend_block(int64_t block, int64_t first, SoftmaxRow* row, float* sums) {
    const KeyRange seen = seen_in(block);
    const KT* packed_keys[kBlockTokens];
    const T* packed_values[kBlockTokens];
    const KT* const* keys = packed_keys;
    const T* const* values = block_rows_ + kBlockTokens;
    RowsAhead<KT> keys_ahead;
    RowsAhead<T> values_ahead = ahead_of(values);
    if (rope_ != nullptr) {
      rotate_keys(block, seen, packed_keys);
    } else if constexpr (std::is_same_v<T, KT>) {
      if (head_dim_ == padded_dim_) {
        keys = block_rows_;
        keys_ahead = ahead_of(keys);
      } else {
        pack(block_rows_, seen, key_scratch_, packed_keys);
      }
    }
    if (head_dim_ != padded_dim_) {
      pack(values, seen, value_scratch_, packed_values);
      values = packed_values;
      values_ahead = {};
    }
    for (int64_t r = first; r < first + rows_.rows_per_kv_head;) {
      const int64_t left = first + rows_.rows_per_kv_head - r;
      const auto run = [&](auto count) {
        attend_rows<decltype(count)::value>(block, r, keys, values, keys_ahead, values_ahead, row, sums);
        r += decltype(count)::value;
      };
      if (left >= kRowTile) {
        run(std::integral_constant<int, kRowTile>());
      } else if (kRowTile > 3 && left == 3) {
        run(std::integral_constant<int, std::min(kRowTile, 3)>());
      } else if (left >= 2) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
      keys_ahead = {};
      values_ahead = {};
    }
  }

  // kRows rows from r on, which may see different parts of the block.
  template <int kRows>
  void attend_rows(int64_t block, int64_t r, const KT* const* keys, const T* const* values,
                   const RowsAhead<KT>& keys_ahead, const RowsAhead<T>& values_ahead, SoftmaxRow* row, float* sums) {
    alignas(64) float scores[kRows * kBlockTokens];
    KeyRange seen[kRows];
    KeyRange some = {kBlockTokens, 0}, all = {0, kBlockTokens};
    for (int m = 0; m < kRows; ++m) {
      const KeyRange& range = rows_.row_keys[r + m];
      seen[m] = {std::max<int64_t>(range.begin - block, 0), std::min(range.end - block, kBlockTokens)};
      all = {std::max(all.begin, seen[m].begin), std::min(all.end, seen[m].end)};
      if (!seen[m].empty()) some = {std::min(some.begin, seen[m].begin), std::max(some.end, seen[m].end)};
    }
    if (some.empty()) return;
    if constexpr (kNative) {
      score_block<KT, true, kRows>(native_queries() + r * padded_dim_, padded_dim_, keys, padded_dim_, some.begin,
                                   some.end, keys_ahead, scores);
    } else {
      score_block<KT, false, kRows>(queries_ + r * padded_dim_, padded_dim_, keys, padded_dim_, some.begin, some.end,
                                    keys_ahead, scores);
    }
    float decay[kRows];
    RowsAhead<T> last_keys;
    if (values_ahead) last_keys = ahead_of(block_rows_ + kAheadInScores);
    softmax_block<kRows>(scores, seen, map_, row + r, decay, last_keys, head_dim_);
    float* sum = sums + r * padded_dim_;
    if (all.begin == some.begin && all.end == some.end) {
      add_values<T, kRows>(decay, scores, values, padded_dim_, all.begin, all.end, values_ahead, sum, padded_dim_);
      return;
    }
    // A value that a row does not see may be infinite, so its weight of zero is not enough: a row alone takes the keys
    // that the others do not see. Every row adds its keys in ascending order either way.
    if (all.empty()) all = {kBlockTokens, kBlockTokens};
    const auto add_alone = [&](int m, int64_t begin, int64_t end) {
      add_values<T, 1>(decay + m, scores + m * kBlockTokens, values, padded_dim_, begin, end, {}, sum + m * padded_dim_,
                       padded_dim_);
    };
    for (int m = 0; m < kRows; ++m) {
      scale_sum(decay[m], padded_dim_, sum + m * padded_dim_);
      decay[m] = 1.0f;
      add_alone(m, seen[m].begin, std::min(seen[m].end, all.begin));
    }
    add_values<T, kRows>(decay, scores, values, padded_dim_, all.begin, all.end, values_ahead, sum, padded_dim_);
    for (int m = 0; m < kRows; ++m) add_alone(m, std::max(seen[m].begin, all.end), seen[m].end);
  }

  // Copies rows whose length is not whole pairs of vectors to where zeros lie behind each.
  void pack(const T* const* source, KeyRange seen, T* scratch, const T** rows) const {
    const int64_t row_bytes = head_dim_ * int64_t{sizeof(T)};
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      T* to = scratch + j * padded_dim_;
      ahead_of(source).ask(j, head_dim_);
      copy_bytes(reinterpret_cast<const uint8_t*>(source[j]), row_bytes, reinterpret_cast<uint8_t*>(to));
      rows[j] = to;
    }
    fill_unseen(seen, rows);
  }

  // memcpy of few bytes, without the call: whole vectors, the last of which may overlap the one before.
  static HWY_INLINE void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
    const hn::ScalableTag<uint8_t> d;
    constexpr int64_t kStep = HWY_LANES(uint8_t);
    if (count < kStep) {
      std::memcpy(to, from, static_cast<size_t>(count));
      return;
    }
    for (int64_t i = 0; i + kStep <= count; i += kStep) hn::StoreU(hn::LoadU(d, from + i), d, to + i);
    hn::StoreU(hn::LoadU(d, from + count - kStep), d, to + count - kStep);
  }

  void rotate_keys(int64_t block, KeyRange seen, const KT** rows) {
    if constexpr (std::is_same_v<KT, float>) {
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        float* to = key_scratch_ + j * padded_dim_;
        ahead_of(block_rows_).ask(j, head_dim_);
        rope_->move_to(block + j, place_);
        rope_->rotate(block_rows_[j], block + j, place_, to);
        std::fill(to + head_dim_, to + padded_dim_, 0.0f);
        rows[j] = to;
      }
      fill_unseen(seen, rows);
    }
  }

  const AttentionPlan& plan_;
  const AttentionParams& params_;
  const Rope* rope_;
  const TileRows& rows_;
  const int64_t head_dim_;
  const int64_t padded_dim_;  // whole pairs of vectors
  const SequencePages sequence_;
  ScoreMap map_;
  int64_t key_offset_, value_offset_;  // elements: from a page to the keys of the first head, from these to the values
  int64_t head_stride_;                // elements: from a head to the next
  int64_t step_;                       // rows, see RowsAhead
  // The keys and values of a block of one head in the order of their use; behind them those that come next.
  const T* block_rows_[4 * kBlockTokens];

  Rope::Place place_;
  SoftmaxRow total_[kTileRows], part_[kTileRows];
  alignas(64) float queries_[kTileRows * kMaxHeadDim];
  alignas(64) float total_sums_[kTileRows * kMaxHeadDim];
  alignas(64) float part_sums_[kTileRows * kMaxHeadDim];
  alignas(64) KT key_scratch_[kBlockTokens * kMaxHeadDim];
  alignas(64) T value_scratch_[kBlockTokens * kMaxHeadDim];
};

template <class T, class KT, bool kNative>
void run_task(const AttentionPlan& plan, const Rope* rope, int64_t task) {
  const int64_t num_sequences = plan.params->kv.num_sequences();
  const int64_t sequence =
      std::upper_bound(plan.first_task, plan.first_task + num_sequences + 1, task) - plan.first_task - 1;
  const int64_t tiles_per_run = plan.tiles_per_run(plan.num_queries(sequence));
  const int64_t local = task - plan.first_task[sequence];
  if (plan.partials == nullptr) {
    // Late tiles see the most keys: they start first.
    const TileRows rows = tile_rows(plan, sequence, local / tiles_per_run, tiles_per_run - 1 - local % tiles_per_run);
    TileAttention<T, KT, kNative> attention(plan, rope, rows);
    if (!rows.keys.empty()) {
      attention.attend(rows.keys.begin / kSplitTokens, (rows.keys.end + kSplitTokens - 1) / kSplitTokens);
    }
    attention.finish();
    return;
  }
  // Decode: the tasks of a sequence are [tiles, splits]; a sequence without keys has one "split" that is empty.
  const KeyRange splits = plan.splits_of(plan.params->kv.sequence(sequence).kv_len - 1);
  const int64_t count = std::max<int64_t>(1, splits.end - splits.begin);
  const int64_t split = local % count, tile = local / count;
  const TileRows rows = tile_rows(plan, sequence, tile / tiles_per_run, tile % tiles_per_run);
  TileAttention<T, KT, kNative> attention(plan, rope, rows);
  if (!splits.empty()) attention.attend(splits.begin + split, splits.begin + split + 1);
  if (count > 1) {
    const int64_t tiles = plan.tiles(1);
    const int64_t split_stride = plan.num_heads() * partial_stride(plan.head_dim());
    float* partials = plan.partials + plan.first_task[sequence] / tiles * split_stride;
    attention.save(partials + split * split_stride);
    int32_t& pending = plan.pending[sequence * tiles + tile];
    if (std::atomic_ref<int32_t>(pending).fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    attention.restore(partials, split_stride, count);
  }
  attention.finish();
}

template <class T, class KT, bool kNative>
void run_tasks(const AttentionPlan& plan, const Rope* rope, int num_threads) {
  parallel_for(num_threads, plan.first_task[plan.params->kv.num_sequences()],
               [&](int64_t task) { run_task<T, KT, kNative>(plan, rope, task); });
}

template <class T, bool kNativeBf16>
void run(const AttentionPlan& plan, int num_threads) {
  PUNICA_RECORD_ISA(kNativeBf16);
  constexpr bool kNative = kNativeBf16 && std::is_same_v<T, bfloat16_t>;
  if (plan.params->rope_theta) {
    const Rope rope(*plan.params);
    run_tasks<T, float, false>(plan, &rope, num_threads);
  } else {
    run_tasks<T, T, kNative>(plan, nullptr, num_threads);
  }
}

template <bool kNativeBf16>
const AttentionKernels* table() {
  static constexpr AttentionKernels kernels = {run<float16_t, kNativeBf16>, run<bfloat16_t, kNativeBf16>,
                                               run<float, kNativeBf16>};
  return &kernels;
}

const AttentionKernels* kernels() { return table<false>(); }
#if HWY_TARGET == HWY_AVX3
const AttentionKernels* kernels_bf16() { return table<true>(); }
#endif

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace punica::cpu {

const AttentionKernels* attention_kernels(Isa isa) { return PUNICA_SELECT_KERNELS(isa); }

}  // namespace punica::cpu
#endif  // HWY_ONCE
