// Rules of the paged KV cache, which attention and kv_cache share.
#pragma once

#include <cstdint>

#include "punica/paged_kv.h"
#include "src/common/check.h"

namespace punica {

// Shapes and ranges of the tables and scalars, for pages of `dtype` and `head_dim`; call it after check.data().
bool check_paged_kv(Check& check, const PagedKv& kv, int64_t num_sequences, int64_t head_dim, DType dtype);

// 2, 4 .. 256; `name` is the tensor that has it as its last extent.
bool check_head_dim(Check& check, const char* name, int64_t head_dim);

// The rest reads the tables, in host memory.

// kv_indptr[i], kv_indptr[i + 1] and last_page_offset[i].
bool check_sequence(Check& check, const PagedKv& kv, int64_t i);

// indptr[i], indptr[i + 1] of a tensor that divides `rows` rows.
bool check_rows(Check& check, const char* name, const TensorView& indptr, int64_t i, int64_t rows,
                const char* rows_name);

// The addresses of the pages that hold tokens [first, kv_len) of a checked sequence.
bool check_pages(Check& check, const PagedKv& kv, const SequencePages& sequence, int64_t first);

}  // namespace punica
