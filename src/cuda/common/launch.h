// From a validated call to a kernel launch: device, stream, code path, launch attributes, errors.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
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
    if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
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

// What the kernels of one call are launched with. Every kernel is a template on Arch or reads it from another template
// argument, so that the path is part of its name.
class Launcher {
 public:
  Launcher(const char* op, Arch arch, const Context& context)
      : arch(arch), early_reads(context.early_reads), op_(op), stream_(static_cast<cudaStream_t>(context.stream)) {}

  const Arch arch;
  const bool early_reads;

  cudaStream_t stream() const { return stream_; }
  const char* op() const { return op_; }

  // Launches kKernel. On sm_90 as a programmatic dependent: it may start while the kernel before it in the stream still
  // runs, so every thread of it must call grid_dependency_wait() (device.cuh) before it touches what others write.
  template <auto kKernel, class... Args>
  Status launch(const LaunchShape& shape, const Args&... args) const {
    if (shape.shared_bytes > 0) {
      if (const cudaError_t error = allow_shared<kKernel>(shape.shared_bytes, arch); error != cudaSuccess) {
        return to_status(op_, error);
      }
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    if (arch == Arch::kSm90) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      if (shape.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
      }
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, args...);
    if (error == cudaSuccess) [[likely]] {
      set_last_arch(arch);
      return {};
    }
    return to_status(op_, error);
  }

 private:
  static constexpr int kMaxShared = 227 << 10;

  // Raises the kernel's limit of dynamic shared memory, once a device, and asks for the largest carve-out: a
  // multiprocessor that has to change it for the next kernel must first run empty. On sm_90 it also allows clusters of
  // 16 blocks.
  template <auto kKernel>
  static cudaError_t allow_shared(size_t bytes, Arch arch) {
    static std::atomic<uint64_t> done{0};
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (bit != 0 && (done.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
    int limit = kMaxShared;
    cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes;
    if (error = cudaFuncGetAttributes(&attributes, kKernel); error != cudaSuccess) return error;
    limit -= static_cast<int>(attributes.sharedSizeBytes);  // what it has statically counts too
    if (limit < 0 || bytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess && arch == Arch::kSm90) {
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  const char* op_;
  cudaStream_t stream_;
};

// Calls body(launcher) with the device current.
template <class Body>
Status on_device(const char* op, Device device, const Context& context, Body body) {
  Arch arch;
  PUNICA_RETURN_IF_ERROR(active_arch(op, device.index, &arch));
  const DeviceGuard guard(device.index);
  if (guard.error() != cudaSuccess) return to_status(op, guard.error());
  return body(Launcher(op, arch, context));
}

}  // namespace punica::cuda
