// The CUDA backend: which of its code paths a device runs.
#pragma once

#include <cstdint>

#include "punica/status.h"

namespace punica::cuda {

enum class Arch : uint8_t {
  kSm80,  // Ampere and everything later, as machine code or from PTX
  kSm90,  // Hopper: thread-block clusters, programmatic dependent launch
};

const char* arch_name(Arch arch);  // "sm_80", "sm_90"

// The one that kernels on this device run with: the best that it has, or the one that the environment variable
// PUNICA_CUDA_ARCH names (read at the first call). An error if it names none or one that the device does not have, and
// kUnsupported for devices before compute capability 8.0 and for builds without the CUDA backend.
Status active_arch(int device, Arch* arch);

// The path of the last kernel launched from this thread, which is part of that kernel's name too; nullptr before the
// first.
const char* last_arch();

}  // namespace punica::cuda
