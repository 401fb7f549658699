// From a validated call to a kernel launch: device, stream, code path, launch attributes, errors.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "punica/context.h"
#include "punica/cuda.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica::cuda {

Status to_status(const char* op, cudaError_t error);
void set_last_arch(Arch arch);
// The path of `device`; errors are those of `op`.
Status active_arch(const char* op, int device, Arch* arch);

// Makes a device the current one of this thread, and the one before again when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device), error_(cudaGetDevice(&before_)) {
    // A new thread has no context, though it has a current device: the first call of all makes one. The driver wants
    // it even where it makes tensor maps.
    thread_local bool has_context = false;
    if (error_ == cudaSuccess && (before_ != device_ || !has_context)) {
      error_ = cudaSetDevice(device_);
      has_context = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (error_ == cudaSuccess && before_ != device_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int device_;
  int before_ = -1;
  cudaError_t error_;
};

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  unsigned cluster = 1;     // blocks of a cluster, along x; more than 1 on sm_90 alone
};

inline constexpr int kMaxDevices = 64;  // of which something is remembered; others work too

// What is known of a kernel on each device. One for each kernel, in static memory.
struct KernelState {
  // The driver's handle: launching by it saves the runtime's search for it, a tenth of a launch. Null: not asked yet.
  std::atomic<CUfunction> functions[kMaxDevices] = {};
  // Bit i: device i allows all dynamic shared memory that it has.
  std::atomic<uint64_t> allows_shared{0};
};

// What the kernels of one call are launched with. Every kernel is a template on Arch or reads it from another template
// argument, so that the path is part of its name.
class Launcher {
 public:
  // `device` is the current one.
  Launcher(const char* op, Arch arch, int device, const Context& context)
      : arch(arch),
        early_reads(context.early_reads),
        op_(op),
        device_(device),
        stream_(static_cast<cudaStream_t>(context.stream)) {}

  const Arch arch;
  const bool early_reads;

  cudaStream_t stream() const { return stream_; }
  int num_multiprocessors() const;  // of the device; at least 1
  const char* op() const { return op_; }

  // Launches kKernel. On sm_90 as a programmatic dependent: it may start while the kernel before it in the stream still
  // runs, so every thread of it must call grid_dependency_wait() (device.cuh) before it touches what others write.
  template <auto kKernel, class... Args>
  Status launch(const LaunchShape& shape, const Args&... args) const {
    static constinit KernelState state;
    return launch_as(kKernel, &state, shape, args...);
  }

 private:
  // The arguments become what the kernel's parameters are.
  template <class... Parameters>
  Status launch_as(void (*kernel)(Parameters...), KernelState* state, const LaunchShape& shape,
                   const std::type_identity_t<Parameters>&... args) const {
    void* parameters[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    return launch_symbol(reinterpret_cast<const void*>(kernel), state, shape, parameters);
  }

  Status launch_symbol(const void* symbol, KernelState* state, const LaunchShape& shape, void** parameters) const;
  cudaError_t allow_shared(const void* symbol, KernelState* state, size_t bytes) const;

  const char* op_;
  int device_;
  cudaStream_t stream_;
};

// Calls body(std::integral_constant<Arch, arch>()).
template <class Body>
auto with_arch(Arch arch, Body body) {
  if (arch == Arch::kSm90) return body(std::integral_constant<Arch, Arch::kSm90>());
  return body(std::integral_constant<Arch, Arch::kSm80>());
}

// Calls body(launcher) with the device current.
template <class Body>
Status on_device(const char* op, Device device, const Context& context, Body body) {
  Arch arch;
  PUNICA_RETURN_IF_ERROR(active_arch(op, device.index, &arch));
  const DeviceGuard guard(device.index);
  if (guard.error() != cudaSuccess) return to_status(op, guard.error());
  return body(Launcher(op, arch, device.index, context));
}

}  // namespace punica::cuda
