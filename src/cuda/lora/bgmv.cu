// dispatch_bgmv on CUDA devices.
#include "src/cuda/backend.h"
#include "src/cuda/common/no_kernels.h"

namespace punica::cuda {

Status dispatch_bgmv(const BgmvParams& /*params*/, const Context& /*context*/) { return no_kernels("dispatch_bgmv"); }

}  // namespace punica::cuda
