// What the entry points of attention hand to the kernels: which task is which part of the batch.
//
// The arithmetic of a query is fixed by its position alone: keys are taken in blocks of kBlockTokens and splits of
// kSplitTokens, both counted from position 0; the splits' partial results are merged from left to right. Tasks only
// choose who computes what: bits do not depend on them.
#pragma once

#include <cstdint>

#include "src/cpu/backend.h"
#include "src/cpu/isa.h"

namespace punica::cpu {

inline constexpr int64_t kBlockTokens = 64;   // one step of the online softmax
inline constexpr int64_t kSplitTokens = 512;  // keys whose partial result starts from nothing; whole blocks
inline constexpr int64_t kTileRows = 32;      // (query, head) pairs of one task at most
inline constexpr int64_t kMaxHeadDim = 256;

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin;
  int64_t end;
  bool empty() const { return begin >= end; }
};

// Float32 numbers of a partial result: D sums in whole vectors of any instruction set, the maximum, the denominator.
constexpr int64_t partial_stride(int64_t head_dim) { return (head_dim + 31) / 32 * 32 + 16; }

// One call. Tasks of sequence i are [first_task[i], first_task[i + 1]).
struct AttentionPlan {
  const AttentionParams* params;
  const int32_t* qo_indptr;   // null in decode: row i is the one query of sequence i
  const int64_t* first_task;  // [B + 1]

  // Adjacent KV heads of one task, whose keys lie side by side in a page. More than one only if their rows of any
  // sequence fit into a tile.
  int64_t kv_heads_per_tile = 1;

  // Decode whose splits are tasks of their own; null where one task takes all splits of its rows in turn.
  float* partials = nullptr;   // [splits of all sequences, H, partial_stride]
  int32_t* pending = nullptr;  // [B, tiles(1)], splits that have not ended; the task that ends the last one merges

  int64_t num_heads() const { return params->q.shape[1]; }
  int64_t head_dim() const { return params->q.shape[2]; }
  int64_t num_kv_heads() const { return params->kv.num_kv_heads; }
  int64_t group_size() const { return num_heads() / num_kv_heads(); }
  // Tiles of a sequence: [runs of KV heads, tiles_per_run].
  int64_t tiles_per_run(int64_t q_len) const { return (q_len * group_size() + kTileRows - 1) / kTileRows; }
  int64_t tiles(int64_t q_len) const {
    return (num_kv_heads() + kv_heads_per_tile - 1) / kv_heads_per_tile * tiles_per_run(q_len);
  }

  // The rows of q of sequence i, within q whatever the table holds.
  int64_t row_begin(int64_t i) const { return qo_indptr == nullptr ? i : clamp_row(qo_indptr[i]); }
  int64_t num_queries(int64_t i) const {
    if (qo_indptr == nullptr) return 1;
    const int64_t rows = clamp_row(qo_indptr[i + 1]) - clamp_row(qo_indptr[i]);
    return rows > 0 ? rows : 0;
  }
  // What the query at `position` sees; nothing before position 0.
  KeyRange keys_of(int64_t position) const {
    const bool all = params->window_left < 0 || params->window_left >= position;
    return {all ? 0 : position - params->window_left, position < 0 ? 0 : position + 1};
  }
  // Splits that the query at `position` sees keys of.
  KeyRange splits_of(int64_t position) const {
    const KeyRange keys = keys_of(position);
    if (keys.empty()) return {0, 0};
    return {keys.begin / kSplitTokens, (keys.end + kSplitTokens - 1) / kSplitTokens};
  }

 private:
  int64_t clamp_row(int64_t row) const {
    const int64_t rows = params->q.shape[0];
    return row < 0 ? 0 : row > rows ? rows : row;
  }
};

struct AttentionKernels {
  using Run = void (*)(const AttentionPlan& plan, int num_threads);
  Run float16, bfloat16, float32;
};

const AttentionKernels* attention_kernels(Isa isa);

}  // namespace punica::cpu
