// add_lora on CUDA devices.
#include "src/cuda/backend.h"

namespace punica::cuda {

Status add_lora(const AddLoraParams& /*params*/, const Context& /*context*/) {
  return {StatusCode::kUnsupported,
          "add_lora: this build has no CUDA kernels of it; dispatch_bgmv and sgmv compute the same in two calls"};
}

}  // namespace punica::cuda
