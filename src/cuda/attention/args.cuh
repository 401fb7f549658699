// What the attention kernels take: one call, with its pointers and sizes resolved.
#pragma once

#include <cstdint>

#include "punica/paged_kv.h"

namespace punica::cuda {

// The arithmetic of a query is fixed by its position: keys are taken in tiles and splits counted from position 0; the
// partial results of splits are merged from left to right, in one block or in merge_kernel, by the same function.
inline constexpr int kSplitTokens = 256;
inline constexpr int kMaxHeadDim = 256;

struct AttentionArgs {
  const int64_t* kv_ptrs;
  const int32_t* kv_indptr;
  const int32_t* last_page_offset;
  const int32_t* qo_indptr;  // null in decode: row i is the one query of sequence i
  const void* q;
  void* o;
  float* lse;  // may be null

  int64_t num_sequences, num_rows, num_page_ptrs, page_size;
  int64_t q_stride, o_stride;  // elements from row to row
  int64_t key_bytes;           // from a page to the keys of head 0
  int64_t value_bytes;         // from a key to its value
  int64_t head_bytes;          // from a head to the next in a page
  int64_t window_left;         // negative: all
  int32_t num_kv_heads, group_size, head_dim;
  int32_t head_tiles;  // decode: row tiles of one KV head's group
  float scale;         // without a cap: sm_scale * log2(e); with one: sm_scale / cap
  float cap;           // cap * log2(e), or 0

  // Decode: room for partial results of so many splits, [num_slots, H, D] sums and [num_slots, H] (maximum, sum of
  // weights). Where the sequences have more splits in all, blocks take whole sequences, which gives the same bits.
  int64_t num_slots;
  float* partial_sums;
  float2* partial_states;

  __host__ __device__ int64_t num_heads() const { return static_cast<int64_t>(num_kv_heads) * group_size; }

#ifdef __CUDACC__
  __device__ SequencePages pages(int64_t sequence) const {
    return sequence_pages(kv_indptr[sequence], kv_indptr[sequence + 1], last_page_offset[sequence], num_page_ptrs,
                          page_size);
  }
  __device__ int64_t row_begin(int64_t sequence) const {
    return qo_indptr == nullptr ? sequence : clamp_row(qo_indptr[sequence]);
  }
  __device__ int64_t num_queries(int64_t sequence) const {
    if (qo_indptr == nullptr) return 1;
    const int64_t rows = clamp_row(qo_indptr[sequence + 1]) - clamp_row(qo_indptr[sequence]);
    return rows > 0 ? rows : 0;
  }
  // What the tables say of a sequence of prefill. All is asked for before any of it is looked at: looking waits, and
  // the compiler would have one trip to memory follow the other.
  struct Entry {
    SequencePages pages;
    int64_t row_begin, num_queries;
  };
  __device__ __forceinline__ Entry entry(int64_t sequence) const {
    const int32_t begin = load_word(kv_indptr + sequence), end = load_word(kv_indptr + sequence + 1);
    const int32_t last = load_word(last_page_offset + sequence);
    const int32_t row = load_word(qo_indptr + sequence), row_end = load_word(qo_indptr + sequence + 1);
    const int64_t first_row = clamp_row(row), rows = clamp_row(row_end) - first_row;
    return {sequence_pages(begin, end, last, num_page_ptrs, page_size), first_row, rows > 0 ? rows : 0};
  }
  // The query at `position` sees keys [first_key(position), position + 1); none where position is negative.
  __device__ int64_t first_key(int64_t position) const {
    return window_left < 0 || window_left >= position ? 0 : position - window_left;
  }
  // Decode: partial results of a sequence with so many keys, 1 for one without: its output is written too.
  __device__ int64_t num_splits(int64_t kv_len) const {
    if (kv_len == 0) return 1;
    return (kv_len - 1) / kSplitTokens - first_key(kv_len - 1) / kSplitTokens + 1;
  }

 private:
  __device__ __forceinline__ static int32_t load_word(const int32_t* from) {
    int32_t word;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
  }
  __device__ int64_t clamp_row(int64_t row) const { return row < 0 ? 0 : (row > num_rows ? num_rows : row); }
#endif
};

// Rotary embedding: turns a token of each pair of elements, in units of 2^-64. Products with a position wrap around,
// which is what whole turns do: the angle is exact to 2^-64 * position turns whatever the position.
struct RopeTable {
  uint64_t turns[kMaxHeadDim / 2];
};
struct NoRope {};

}  // namespace punica::cuda
