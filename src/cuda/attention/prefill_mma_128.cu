// Head dims up to 128.
#include "src/cuda/attention/prefill_mma_launch.cuh"

namespace punica::cuda {

template Status launch_mma<128>(const Launcher&, DType, const AttentionArgs&, const MmaCall&, const RopeTable*,
                                unsigned);

}  // namespace punica::cuda
