#include "punica/build.h"

#ifdef PUNICA_WITH_CUDA
#include "src/cuda/backend.h"
#endif

namespace punica {

const char* version() { return PUNICA_VERSION; }

bool has_cuda() {
#ifdef PUNICA_WITH_CUDA
  return cuda::kHasKernels;
#else
  return false;
#endif
}

}  // namespace punica
