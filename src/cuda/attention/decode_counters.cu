// Which set of counters (decode_arrive.cuh) belongs to a workspace.
#include <atomic>
#include <cstdint>

#include "src/cuda/attention/decode.h"

namespace punica::cuda {

int decode_counters(const void* workspace) {
  // Never given back: graphs that were captured keep theirs. An engine has few workspaces.
  static std::atomic<uintptr_t> owners[kDecodeCounterSets];
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  const uint64_t hash = static_cast<uint64_t>(address) * 0x9e3779b97f4a7c15u;
  int at = static_cast<int>((hash >> 32) % kDecodeCounterSets);
  for (int tries = 0; tries < kDecodeCounterSets; ++tries) {
    uintptr_t owner = owners[at].load(std::memory_order_relaxed);
    if (owner == 0 && owners[at].compare_exchange_strong(owner, address, std::memory_order_relaxed)) return at;
    if (owner == address) return at;
    at = at + 1 == kDecodeCounterSets ? 0 : at + 1;
  }
  return -1;
}

}  // namespace punica::cuda
