#include "bindings/shortcut.h"

#include <tvm/ffi/tvm_ffi.h>

#include <string>

#include "bindings/settings.h"
#include "bindings/torch_functions.h"
#include "punica/build.h"

namespace punica::bindings {
namespace {

// What Python hands over once, kept alive for ever.
struct Python {
  PyObject *tensor_type, *parameter_type, *int_type, *float_type, *tuple_type, *list_type;
  PyObject *none, *yes, *no, *runtime_error;
  PyObject *forward_ad, *forward_ad_level;  // a dictionary, and a name in it
  PyObject* increment_version;
};
Python g_python;
const DLPackExchangeAPI* g_exchange = nullptr;
TorchFunctions g_torch;
std::ptrdiff_t g_tensor_offset = 0;  // of the at::Tensor in a Python tensor

const void* tensor_in(PyObject* object) { return reinterpret_cast<const char*>(object) + g_tensor_offset; }
const void* impl_in(PyObject* object) { return *static_cast<const void* const*>(tensor_in(object)); }

// Where Python's stable ABI has it (set_up_shortcuts() looks): behind the count of references.
PyObject* type_of(PyObject* object) { return reinterpret_cast<PyObject**>(object)[1]; }

bool is_plain(PyObject* object) {
  PyObject* const type = type_of(object);
  return type == g_python.tensor_type || type == g_python.parameter_type;
}

// Functorch's transforms need not be asked for: tensors that they have wrapped have no memory, which view() or the
// operation's validation refuses, and the others are plain.
bool is_intercepted() {
  PyObject* const level = PyDict_GetItemWithError(g_python.forward_ad, g_python.forward_ad_level);
  return level == nullptr || PyLong_AsLongLong(level) >= 0 || g_torch.dispatch_stack_size() != 0;
}

}  // namespace

ShortcutCall::ShortcutCall(PyObject* const* args, std::ptrdiff_t count, std::ptrdiff_t expected)
    : args_(args), ordinary_(count == expected && !is_intercepted()) {}

bool ShortcutCall::is_none(int i) const { return ordinary_ && args_[i] == g_python.none; }

TensorView ShortcutCall::view(PyObject* tensor) {
  DLTensor dl;
  try {
    g_torch.to_dlpack(tensor_in(tensor), &dl);
  } catch (...) {
    ordinary_ = false;
    return {};
  }
  return to_view(Tensor(&dl));
}

TensorView ShortcutCall::data(int i) {
  if (!ordinary_) return {};
  PyObject* const tensor = args_[i];
  if (grad_ < 0) grad_ = g_torch.is_grad_enabled();
  ordinary_ =
      is_plain(tensor) && !g_torch.is_neg(tensor_in(tensor)) && (grad_ == 0 || !g_torch.requires_grad(impl_in(tensor)));
  return ordinary_ ? view(tensor) : TensorView{};
}

TensorView ShortcutCall::table(int i) {
  ordinary_ = ordinary_ && is_plain(args_[i]);
  return ordinary_ ? view(args_[i]) : TensorView{};
}

int64_t ShortcutCall::integer(int i) { return ordinary_ ? to_integer(args_[i]) : 0; }

int64_t ShortcutCall::to_integer(PyObject* object) {
  ordinary_ = ordinary_ && type_of(object) == g_python.int_type;
  if (!ordinary_) return 0;
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    ordinary_ = false;
  }
  return value;
}

std::optional<int64_t> ShortcutCall::optional_integers(int i, int64_t* to, int64_t most) {
  if (is_none(i)) return std::nullopt;
  ordinary_ = ordinary_ && (type_of(args_[i]) == g_python.tuple_type || type_of(args_[i]) == g_python.list_type);
  if (!ordinary_) return 0;
  const int64_t count = PySequence_Size(args_[i]);
  if (count < 0) PyErr_Clear();
  ordinary_ = count >= 0 && count <= most;
  for (int64_t k = 0; ordinary_ && k < count; ++k) {
    PyObject* const item = PySequence_GetItem(args_[i], k);
    if (item == nullptr) {
      PyErr_Clear();
      ordinary_ = false;
      break;
    }
    to[k] = to_integer(item);
    Py_DecRef(item);
  }
  return count;
}

double ShortcutCall::number(int i) {
  ordinary_ = ordinary_ && (type_of(args_[i]) == g_python.float_type || type_of(args_[i]) == g_python.int_type);
  if (!ordinary_) return 0;
  const double value = PyFloat_AsDouble(args_[i]);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    ordinary_ = false;
  }
  return value;
}

bool ShortcutCall::prepare(const TensorView& on, bool is_long, Context* context) const {
  if (on.device.type == DeviceType::kCpu) {
    if (is_long) return false;
    context->num_threads = g_torch.get_num_threads();
    return true;
  }
  // Checks of contents wait for the device, and have a warning to give.
  if (on.device.type != DeviceType::kCuda || checks()) return false;
  context->early_reads = early_reads();
  if (g_exchange->current_work_stream(kDLCUDA, on.device.index, &context->stream) == 0) return true;
  PyErr_Clear();
  return false;
}

bool ShortcutCall::count_up(std::initializer_list<int> written) const {
  for (const int i : written) {
    if (args_[i] == g_python.none) continue;
    try {
      g_torch.bump_version(tensor_in(args_[i]));
    } catch (...) {
      // Inference tensors outside inference mode have none: Python's function raises what says so.
      PyObject* const one = PyTuple_New(1);
      if (one == nullptr) return false;
      Py_IncRef(args_[i]);
      PyTuple_SetItem(one, 0, args_[i]);
      PyObject* const result = PyObject_CallFunctionObjArgs(g_python.increment_version, one, nullptr);
      Py_DecRef(one);
      if (result == nullptr) return false;
      Py_DecRef(result);
    }
  }
  return true;
}

PyObject* ShortcutCall::refuse(const Status& status) {
  // After this one something may have been written: the call must not be made again.
  if (status.code() == StatusCode::kInternal) return raise(("punica_kernels." + status.message()).c_str());
  return go_the_long_way();
}

PyObject* ShortcutCall::yes() {
  Py_IncRef(g_python.yes);
  return g_python.yes;
}

PyObject* ShortcutCall::go_the_long_way() {
  Py_IncRef(g_python.no);
  return g_python.no;
}

PyObject* ShortcutCall::raise(const char* message) {
  PyErr_SetString(g_python.runtime_error, message);
  return nullptr;
}

bool ShortcutWorkspace::allocate(Device device, int64_t bytes) {
  DLTensor prototype = {
      .data = nullptr,
      .device = {kDLCUDA, device.index},
      .ndim = 1,
      .dtype = {kDLUInt, 8, 1},
      .shape = &bytes,
      .strides = nullptr,
      .byte_offset = 0,
  };
  const auto ignore = [](void*, const char*, const char*) {};
  return g_exchange->managed_tensor_allocator(&prototype, &tensor_, nullptr, ignore) == 0;
}

ShortcutWorkspace::~ShortcutWorkspace() {
  if (tensor_ != nullptr && tensor_->deleter != nullptr) tensor_->deleter(tensor_);
}

TensorView ShortcutWorkspace::view() const { return to_view(Tensor(&tensor_->dl_tensor)); }

namespace {

PyObject* to_object(void* address) { return static_cast<PyObject*>(address); }

// Where both tensors hold what they are said to point to; -1: nowhere.
std::ptrdiff_t find_tensor_offset(PyObject* const* tensors, const void* const* impls, std::ptrdiff_t size) {
  constexpr std::ptrdiff_t kWord = sizeof(void*);
  for (std::ptrdiff_t at = 2 * kWord; at + kWord <= size; at += kWord) {
    const auto holds = [&](int i) {
      return *reinterpret_cast<const void* const*>(reinterpret_cast<const char*>(tensors[i]) + at) == impls[i];
    };
    if (holds(0) && holds(1)) return at;
  }
  return -1;
}

// A plain tensor and a lazy negative view, with what they point to; size: of such an object.
bool set_up_tensors(void* plain, void* plain_impl, void* negative, void* negative_impl, int64_t size) {
  PyObject* const tensors[] = {to_object(plain), to_object(negative)};
  const void* const impls[] = {plain_impl, negative_impl};
  g_tensor_offset = find_tensor_offset(tensors, impls, size);
  return g_tensor_offset > 0 && find_torch_functions(&g_torch) && !g_torch.is_neg(tensor_in(tensors[0])) &&
         g_torch.is_neg(tensor_in(tensors[1]));
}

// objects: a tuple of what struct Python wants, in its order; capsule: torch.Tensor.__dlpack_c_exchange_api__. False if
// this Python or torch lacks something.
bool set_up_shortcuts(void* objects, void* capsule) {
  if (PyCFunction_NewEx == nullptr) return false;
  const auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(to_object(capsule), "dlpack_exchange_api"));
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION) {
    PyErr_Clear();
    return false;
  }
  PyObject** const fields = reinterpret_cast<PyObject**>(&g_python);
  constexpr std::ptrdiff_t kFields = sizeof(Python) / sizeof(PyObject*);
  for (std::ptrdiff_t i = 0; i < kFields; ++i) {
    fields[i] = PyTuple_GetItem(to_object(objects), i);
    if (fields[i] == nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  PyObject* const type = PyObject_Type(g_python.none);
  Py_DecRef(type);
  if (type_of(g_python.none) != type) return false;
  for (std::ptrdiff_t i = 0; i < kFields; ++i) Py_IncRef(fields[i]);
  g_exchange = api;
  return true;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_up_tensors, set_up_tensors);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_up_shortcuts, set_up_shortcuts);

void* make_function(const char* name, PyFastFunction function) {
  auto* const method = new PyMethodDef{name, function, kPyMethFastcall, nullptr};
  return PyCFunction_NewEx(method, nullptr, nullptr);
}

}  // namespace punica::bindings
