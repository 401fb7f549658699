// Functions of the driver that the runtime has loaded: the library links to no driver.
#pragma once

#include <cuda_runtime.h>

namespace punica::cuda {

// The driver's function of this name, as CUDA 12.0 has it; cudaErrorNotSupported where there is none.
cudaError_t find_driver_function(const char* name, void** function);

}  // namespace punica::cuda
