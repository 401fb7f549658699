#include "bindings/settings.h"

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>

#include "bindings/convert.h"
#include "punica/build.h"
#include "punica/cpu.h"

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

// The setters return the value before.
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_checks, set_checks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_early_reads, set_early_reads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(early_reads, early_reads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(active_isa, active_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_isa, last_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, [] { return has_cuda(); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, [] { return ffi::String(version()); });

}  // namespace punica::bindings
