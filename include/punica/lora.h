// LoRA: matrix products whose weights differ from row to row.
#pragma once

#include <cstdint>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// y[b] += scale * W[indices[b]][layer_idx] @ x[b], W: [L, h_out, h_in] at address w_ptr[index]; the sum is accumulated
// in float32 and rounded once, at the store. A negative index leaves the row as it is.
struct BgmvParams {
  TensorView y;        // T [B, h_out], accumulated into; rows may be strided
  TensorView x;        // T [B, h_in], rows may be strided
  TensorView w_ptr;    // int64 [num_adapters], addresses
  TensorView indices;  // int64 [B]
  int64_t layer_idx = 0;
  float scale = 1.0f;
};

// How a segment's weights lie in memory.
enum class SgmvWeights : uint8_t {
  kOutIn,  // [L, d_out, d_in]: sgmv_shrink
  kInOut,  // [L, d_in, d_out]: sgmv_cutlass
};

// For segment i, rows [s_start[i], s_end[i]): y += x @ W_i, W_i at address w_ptr[i], layer layer_idx of it. Segments
// may be empty (start and end equal, wherever they lie: -1, -1 pads a table), need not cover all rows, and do not
// overlap.
struct SgmvParams {
  SgmvWeights weights = SgmvWeights::kOutIn;
  TensorView y;        // T [rows, d_out], accumulated into; rows may be strided
  TensorView x;        // T [rows, d_in], rows may be strided
  TensorView w_ptr;    // int64 [S], addresses
  TensorView s_start;  // int32 [S]
  TensorView s_end;    // int32 [S]
  TensorView tmp;      // uint8; kInOut: at least sgmv_cutlass_tmp_size(S) bytes; any alignment; absent: none needed
  int64_t layer_idx = 0;
};

Status validate(const BgmvParams& params);
Status validate(const SgmvParams& params);

// Bytes of workspace of sgmv_cutlass, at least 1.
int64_t sgmv_cutlass_tmp_size(int64_t num_segments);

Status dispatch_bgmv(const BgmvParams& params, const Context& context);
Status sgmv(const SgmvParams& params, const Context& context);

}  // namespace punica
