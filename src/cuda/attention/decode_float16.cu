// The fast decode for float16.
#include "src/cuda/attention/decode_launch.cuh"

namespace punica::cuda {

Status launch_decode_float16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope) {
  return launch_decode_type<__half>(launcher, args, rope);
}

}  // namespace punica::cuda
