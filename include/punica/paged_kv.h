// The paged KV cache: where a token's key and value lie. The only place that knows; host and device code include it.
//
// A page is one contiguous block [num_layers, 2, num_kv_heads, page_size, head_dim] (index 0 of the second dimension is
// K, 1 is V). Pages come from anywhere: the table kv_ptrs holds one address a page, and the pages of sequence i are
// kv_ptrs[kv_indptr[i] : kv_indptr[i + 1]].
#pragma once

#include <cstdint>

#include "punica/types.h"

#ifdef __CUDACC__
#define PUNICA_HOST_DEVICE __host__ __device__
#else
#define PUNICA_HOST_DEVICE
#endif

namespace punica {

// Pages are aligned to this many bytes at least.
inline constexpr int64_t kPageAlignment = 16;

enum class KvPart : int { kKey = 0, kValue = 1 };

// Where token `position` of a sequence lies: slot `slot` of the sequence's page number `page`.
struct TokenPlace {
  int64_t page;
  int64_t slot;
};

PUNICA_HOST_DEVICE constexpr TokenPlace token_place(int64_t position, int64_t page_size) {
  return {position / page_size, position % page_size};
}

// Extents of one page.
struct PageShape {
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t page_size;  // tokens
  int64_t head_dim;

  // Elements from the start of a page to the [page_size, head_dim] block of one layer, part and head.
  PUNICA_HOST_DEVICE constexpr int64_t head_offset(int64_t layer, KvPart part, int64_t head) const {
    return ((layer * 2 + static_cast<int>(part)) * num_kv_heads + head) * page_size * head_dim;
  }
  // Elements of a whole page.
  PUNICA_HOST_DEVICE constexpr int64_t num_elements() const { return head_offset(num_layers, KvPart::kKey, 0); }
};

// The pages of one sequence and the number of tokens in them. All zero for an empty sequence.
struct SequencePages {
  int64_t first_page;  // index into kv_ptrs
  int64_t num_pages;
  int64_t kv_len;  // tokens
};

// Reads a sequence's entry of the tables. Malformed entries never lead out of kv_ptrs: the bounds are clamped to
// [0, num_page_ptrs], and a decreasing kv_indptr or a last_page_offset outside [1, page_size] makes the sequence empty.
PUNICA_HOST_DEVICE constexpr SequencePages sequence_pages(int64_t indptr_begin, int64_t indptr_end,
                                                          int64_t last_page_offset, int64_t num_page_ptrs,
                                                          int64_t page_size) {
  const int64_t begin = indptr_begin < 0 ? 0 : (indptr_begin > num_page_ptrs ? num_page_ptrs : indptr_begin);
  const int64_t end = indptr_end < 0 ? 0 : (indptr_end > num_page_ptrs ? num_page_ptrs : indptr_end);
  if (end <= begin || last_page_offset < 1 || last_page_offset > page_size) return {0, 0, 0};
  return {begin, end - begin, (end - begin - 1) * page_size + last_page_offset};
}

// The cache as the operations take it: B sequences, one page table, one layer of the pages.
struct PagedKv {
  TensorView kv_ptrs;           // int64 [>= kv_indptr[B]], page addresses
  TensorView kv_indptr;         // int32 [B + 1]
  TensorView last_page_offset;  // int32 [B], tokens in the last page, 1 .. page_size
  int64_t num_layers = 0;
  int64_t layer_idx = 0;
  int64_t num_kv_heads = 0;
  int64_t page_size = 0;

  int64_t num_sequences() const { return last_page_offset.shape[0]; }
  PageShape page_shape(int64_t head_dim) const { return {num_layers, num_kv_heads, page_size, head_dim}; }

  // Host memory only: the tables are read. (Device code calls the free function on its own pointers.)
  SequencePages sequence(int64_t i) const {
    const int32_t* indptr = kv_indptr.as<const int32_t>();
    return sequence_pages(indptr[i], indptr[i + 1], last_page_offset.as<const int32_t>()[i], kv_ptrs.shape[0],
                          page_size);
  }
};

}  // namespace punica
