# punica_highway: the headers of Google Highway, without its library. Instruction sets are chosen by src/cpu/isa.cc, so
# nothing of libhwy is linked, and an installed punica does not need it.
find_path(
  PUNICA_HIGHWAY_INCLUDE_DIR hwy/highway.h
  DOC "Folder that holds hwy/highway.h"
  PATHS /usr/include
  NO_CMAKE_FIND_ROOT_PATH)
if(NOT PUNICA_HIGHWAY_INCLUDE_DIR)
  message(FATAL_ERROR "Google Highway's headers were not found (hwy/highway.h). On Debian and Ubuntu: "
                      "apt-get install libhwy-dev. Elsewhere: set PUNICA_HIGHWAY_INCLUDE_DIR.")
endif()

add_library(punica_highway INTERFACE)
if(CMAKE_CROSSCOMPILING AND PUNICA_HIGHWAY_INCLUDE_DIR STREQUAL "/usr/include")
  # Highway's headers serve every architecture, their neighbours in /usr/include do not.
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/highway")
  file(CREATE_LINK "${PUNICA_HIGHWAY_INCLUDE_DIR}/hwy" "${CMAKE_CURRENT_BINARY_DIR}/highway/hwy" SYMBOLIC)
  target_include_directories(punica_highway SYSTEM INTERFACE "${CMAKE_CURRENT_BINARY_DIR}/highway")
else()
  target_include_directories(punica_highway SYSTEM INTERFACE "${PUNICA_HIGHWAY_INCLUDE_DIR}")
endif()
# Highway's debug assertions call its library; sanitizer builds would switch them on.
target_compile_definitions(punica_highway INTERFACE HWY_IS_DEBUG_BUILD=0)
