# Sets PUNICA_CUDA_BUILT, and punica_cuda_summary: the one line that says what became of the CUDA backend.
set(PUNICA_CUDA_BUILT OFF)

if(NOT PUNICA_CUDA)
  set(punica_cuda_summary "CUDA backend: switched off (PUNICA_CUDA=OFF), building the CPU backend alone")
  return()
endif()

include(CheckLanguage)
# The compiler check must not use a default architecture that the toolkit has dropped.
set(CMAKE_CUDA_ARCHITECTURES "${PUNICA_CUDA_ARCHITECTURES}")
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  # CMake 3.25 does not know nvcc's flag for C++20, which nvcc has since 12.0.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(PUNICA_CUDA_BUILT ON)
  string(REPLACE ";" ", " punica_cuda_list "${PUNICA_CUDA_ARCHITECTURES}")
  set(punica_cuda_summary
      "CUDA backend: built for ${punica_cuda_list} with CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
elseif(PUNICA_CUDA STREQUAL "AUTO")
  set(punica_cuda_summary "CUDA backend: no CUDA compiler found, building the CPU backend alone")
else()
  message(FATAL_ERROR "PUNICA_CUDA=${PUNICA_CUDA}, but no CUDA compiler was found. Set CMAKE_CUDA_COMPILER or PATH.")
endif()
