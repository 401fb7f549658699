// LoRA of segments of rows on CUDA devices.
#include "src/cuda/backend.h"
#include "src/cuda/common/no_kernels.h"

namespace punica::cuda {

int64_t sgmv_cutlass_tmp_size(int64_t /*num_segments*/) { return 0; }

Status sgmv(const SgmvParams& params, const Context& /*context*/) {
  return no_kernels(params.weights == SgmvWeights::kOutIn ? "sgmv_shrink" : "sgmv_cutlass");
}

}  // namespace punica::cuda
