// Launches of add_lora_ring.cuh.
#include <algorithm>
#include <cstdlib>

#include "src/cuda/lora/add_lora_ring.cuh"

namespace punica::cuda::fused_lora {
namespace {

// Blocks that a launch of few tiles is filled up to, about one for each multiprocessor of an H200. Nothing that depends
// on it changes bits.
[[maybe_unused]] constexpr int64_t kBlocks = 128;

template <Arch kArch, class T>
Status launch(const Launcher& launcher, const Args& args) {
  const int64_t tiles = max_tiles(args, kTileRows);
  int cluster_bits = 0, min_team_bits = 0;
  int64_t clusters = tiles;
  if (kArch == Arch::kSm90) {
    const char* const text = std::getenv("PROBE_TEAM");
    const int forced = text == nullptr ? 0 : std::atoi(text);
    cluster_bits = tiles <= 32 ? 3 : 2;
    min_team_bits = cluster_bits;
    if (forced % 10 > 0) cluster_bits = min_team_bits = forced % 10;
    if (forced / 10 > 0) {
      min_team_bits = forced / 10;
      clusters = (tiles + (1 << (cluster_bits - min_team_bits)) - 1) >> (cluster_bits - min_team_bits);
    }
  }
  LaunchShape shape;
  shape.cluster = 1u << cluster_bits;
  shape.grid = static_cast<unsigned>(clusters << cluster_bits);
  shape.block = kRingThreads;
  bool plain = args.x_vectors && args.y_vectors && args.h_in % 8 == 0;
  for (int s = 0; s <= args.num_slices; ++s) plain = plain && args.slice_begin[s] % 8 == 0;
  const int rank = std::min(args.max_rank, kPlainRank);
  const int fragment_bytes = plain_fragment_bytes(args.num_slices, rank, min_team_bits, cluster_bits);
  const size_t general_bytes = general_shared_bytes(args.max_rank, std::is_same_v<T, __half>);
  const size_t plain_bytes = size_t{kUnitBytes} * kPlainWarps * kPlainDepth + fragment_bytes;
  shape.shared_bytes = kHeadBytes + (plain ? std::max(general_bytes, plain_bytes) : general_bytes);
  return plain ? launcher.launch<add_lora_ring_kernel<kArch, T, true>>(shape, args, cluster_bits, min_team_bits,
                                                                       fragment_bytes)
               : launcher.launch<add_lora_ring_kernel<kArch, T, false>>(shape, args, cluster_bits, min_team_bits,
                                                                        fragment_bytes);
}

template <class T>
[[maybe_unused]] Status launch(const Launcher& launcher, const Args& args) {
  return launcher.arch == Arch::kSm90 ? launch<Arch::kSm90, T>(launcher, args) : launch<Arch::kSm80, T>(launcher, args);
}

}  // namespace

Status launch_ring(const Launcher& launcher, DType dtype, const Args& args) {
#ifdef PROBE_BF16
  if (dtype != DType::kBFloat16) return {};
  return launch<Arch::kSm90, __nv_bfloat16>(launcher, args);
#else
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
#endif
}

}  // namespace punica::cuda::fused_lora
