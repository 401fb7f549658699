// sgmv_shrink.cuh for weights W [d_out, d_in].
#include "src/cuda/lora/sgmv_shrink_launch.cuh"

namespace punica::cuda {

Status launch_sgmv_shrink_out_in(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch_shrink<__half, false>(launcher, args)
                                  : launch_shrink<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
