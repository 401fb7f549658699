// The fast decode for bfloat16.
#include "src/cuda/attention/decode_launch.cuh"

namespace punica::cuda {

Status launch_decode_bfloat16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope) {
  return launch_decode_type<__nv_bfloat16>(launcher, args, rope);
}

}  // namespace punica::cuda
