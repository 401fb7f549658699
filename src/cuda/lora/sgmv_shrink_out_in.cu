// sgmv_shrink.cuh for weights W [d_out, d_in].
#include "src/cuda/lora/sgmv_shrink_launch.cuh"

namespace punica::cuda {

template Status launch_shrink<__half, false, 32>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__half, false, 64>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__nv_bfloat16, false, 32>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__nv_bfloat16, false, 64>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);

}  // namespace punica::cuda
