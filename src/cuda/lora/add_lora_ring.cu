// Launches of add_lora_ring.cuh.
#include <algorithm>

#include "src/cuda/lora/add_lora_ring.cuh"

namespace punica::cuda::fused_lora {
namespace {

// Blocks that a launch of few tiles is filled up to, about one for each multiprocessor of an H200. Nothing that depends
// on it changes bits.
constexpr int64_t kBlocks = 128;

template <Arch kArch, class T>
Status launch(const Launcher& launcher, const Args& args) {
  const int64_t tiles = max_tiles(args, kTileRows);
  int cluster_bits = 0, min_team_bits = 0;
  int64_t clusters = tiles;
  if (kArch == Arch::kSm90) {
    if (tiles <= kBlocks) {
      // How many tiles there are is known on the device alone: there blocks of a cluster share one, or a few.
      cluster_bits = kMaxTeamBits;
      min_team_bits = 1;
      clusters = std::min(tiles, std::max(kBlocks >> cluster_bits, (tiles + 3) / 4));
    } else {
      cluster_bits = min_team_bits = 1;
    }
  }
  LaunchShape shape;
  shape.cluster = 1u << cluster_bits;
  shape.grid = static_cast<unsigned>(clusters << cluster_bits);
  shape.block = kRingThreads;
  bool plain = args.x_vectors && args.y_vectors && args.h_in % 8 == 0;
  for (int s = 0; s <= args.num_slices; ++s) plain = plain && args.slice_begin[s] % 8 == 0;
  const size_t general_bytes = general_shared_bytes(args.max_rank, std::is_same_v<T, __half>);
  shape.shared_bytes =
      kHeadBytes +
      (plain ? std::max(general_bytes, plain_shared_bytes(args, min_team_bits, cluster_bits)) : general_bytes);
  return plain ? launcher.launch<add_lora_ring_kernel<kArch, T, true>>(shape, args, cluster_bits, min_team_bits)
               : launcher.launch<add_lora_ring_kernel<kArch, T, false>>(shape, args, cluster_bits, min_team_bits);
}

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  return launcher.arch == Arch::kSm90 ? launch<Arch::kSm90, T>(launcher, args) : launch<Arch::kSm80, T>(launcher, args);
}

}  // namespace

Status launch_ring(const Launcher& launcher, DType dtype, const Args& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
