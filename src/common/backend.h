// From the device of a call to the backend that runs it.
#pragma once

#include <string>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"
#include "src/cpu/backend.h"
#ifdef PUNICA_WITH_CUDA
#include "src/cuda/backend.h"
#endif

namespace punica {

inline Status no_backend(const char* op, Device device) {
  return {
      StatusCode::kUnsupported,
      std::string(op) + ": the tensors are on cuda:" + std::to_string(device.index) +
          ", but this build has the CPU backend alone; build it where a CUDA compiler is found, or move them to cpu"};
}

}  // namespace punica

// Runs `call` (say, dispatch_bgmv(params, context)) in the namespace of the device's backend.
#ifdef PUNICA_WITH_CUDA
#define PUNICA_ON_BACKEND(op, device, call) \
  ((device).type == ::punica::DeviceType::kCuda ? ::punica::cuda::call : ::punica::cpu::call)
#else
#define PUNICA_ON_BACKEND(op, device, call) \
  ((device).type == ::punica::DeviceType::kCuda ? ::punica::no_backend(op, device) : ::punica::cpu::call)
#endif
