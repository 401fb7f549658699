#include "punica/norm.h"

#include <tvm/ffi/tvm_ffi.h>

#include "bindings/convert.h"

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

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);

}  // namespace punica::bindings
