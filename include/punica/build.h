// What this build of the library is.
#pragma once

namespace punica {

const char* version();  // "0.1.0"
bool has_cuda();        // the CUDA backend was compiled in

}  // namespace punica
