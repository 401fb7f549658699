// The shortcut of an operation: from Python's arguments to the C++ API in one step, in half the time of the Python code
// and tvm-ffi that it goes round.
//
// A shortcut is called by Python itself and does only what is ordinary: plain tensors in eager mode, ints and floats,
// arguments that the operation accepts, work that is short. It answers True when the operation has run. Whatever else
// it meets, it touches nothing and answers False: the caller then goes the long way, which says what was wrong.
#pragma once

#include <dlpack/dlpack.h>

#include <exception>
#include <initializer_list>
#include <optional>

#include "bindings/convert.h"
#include "bindings/python_abi.h"
#include "src/common/validated.h"

namespace punica::bindings {

// One call. The arguments are viewed one after another, then run() does the rest.
class ShortcutCall {
 public:
  // Not ordinary: another number of arguments, a TorchDispatchMode or a forward-mode level.
  ShortcutCall(PyObject* const* args, std::ptrdiff_t count, std::ptrdiff_t expected);

  // Views of arguments. Something out of the ordinary makes the call not ordinary, and the result meaningless.
  TensorView data(int i);   // of floats: neither wants a gradient nor is a lazy negative view
  TensorView table(int i);  // of integers
  TensorView optional_data(int i) { return is_none(i) ? TensorView{} : data(i); }
  TensorView optional_table(int i) { return is_none(i) ? TensorView{} : table(i); }
  int64_t integer(int i);
  std::optional<int64_t> optional_integer(int i) {
    return is_none(i) ? std::nullopt : std::optional<int64_t>(integer(i));
  }
  // Those of a tuple or list of at most `most`, in `to`; how many there are.
  std::optional<int64_t> optional_integers(int i, int64_t* to, int64_t most);
  double number(int i);
  std::optional<double> optional_number(int i) { return is_none(i) ? std::nullopt : std::optional<double>(number(i)); }

  // For what only the operation's own code can see: the call is not ordinary.
  void refuse_arguments() { ordinary_ = false; }

  // Validates the params and runs their operation, if all was ordinary. `on` is a tensor of the call; `is_long`: on the
  // CPU it takes so long that other threads should have Python's lock meanwhile. `written`: the arguments that are
  // written, whose version counters go up. add_workspace() gives the valid params what they still want.
  template <class Params, class AddWorkspace>
  PyObject* run(const Params& params, const TensorView& on, bool is_long, std::initializer_list<int> written,
                AddWorkspace add_workspace) {
    if (!ordinary_) return go_the_long_way();
    try {
      Context context;
      if (!prepare(on, is_long, &context) || !validate(params).ok() || !add_workspace().ok()) return go_the_long_way();
      const Status status = run_validated(params, context);
      if (!status.ok()) [[unlikely]] {
        return refuse(status);
      }
      return count_up(written) ? yes() : nullptr;
    } catch (const std::exception& error) {
      return raise(error.what());
    }
  }
  template <class Params>
  PyObject* run(const Params& params, const TensorView& on, bool is_long, std::initializer_list<int> written) {
    return run(params, on, is_long, written, [] { return Status(); });
  }

 private:
  bool is_none(int i) const;
  TensorView view(PyObject* tensor);
  int64_t to_integer(PyObject* value);
  bool prepare(const TensorView& on, bool is_long, Context* context) const;
  bool count_up(std::initializer_list<int> written) const;  // false: a Python exception is set
  static PyObject* refuse(const Status& status);
  static PyObject* yes();
  static PyObject* go_the_long_way();
  static PyObject* raise(const char* message);

  PyObject* const* args_;
  bool ordinary_;
  int grad_ = -1;  // whether grad mode is on; -1: not asked yet
};

// uint8 [bytes] on a CUDA device from torch's caching allocator, as allocate() (convert.h) makes it.
class ShortcutWorkspace {
 public:
  ShortcutWorkspace() = default;
  ~ShortcutWorkspace();
  ShortcutWorkspace(const ShortcutWorkspace&) = delete;
  ShortcutWorkspace& operator=(const ShortcutWorkspace&) = delete;

  bool allocate(Device device, int64_t bytes);  // false: there was none
  TensorView view() const;

 private:
  DLManagedTensorVersioned* tensor_ = nullptr;
};

// A new Python function, which is never freed.
void* make_function(const char* name, PyFastFunction function);

}  // namespace punica::bindings

// Exports shortcut_<name>(): the address of the Python function object that calls punica::bindings::shortcut_<name>.
#define PUNICA_EXPORT_SHORTCUT(name) \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(shortcut_##name, [] { return make_function(#name, shortcut_##name); })
