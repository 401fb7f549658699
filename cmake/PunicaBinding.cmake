# libpunica_kernels.so: the operations as tvm-ffi functions. It needs libtvm_ffi.so (which `import tvm_ffi` has loaded
# by then: the loader knows it by its name), glibc and libstdc++; neither Python's nor torch's libraries.
find_package(Python REQUIRED COMPONENTS Interpreter)

function(punica_tvm_ffi option variable)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m tvm_ffi.config ${option}
    OUTPUT_VARIABLE output
    ERROR_VARIABLE error
    RESULT_VARIABLE result
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "tvm-ffi was not found by ${Python_EXECUTABLE}: pip install apache-tvm-ffi\n${error}")
  endif()
  set(${variable} "${output}" PARENT_SCOPE)
endfunction()
punica_tvm_ffi(--includedir punica_tvm_ffi_include)
punica_tvm_ffi(--dlpack-includedir punica_dlpack_include)
punica_tvm_ffi(--libfiles punica_tvm_ffi_library)

add_library(punica_tvm_ffi SHARED IMPORTED)
set_target_properties(
  punica_tvm_ffi
  PROPERTIES IMPORTED_LOCATION "${punica_tvm_ffi_library}"
             INTERFACE_INCLUDE_DIRECTORIES "${punica_tvm_ffi_include};${punica_dlpack_include}")

file(GLOB punica_binding_sources CONFIGURE_DEPENDS bindings/*.cc)
add_library(punica_kernels SHARED ${punica_binding_sources})
target_include_directories(punica_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/src)
target_link_libraries(punica_kernels PRIVATE punica_core punica_options punica_tvm_ffi)
# Nothing but the exported functions is visible: neither the core's symbols, nor the static CUDA runtime's, nor inline
# ones of the C++ library may meet those of another library in the process.
set(punica_exports "${CMAKE_CURRENT_LIST_DIR}/exports.ld")
target_link_options(punica_kernels PRIVATE -Wl,--version-script=${punica_exports} -Wl,--as-needed)
set_target_properties(punica_kernels PROPERTIES LINK_DEPENDS "${punica_exports}")
if(NOT PUNICA_SANITIZE)
  target_link_options(punica_kernels PRIVATE -Wl,-z,defs)
endif()
set_target_properties(punica_kernels PROPERTIES BUILD_RPATH "" INSTALL_RPATH "" SKIP_BUILD_RPATH ON)
if(PUNICA_CUDA_BUILT)
  set_target_properties(punica_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endif()

install(TARGETS punica_kernels LIBRARY DESTINATION punica_kernels COMPONENT python)
