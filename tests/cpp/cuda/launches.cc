#include "tests/cpp/cuda/launches.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <unordered_map>

#include "src/cuda/common/launch.h"

using punica::cuda::KernelState;
using punica::cuda::Launcher;
using punica::cuda::LaunchShape;

// What the linker's --wrap=SYMBOL makes of Launcher::launch_symbol: calls of it come to __wrap_SYMBOL, and itself is
// __real_SYMBOL. A member function takes `this` as a free function takes its first argument.
// NOLINTBEGIN(misc-use-internal-linkage): the linker joins them to other files
punica::Status real_launch_symbol(const Launcher* launcher, const void* symbol, KernelState* state,
                                  const LaunchShape& shape, void** parameters) __asm__("__real_" PUNICA_LAUNCH_SYMBOL);
punica::Status wrapped_launch_symbol(const Launcher* launcher, const void* symbol, KernelState* state,
                                     const LaunchShape& shape,
                                     void** parameters) __asm__("__wrap_" PUNICA_LAUNCH_SYMBOL);
// Where the code that nvcc makes tells the runtime of a kernel: the only source of names that loads nothing. A kernel's
// whole module is loaded, and instrumented by compute-sanitizer, when the runtime is asked for its name.
void real_register(void** module, const char* host, char* device, const char* name, int threads, uint3* thread,
                   uint3* block, dim3* block_dim, dim3* grid_dim,
                   int* warp_size) __asm__("__real___cudaRegisterFunction");
void wrapped_register(void** module, const char* host, char* device, const char* name, int threads, uint3* thread,
                      uint3* block, dim3* block_dim, dim3* grid_dim,
                      int* warp_size) __asm__("__wrap___cudaRegisterFunction");
// NOLINTEND(misc-use-internal-linkage)

namespace {

// By the address of the host's stub. Filled before main, in any order with other static objects.
std::unordered_map<const void*, const char*>& kernel_names() {
  static auto* const names = new std::unordered_map<const void*, const char*>;
  return *names;
}

LaunchRecorder* g_recorder = nullptr;
std::set<std::string> g_launched;
void (*g_before_launch)() = nullptr;

const struct WriteAtExit {
  ~WriteAtExit() {
    const char* path = std::getenv("PUNICA_TEST_KERNELS");
    std::FILE* const file = path == nullptr ? nullptr : std::fopen(path, "w");
    if (file == nullptr) return;
    for (const std::string& name : g_launched) std::fprintf(file, "%s\n", name.c_str());
    // Those that were not, of both paths.
    for (const auto& [symbol, name] : kernel_names()) {
      if (g_launched.count(name) == 0 && std::strstr(name, "4ArchE") != nullptr) std::fprintf(file, "-%s\n", name);
    }
    std::fclose(file);
  }
} g_write_at_exit;

}  // namespace

class LaunchRecorderAccess {
 public:
  static void add(LaunchRecorder* recorder, const char* name) { recorder->kernels_.emplace_back(name); }
};

void wrapped_register(void** module, const char* host, char* device, const char* name, int threads, uint3* thread,
                      uint3* block, dim3* block_dim, dim3* grid_dim, int* warp_size) {
  kernel_names()[host] = name;
  real_register(module, host, device, name, threads, thread, block, block_dim, grid_dim, warp_size);
}

punica::Status wrapped_launch_symbol(const Launcher* launcher, const void* symbol, KernelState* state,
                                     const LaunchShape& shape, void** parameters) {
  const auto found = kernel_names().find(symbol);
  if (found == kernel_names().end()) {
    std::printf("FAILED: a kernel without a name\n");
    std::exit(1);
  }
  const char* const name = found->second;
  if (g_recorder != nullptr) {
    LaunchRecorderAccess::add(g_recorder, name);
    return {};
  }
  g_launched.insert(name);
  if (g_before_launch != nullptr) g_before_launch();
  return real_launch_symbol(launcher, symbol, state, shape, parameters);
}

LaunchRecorder::LaunchRecorder() { g_recorder = this; }
LaunchRecorder::~LaunchRecorder() { g_recorder = nullptr; }

bool KernelCover::needs(const std::vector<std::string>& kernels, const std::vector<std::string>& features) {
  bool needed = false;
  for (const std::string& kernel : kernels) {
    needed |= seen_.insert(kernel).second;
    // Both types of 16 bits run the same code but for conversions.
    std::string either = kernel;
    for (const std::string& type : {std::string("6__half"), std::string("13__nv_bfloat16")}) {
      for (size_t at; (at = either.find(type)) != std::string::npos;) either.replace(at, type.size(), "16");
    }
    either += ' ';
    for (const std::string& feature : features) needed |= seen_.insert(std::string(either).append(feature)).second;
  }
  return needed;
}

void set_before_launch(void (*hook)()) { g_before_launch = hook; }

bool launched_only(punica::cuda::Arch arch) {
  const std::string wanted = arch == punica::cuda::Arch::kSm90 ? "4ArchE1E" : "4ArchE0E";
  return !g_launched.empty() && std::all_of(g_launched.begin(), g_launched.end(), [&](const std::string& name) {
    return name.find(wanted) != std::string::npos;
  });
}
