// A counter in the workspace, from which blocks that stay on their multiprocessors take the next item. Who gets an item
// changes no bit of it.
#pragma once

#include "src/cuda/common/device.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

template <Arch kArch>
__global__ void reset_counter_kernel(unsigned* counter) {
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    *counter = 0;
  }
}

// Ahead of the kernel that counts.
inline Status reset_counter(const Launcher& launcher, unsigned* counter) {
  return with_arch(launcher.arch, [&](auto arch) {
    return launcher.launch<reset_counter_kernel<decltype(arch)::value>>(LaunchShape(), counter);
  });
}

}  // namespace punica::cuda
