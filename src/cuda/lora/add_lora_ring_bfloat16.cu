#include "src/cuda/lora/add_lora_ring_launch.cuh"

namespace punica::cuda::fused_lora {

Status launch_ring_bfloat16(const Launcher& launcher, const Args& args) {
  return launch_ring_as<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
