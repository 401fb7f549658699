#include "punica/build.h"

#include "punica/cuda.h"

namespace punica {

const char* version() { return PUNICA_VERSION; }

bool has_cuda() {
#ifdef PUNICA_WITH_CUDA
  return true;
#else
  return false;
#endif
}

#ifndef PUNICA_WITH_CUDA
namespace cuda {

const char* arch_name(Arch arch) { return arch == Arch::kSm90 ? "sm_90" : "sm_80"; }

Status active_arch(int /*device*/, Arch* /*arch*/) {
  return {StatusCode::kUnsupported, "active_arch: this build has the CPU backend alone"};
}

const char* last_arch() { return nullptr; }

}  // namespace cuda
#endif

}  // namespace punica
