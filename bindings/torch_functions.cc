#include "bindings/torch_functions.h"

#include <dlfcn.h>

namespace punica::bindings {
namespace {

template <class Function>
bool find(void* library, const char* name, Function* function) {
  *function = library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

bool find_torch_functions(TorchFunctions* f) {
  // Only what is loaded already; the libraries stay loaded.
  void* const c10 = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return find(torch, "_ZN2at6native6is_negERKNS_6TensorE", &f->is_neg) &&
         find(c10, "_ZNK3c1010TensorImpl13requires_gradEv", &f->requires_grad) &&
         find(c10, "_ZN3c108GradMode10is_enabledEv", &f->is_grad_enabled) &&
         find(c10, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", &f->dispatch_stack_size) &&
         find(torch, "_ZN2at15get_num_threadsEv", &f->get_num_threads) &&
         find(torch, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &f->bump_version) &&
         find(torch, "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor", &f->to_dlpack);
}

}  // namespace punica::bindings
