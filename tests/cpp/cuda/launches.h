// Which kernels a call of the library launches: the test programs are linked so that Launcher::launch_symbol passes
// through here (launches.cc). With that, a run of few cases can be chosen that reaches every kernel that many would,
// and can show that it did: at its end, a program writes the names of all kernels that it launched to the file that
// PUNICA_TEST_KERNELS names, if it does, and behind a minus sign those that it has and did not launch.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "punica/cuda.h"

// While one of these lives, calls of the library launch nothing and only leave the names of their kernels, so that
// tensors may lie at addresses where there is no memory.
class LaunchRecorder {
 public:
  LaunchRecorder();
  ~LaunchRecorder();
  LaunchRecorder(const LaunchRecorder&) = delete;
  LaunchRecorder& operator=(const LaunchRecorder&) = delete;
  // Mangled, in the order of the calls.
  const std::vector<std::string>& kernels() const { return kernels_; }

 private:
  friend class LaunchRecorderAccess;
  std::vector<std::string> kernels_;
};

// An address for tensors that a recorder's calls take: a multiple of 1024 and `bytes` more.
inline void* nowhere(int64_t bytes = 0) { return reinterpret_cast<void*>((int64_t{1} << 40) + bytes); }

// Chooses cases so that every kernel is launched by one that was chosen, and every kernel in float16 or bfloat16 with
// each of the features that cases say they have (unaligned, early reads, ...). To be asked in ascending order of what
// cases cost.
class KernelCover {
 public:
  // Whether the case that launches these kernels is needed. If so, they count as covered.
  bool needs(const std::vector<std::string>& kernels, const std::vector<std::string>& features);

 private:
  std::set<std::string> seen_;
};

// What to call before every launch in earnest.
void set_before_launch(void (*hook)());

// Whether at least one kernel was launched in earnest, and all of them are of this path, which is part of their names.
bool launched_only(punica::cuda::Arch arch);
