// Writes of keys and values into the paged KV cache.
#pragma once

#include "punica/context.h"
#include "punica/paged_kv.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// The len_i = seqlen_indptr[i + 1] - seqlen_indptr[i] tokens of sequence i become the last len_i positions of it.
// Sequences without pages are skipped.
struct InitKvParams {
  PagedKv kv;
  TensorView k;              // T [>= seqlen_indptr[B], num_kv_heads, head_dim], rows may be strided
  TensorView v;              // like k
  TensorView seqlen_indptr;  // int32 [B + 1]
};

// Token i becomes the last position of sequence i. Sequences without pages are skipped.
struct AppendKvParams {
  PagedKv kv;
  TensorView k;  // T [B, num_kv_heads, head_dim], rows may be strided
  TensorView v;  // like k
};

Status validate(const InitKvParams& params);
Status validate(const AppendKvParams& params);

Status init_kv(const InitKvParams& params, const Context& context);
Status append_kv(const AppendKvParams& params, const Context& context);

}  // namespace punica
