// Attention over the paged KV cache, grouped-query, causal.
#pragma once

#include <cstdint>
#include <optional>

#include "punica/context.h"
#include "punica/paged_kv.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// What prefill and decode share. T is float16, bfloat16 or float32; H = num_qo_heads is a multiple of kv.num_kv_heads;
// D = head_dim is even and at most 256.
struct AttentionParams {
  PagedKv kv;
  TensorView o;       // T [rows, H, D], written; rows may be strided
  TensorView q;       // T [rows, H, D], rows may be strided
  TensorView tmpbuf;  // uint8 [>= workspace bytes], any alignment; absent: the CPU backend allocates, on CUDA an error
  TensorView lse;     // optional, float32 [rows, H], written: log-sum-exp of the scores in base 2 (-inf: no key seen)

  std::optional<double> sm_scale;    // factor of q . k; default 1 / sqrt(D)
  std::optional<double> rope_theta;  // rotate q and k (Llama halves) at angle position / rope_scale * theta^(-2 d / D)
  double rope_scale = 1.0;
  int64_t window_left = -1;      // a query sees only this many keys before its own position; -1: all
  double logits_soft_cap = 0.0;  // score = cap * tanh(score / cap) when > 0
};

// Query j of the q_len_i = qo_indptr[i + 1] - qo_indptr[i] queries of sequence i sees keys 0 .. kv_len - q_len_i + j;
// one that sees none gets zeros. Rows that no sequence covers stay as they are.
struct BatchPrefillParams : AttentionParams {
  TensorView qo_indptr;  // int32 [B + 1]
};

// Row i is the one query of sequence i, at position kv_len - 1.
struct BatchDecodeParams : AttentionParams {};

Status validate(const BatchPrefillParams& params);
Status validate(const BatchDecodeParams& params);

// Bytes of workspace that a call with these (valid) params needs: a function of shapes and scalars only.
int64_t workspace_bytes(const BatchPrefillParams& params);
int64_t workspace_bytes(const BatchDecodeParams& params);

Status batch_prefill(const BatchPrefillParams& params, const Context& context);
Status batch_decode(const BatchDecodeParams& params, const Context& context);

}  // namespace punica
