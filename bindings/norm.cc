#include "punica/norm.h"

#include <tvm/ffi/tvm_ffi.h>

#include "bindings/convert.h"
#include "bindings/shortcut.h"

namespace punica::bindings {
namespace {

void rms_norm(Tensor output, Tensor input, Tensor weight, double epsilon, OptionalTensor residual,
              int64_t num_threads) {
  const RmsNormParams params{
      .output = to_view(output),
      .input = to_view(input),
      .weight = to_view(weight),
      .residual = to_view(residual),
      .epsilon = static_cast<float>(epsilon),
  };
  const Call call(params.output, num_threads);
  call.finish(punica::rms_norm(params, call.context()));
}

// output, input, weight, epsilon, residual, long_bytes
PyObject* shortcut_rms_norm(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 6);
  const RmsNormParams params{
      .output = call.data(0),
      .input = call.data(1),
      .weight = call.data(2),
      .residual = call.optional_data(4),
      .epsilon = static_cast<float>(call.number(3)),
  };
  const bool is_long = nbytes(params.input) > call.number(5);
  return call.run(params, params.output, is_long, {0, 4});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
PUNICA_EXPORT_SHORTCUT(rms_norm);

}  // namespace punica::bindings
