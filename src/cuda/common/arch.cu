#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>

#include "punica/cuda.h"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

thread_local const char* t_last_arch = nullptr;

struct Forced {
  bool any = false;
  bool known = true;
  Arch arch = Arch::kSm80;
  std::string name;
};

const Forced& forced() {
  static const Forced value = [] {
    Forced f;
    const char* name = std::getenv("PUNICA_CUDA_ARCH");
    if (name == nullptr || *name == '\0') return f;
    f.any = true;
    f.name = name;
    if (f.name == arch_name(Arch::kSm90)) {
      f.arch = Arch::kSm90;
    } else {
      f.known = f.name == arch_name(Arch::kSm80);
    }
    return f;
  }();
  return value;
}

#ifdef PUNICA_CUDA_SM90
constexpr bool kBuiltSm90 = true;
#else
constexpr bool kBuiltSm90 = false;
#endif

Status find_arch(const char* op, int device, Arch* arch) {
  int major = 0, minor = 0;
  PUNICA_RETURN_IF_ERROR(to_status(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  PUNICA_RETURN_IF_ERROR(to_status(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
  const std::string have = "cuda:" + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
                           std::to_string(minor);
  if (major < 8) {
    return {StatusCode::kUnsupported, std::string(op) + ": " + have + ", but the CUDA kernels need 8.0 or later"};
  }
  // sm_90a code runs on 9.0 alone.
  const bool hopper = kBuiltSm90 && major == 9 && minor == 0;
  *arch = hopper ? Arch::kSm90 : Arch::kSm80;
  if (!forced().any) return {};
  if (!forced().known || (forced().arch == Arch::kSm90 && !hopper)) {
    return Status::invalid_argument(std::string(op) + ": the environment variable PUNICA_CUDA_ARCH must be one of " +
                                    (hopper ? "sm_80, sm_90" : "sm_80") + " (" + have +
                                    (kBuiltSm90 ? "" : ", and this build has no sm_90a code") + "), got " +
                                    forced().name);
  }
  *arch = forced().arch;
  return {};
}

}  // namespace

const char* arch_name(Arch arch) { return arch == Arch::kSm90 ? "sm_90" : "sm_80"; }

Status active_arch(const char* op, int device, Arch* arch) {
  // 0: not asked yet, else 1 + arch. Errors are found anew each time.
  static std::atomic<uint8_t> known[kMaxDevices];
  const bool cached = device >= 0 && device < kMaxDevices;
  if (cached) {
    if (const uint8_t value = known[device].load(std::memory_order_relaxed); value != 0) {
      *arch = static_cast<Arch>(value - 1);
      return {};
    }
  }
  PUNICA_RETURN_IF_ERROR(find_arch(op, device, arch));
  if (cached) known[device].store(static_cast<uint8_t>(*arch) + 1, std::memory_order_relaxed);
  return {};
}

Status active_arch(int device, Arch* arch) { return active_arch("active_cuda_arch", device, arch); }

const char* last_arch() { return t_last_arch; }

void set_last_arch(Arch arch) { t_last_arch = arch_name(arch); }

Status to_status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  // Errors that are not sticky stay pending until somebody takes them: torch must not find ours.
  static_cast<void>(cudaGetLastError());
  return {StatusCode::kInternal, std::string(op) + ": " + cudaGetErrorString(error)};
}

}  // namespace punica::cuda
