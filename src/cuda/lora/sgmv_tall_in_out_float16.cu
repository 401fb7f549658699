#include "src/cuda/lora/sgmv_tall_launch.cuh"

namespace punica::cuda {

template Status launch_tall<__half, true, 32>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, const ShrinkTile&);
template Status launch_tall<__half, true, 64>(const Launcher&, const SgmvArgs&, const ShrinkPlan&, const ShrinkTile&);

}  // namespace punica::cuda
