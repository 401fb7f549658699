// Head dims up to 192.
#include "src/cuda/attention/prefill_mma_launch.cuh"

namespace punica::cuda {

template Status launch_mma<192>(const Launcher&, DType, const AttentionArgs&, const MmaCall&, const RopeTable*,
                                unsigned);

}  // namespace punica::cuda
