#include "punica/lora.h"

#include <tvm/ffi/tvm_ffi.h>

#include "bindings/convert.h"
#include "bindings/shortcut.h"

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

// The bytes of weights that a call reads if no two rows share them.
double weight_bytes(const TensorView& y, const TensorView& x) {
  return y.rank == 2 ? nbytes(x) * static_cast<double>(y.shape[1]) : 0;
}

// y, x, w_ptr, indices, layer_idx, scale, long_bytes
PyObject* shortcut_dispatch_bgmv(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 7);
  const BgmvParams params{
      .y = call.data(0),
      .x = call.data(1),
      .w_ptr = call.table(2),
      .indices = call.table(3),
      .layer_idx = call.integer(4),
      .scale = static_cast<float>(call.number(5)),
  };
  const bool is_long = weight_bytes(params.y, params.x) > call.number(6);
  return call.run(params, params.y, is_long, {0});
}

// y, x, w_ptr, s_start, s_end, tmp, layer_idx, long_bytes
PyObject* shortcut_sgmv(SgmvWeights weights, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 8);
  const SgmvParams params{
      .weights = weights,
      .y = call.data(0),
      .x = call.data(1),
      .w_ptr = call.table(2),
      .s_start = call.table(3),
      .s_end = call.table(4),
      .tmp = call.optional_table(5),
      .layer_idx = call.integer(6),
  };
  const bool is_long = weight_bytes(params.y, params.x) > call.number(7);
  return call.run(params, params.y, is_long, {0, 5});
}

PyObject* shortcut_sgmv_shrink(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  return shortcut_sgmv(SgmvWeights::kOutIn, args, count);
}

PyObject* shortcut_sgmv_cutlass(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  return shortcut_sgmv(SgmvWeights::kInOut, args, count);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dispatch_bgmv, dispatch_bgmv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_shrink, sgmv_shrink);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_cutlass, sgmv_cutlass);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sgmv_cutlass_tmp_size, sgmv_cutlass_tmp_size);
PUNICA_EXPORT_SHORTCUT(dispatch_bgmv);
PUNICA_EXPORT_SHORTCUT(sgmv_shrink);
PUNICA_EXPORT_SHORTCUT(sgmv_cutlass);

}  // namespace punica::bindings
