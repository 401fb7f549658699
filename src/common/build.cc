#include "punica/build.h"

namespace punica {

const char* version() { return PUNICA_VERSION; }

bool has_cuda() {
#ifdef PUNICA_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace punica
