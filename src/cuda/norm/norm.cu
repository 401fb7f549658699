// Root-mean-square normalisation on CUDA devices.
#include "src/cuda/backend.h"
#include "src/cuda/common/no_kernels.h"

namespace punica::cuda {

Status rms_norm(const RmsNormParams& /*params*/, const Context& /*context*/) { return no_kernels("rms_norm"); }

}  // namespace punica::cuda
