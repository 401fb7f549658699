// Head dims up to 256.
#include "src/cuda/attention/prefill_mma_launch.cuh"

namespace punica::cuda {

template Status launch_mma<256>(const Launcher&, DType, const AttentionArgs&, const MmaCall&, const RopeTable*,
                                unsigned);

}  // namespace punica::cuda
