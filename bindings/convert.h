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

// Nothing is known of the view: it may have a rank that is refused later.
double nbytes(const TensorView& view);

// One call of an operation: the context that it runs with, and what is to be said after it.
class Call {
 public:
  // `on` is a tensor of the call: it names the device whose current stream is taken. num_threads: CPU only.
  Call(const TensorView& on, int64_t num_threads);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Context& context() const { return context_; }
  // raise_if_error(), and the warning, once in a process, that checks were asked for but not made.
  void finish(const Status& status) const;

 private:
  Context context_;
  bool checks_skipped_ = false;
};

// uint8 [bytes] on a CUDA device from the caller's allocator (torch's caching one), and freed with the result: what is
// launched before that on the device's current stream may use it.
ffi::Tensor allocate(Device device, int64_t bytes);

// Throws RuntimeError "punica_kernels.<message>" unless ok. Without a backtrace: the message is the whole story, and
// collecting one takes milliseconds.
void raise_if_error(const Status& status);
[[noreturn]] void raise_error(const std::string& message);

}  // namespace punica::bindings
