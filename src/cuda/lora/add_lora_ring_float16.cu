#include "src/cuda/lora/add_lora_ring_launch.cuh"

namespace punica::cuda::fused_lora {

Status launch_ring_float16(const Launcher& launcher, const Args& args) {
  return launch_ring_as<__half>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
