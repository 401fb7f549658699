// What the families of operations share on their way from tvm-ffi to the C++ API: tensors, the context of a call,
// errors.
//
// These functions run with Python's lock held unless the caller's Function object releases it, so they do nothing but
// translate. Operations that may run for long are called through an object that does.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <string>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica::bindings {

namespace ffi = ::tvm::ffi;
using Tensor = ffi::TensorView;
using OptionalTensor = ffi::Optional<ffi::TensorView>;

// What is wrong with the tensor (rank, dtype, device, null pointer) is for validate() to say: nothing is refused here.
TensorView to_view(const Tensor& tensor);
TensorView to_view(const OptionalTensor& tensor);

// `on` is a tensor of the call: it names the device whose current stream is taken. num_threads: CPU only.
Context make_context(const TensorView& on, int64_t num_threads);

// Throws RuntimeError "punica_kernels.<message>" unless ok. Without a backtrace: the message is the whole story, and
// collecting one takes milliseconds.
void raise_if_error(const Status& status);
[[noreturn]] void raise_error(const std::string& message);

}  // namespace punica::bindings
