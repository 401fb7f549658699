// Head dims up to 96.
#include "src/cuda/attention/prefill_mma_launch.cuh"

namespace punica::cuda {

template Status launch_mma<96>(const Launcher&, DType, const AttentionArgs&, const MmaCall&, const RopeTable*,
                               unsigned);

}  // namespace punica::cuda
