// sgmv_shrink.cuh for weights W [d_in, d_out].
#include "src/cuda/lora/sgmv_shrink_launch.cuh"

namespace punica::cuda {

template Status launch_shrink<__half, true, 32>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__half, true, 64>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__nv_bfloat16, true, 32>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);
template Status launch_shrink<__nv_bfloat16, true, 64>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, int);

}  // namespace punica::cuda
