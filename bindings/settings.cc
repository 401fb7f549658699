#include "bindings/settings.h"

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/convert.h"
#include "punica/build.h"
#include "punica/cpu.h"
#include "punica/cuda.h"

namespace punica::bindings {
namespace {

bool checks_at_start() {
  const char* value = std::getenv("PUNICA_CHECK");
  return value != nullptr && std::string_view(value) == "1";
}

std::atomic<bool> g_checks{checks_at_start()};
thread_local bool t_early_reads = false;

bool set_checks(bool on) { return g_checks.exchange(on, std::memory_order_relaxed); }

bool set_early_reads(bool on) { return std::exchange(t_early_reads, on); }

// What Python registered. Never destroyed: at the end of the process Python may be gone before this library.
ffi::Function& on_checks_skipped() {
  static ffi::Function& function = *new ffi::Function();
  return function;
}

void set_on_checks_skipped(ffi::Function function) { on_checks_skipped() = std::move(function); }

ffi::String active_cuda_arch(int64_t device) {
  cuda::Arch arch;
  raise_if_error(cuda::active_arch(static_cast<int>(device), &arch));
  return cuda::arch_name(arch);
}

ffi::Optional<ffi::String> last_cuda_arch() {
  const char* name = cuda::last_arch();
  if (name == nullptr) return std::nullopt;
  return ffi::String(name);
}

ffi::String active_isa() {
  cpu::Isa isa;
  raise_if_error(cpu::active_isa(&isa));
  return cpu::isa_name(isa);
}

ffi::Optional<ffi::String> last_isa() {
  const char* name = cpu::last_isa();
  if (name == nullptr) return std::nullopt;
  return ffi::String(name);
}

}  // namespace

bool checks() { return g_checks.load(std::memory_order_relaxed); }
bool early_reads() { return t_early_reads; }

void warn_checks_skipped() {
  static std::atomic<bool> warned{false};
  if (warned.exchange(true, std::memory_order_relaxed)) return;
  if (const ffi::Function& warn = on_checks_skipped(); warn != nullptr) warn();
}

// The setters return the value before.
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_checks, set_checks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checks, [] { return checks(); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_early_reads, set_early_reads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(early_reads, early_reads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_on_checks_skipped, set_on_checks_skipped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(active_cuda_arch, active_cuda_arch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_cuda_arch, last_cuda_arch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(active_isa, active_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_isa, last_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(supported_isas, [] { return ffi::String(cpu::supported_isas()); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, [] { return has_cuda(); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, [] { return ffi::String(version()); });

}  // namespace punica::bindings
