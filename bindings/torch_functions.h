// The functions of torch's C++ libraries that shortcuts (shortcut.h) call, for Python's way to each costs more than all
// that it does: is_neg() of Python gives up Python's lock meanwhile.
//
// They are found by their names in the libraries that the process has loaded, and so is the place where a Python tensor
// holds the C++ one: nothing is known of torch when this is built, and one build serves every torch that has them.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

namespace punica::bindings {

// `tensor` is an at::Tensor, `impl` what it points to. What throws in torch throws here.
struct TorchFunctions {
  bool (*is_neg)(const void* tensor);                       // at::native::is_neg
  bool (*requires_grad)(const void* impl);                  // c10::TensorImpl::requires_grad
  bool (*is_grad_enabled)();                                // c10::GradMode::is_enabled
  int64_t (*dispatch_stack_size)();                         // c10::impl::TorchDispatchModeTLS::stack_len
  int (*get_num_threads)();                                 // at::get_num_threads
  void (*bump_version)(const void* tensor);                 // torch::autograd::impl::bump_version
  void (*to_dlpack)(const void* tensor, DLTensor* result);  // at::toDLPackNonOwning
};

// False if one is missing.
bool find_torch_functions(TorchFunctions* functions);

}  // namespace punica::bindings
