// Attention over the paged KV cache on CUDA devices.
#include "src/cuda/backend.h"
#include "src/cuda/common/no_kernels.h"

namespace punica::cuda {

int64_t workspace_bytes(const BatchPrefillParams& /*params*/) { return 0; }
int64_t workspace_bytes(const BatchDecodeParams& /*params*/) { return 0; }

Status batch_prefill(const BatchPrefillParams& /*params*/, const Context& /*context*/) {
  return no_kernels("batch_prefill");
}

Status batch_decode(const BatchDecodeParams& /*params*/, const Context& /*context*/) {
  return no_kernels("batch_decode");
}

}  // namespace punica::cuda
