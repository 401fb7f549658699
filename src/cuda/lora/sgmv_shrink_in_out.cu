// sgmv_shrink.cuh for weights W [d_in, d_out].
#include "src/cuda/lora/sgmv_shrink_launch.cuh"

namespace punica::cuda {

Status launch_sgmv_shrink_in_out(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch_shrink<__half, true>(launcher, args)
                                  : launch_shrink<__nv_bfloat16, true>(launcher, args);
}

}  // namespace punica::cuda
