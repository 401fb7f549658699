#include "punica/lora.h"

#include <tvm/ffi/tvm_ffi.h>

#include "bindings/convert.h"

namespace punica::bindings {
namespace {

void dispatch_bgmv(Tensor y, Tensor x, Tensor w_ptr, Tensor indices, int64_t layer_idx, double scale,
                   int64_t num_threads) {
  const BgmvParams params{
      .y = to_view(y),
      .x = to_view(x),
      .w_ptr = to_view(w_ptr),
      .indices = to_view(indices),
      .layer_idx = layer_idx,
      .scale = static_cast<float>(scale),
  };
  const Call call(params.y, num_threads);
  call.finish(punica::dispatch_bgmv(params, call.context()));
}

void sgmv(SgmvWeights weights, Tensor y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, OptionalTensor tmp,
          int64_t layer_idx, int64_t num_threads) {
  const SgmvParams params{
      .weights = weights,
      .y = to_view(y),
      .x = to_view(x),
      .w_ptr = to_view(w_ptr),
      .s_start = to_view(s_start),
      .s_end = to_view(s_end),
      .tmp = to_view(tmp),
      .layer_idx = layer_idx,
  };
  const Call call(params.y, num_threads);
  call.finish(punica::sgmv(params, call.context()));
}

void sgmv_shrink(Tensor y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, OptionalTensor tmp, int64_t layer_idx,
                 int64_t num_threads) {
  sgmv(SgmvWeights::kOutIn, y, x, w_ptr, s_start, s_end, tmp, layer_idx, num_threads);
}

void sgmv_cutlass(Tensor y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, OptionalTensor tmp, int64_t layer_idx,
                  int64_t num_threads) {
  sgmv(SgmvWeights::kInOut, y, x, w_ptr, s_start, s_end, tmp, layer_idx, num_threads);
}

int64_t sgmv_cutlass_tmp_size(int64_t num_segments) {
  if (num_segments < 0) {
    raise_error("punica_kernels.sgmv_cutlass_tmp_size: num_segments must be at least 0, got " +
                std::to_string(num_segments));
  }
  return punica::sgmv_cutlass_tmp_size(num_segments);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dispatch_bgmv, dispatch_bgmv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_shrink, sgmv_shrink);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_cutlass, sgmv_cutlass);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_cutlass_tmp_size, sgmv_cutlass_tmp_size);

}  // namespace punica::bindings
