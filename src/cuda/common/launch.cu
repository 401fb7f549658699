#include <algorithm>

#include "src/cuda/common/driver.h"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

using DriverLaunch = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);

// cuLaunchKernelEx of the driver that the runtime has loaded; null where it has none.
DriverLaunch driver_launch() {
  static const DriverLaunch function = [] {
    void* entry = nullptr;
    return find_driver_function("cuLaunchKernelEx", &entry) == cudaSuccess ? reinterpret_cast<DriverLaunch>(entry)
                                                                           : nullptr;
  }();
  return function;
}

// The kernel's handle on the current device; null where there is none.
CUfunction function_of(const void* symbol, KernelState* state, int device) {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  std::atomic<CUfunction>& known = state->functions[device];
  CUfunction function = known.load(std::memory_order_relaxed);
  if (function == nullptr) {
    if (cudaGetFuncBySymbol(&function, symbol) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return nullptr;
    }
    known.store(function, std::memory_order_relaxed);
  }
  return function;
}

}  // namespace

int Launcher::num_multiprocessors() const {
  static std::atomic<int> known[kMaxDevices];
  const bool cached = device_ >= 0 && device_ < kMaxDevices;
  if (cached) {
    if (const int count = known[device_].load(std::memory_order_relaxed); count > 0) return count;
  }
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
  }
  count = std::max(count, 1);
  if (cached) known[device_].store(count, std::memory_order_relaxed);
  return count;
}

// Raises the kernel's limit of dynamic shared memory, once a device, and asks for the largest carve-out: a
// multiprocessor that has to change it for the next kernel must first run empty. On sm_90 it also allows clusters of
// 16 blocks.
cudaError_t Launcher::allow_shared(const void* symbol, KernelState* state, size_t bytes) const {
  const uint64_t bit = device_ < kMaxDevices ? uint64_t{1} << device_ : 0;
  if ((state->allows_shared.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  int limit = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  if (error = cudaFuncGetAttributes(&attributes, symbol); error != cudaSuccess) return error;
  limit -= static_cast<int>(attributes.sharedSizeBytes);  // what it has statically counts too
  if (limit < 0 || bytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(symbol, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && arch == Arch::kSm90) {
    error = cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) state->allows_shared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

Status Launcher::launch_symbol(const void* symbol, KernelState* state, const LaunchShape& shape,
                               void** parameters) const {
  if (shape.shared_bytes > 0) {
    if (const cudaError_t error = allow_shared(symbol, state, shape.shared_bytes); error != cudaSuccess) {
      return to_status(op_, error);
    }
  }
  CUlaunchAttribute attributes[2];
  CUlaunchConfig config = {};
  config.gridDimX = shape.grid.x;
  config.gridDimY = shape.grid.y;
  config.gridDimZ = shape.grid.z;
  config.blockDimX = shape.block.x;
  config.blockDimY = shape.block.y;
  config.blockDimZ = shape.block.z;
  config.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
  config.hStream = stream_;
  config.attrs = attributes;
  if (arch == Arch::kSm90) {
    attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[config.numAttrs++].value.programmaticStreamSerializationAllowed = 1;
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
      attributes[config.numAttrs].value.clusterDim.x = shape.cluster;
      attributes[config.numAttrs].value.clusterDim.y = 1;
      attributes[config.numAttrs++].value.clusterDim.z = 1;
    }
  }
  const DriverLaunch launch = driver_launch();
  const CUfunction function = launch == nullptr ? nullptr : function_of(symbol, state, device_);
  if (function != nullptr && launch(&config, function, parameters, nullptr) == CUDA_SUCCESS) [[likely]] {
    set_last_arch(arch);
    return {};
  }
  // Not launched. The runtime makes a context current in a thread that has none yet, finds the kernel in one that is
  // not the device's own, and otherwise says what is wrong.
  cudaLaunchConfig_t same = {};
  same.gridDim = shape.grid;
  same.blockDim = shape.block;
  same.dynamicSmemBytes = shape.shared_bytes;
  same.stream = stream_;
  cudaLaunchAttribute same_attributes[2];
  same.attrs = same_attributes;
  same.numAttrs = config.numAttrs;
  if (config.numAttrs > 0) {
    same_attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    same_attributes[0].val.programmaticStreamSerializationAllowed = 1;
    same_attributes[1].id = cudaLaunchAttributeClusterDimension;
    same_attributes[1].val.clusterDim.x = shape.cluster;
    same_attributes[1].val.clusterDim.y = 1;
    same_attributes[1].val.clusterDim.z = 1;
  }
  const cudaError_t error = cudaLaunchKernelExC(&same, symbol, parameters);
  if (error != cudaSuccess) return to_status(op_, error);
  set_last_arch(arch);
  return {};
}

}  // namespace punica::cuda
