// What an operation without CUDA kernels answers. Nothing is launched and nothing is written.
#pragma once

#include <string>

#include "punica/status.h"

namespace punica::cuda {

inline Status no_kernels(const char* op) {
  return {StatusCode::kUnsupported,
          std::string(op) + ": this version has no CUDA kernels; move the tensors to the CPU"};
}

}  // namespace punica::cuda
