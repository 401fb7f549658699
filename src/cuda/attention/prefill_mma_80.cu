// Head dims up to 80.
#include "src/cuda/attention/prefill_mma_launch.cuh"

namespace punica::cuda {

template Status launch_mma<80>(const Launcher&, DType, const AttentionArgs&, const MmaCall&, const RopeTable*,
                               unsigned);

}  // namespace punica::cuda
