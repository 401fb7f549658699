// Writes into the paged KV cache on CUDA devices.
#include "src/cuda/backend.h"
#include "src/cuda/common/no_kernels.h"

namespace punica::cuda {

Status init_kv(const InitKvParams& /*params*/, const Context& /*context*/) { return no_kernels("init_kv"); }

Status append_kv(const AppendKvParams& /*params*/, const Context& /*context*/) { return no_kernels("append_kv"); }

}  // namespace punica::cuda
