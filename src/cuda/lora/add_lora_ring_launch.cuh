// Launches of add_lora_ring.cuh, for the files that each compile one data type.
#pragma once

#include <algorithm>

#include "src/cuda/lora/add_lora_ring.cuh"

namespace punica::cuda::fused_lora {

template <Arch kArch, class T, int kTeamBits>
Status launch_plain(const Launcher& launcher, const Args& args, LaunchShape shape) {
  const int fragment_bytes = plain_fragment_bytes(std::min(args.max_rank, kPlainRank), kTeamBits);
  // Also for what goes the general way in the end.
  shape.shared_bytes =
      std::max(shape.shared_bytes, kHeadBytes + fragment_bytes + size_t{kUnitBytes} * kPlainWarps * kPlainDepth);
  return args.leaf_pieces > 1
             ? launcher.launch<add_lora_plain_kernel<kArch, T, kTeamBits, true>>(shape, args, fragment_bytes)
             : launcher.launch<add_lora_plain_kernel<kArch, T, kTeamBits, false>>(shape, args, fragment_bytes);
}

template <Arch kArch, class T>
Status launch_ring_on(const Launcher& launcher, const Args& args) {
  const int team_bits = args.team_bits;
  LaunchShape shape;
  shape.cluster = 1u << team_bits;
  shape.grid = dim3(static_cast<unsigned>(max_tiles(args, kTileRows) << team_bits), args.num_slices);
  shape.block = kRingThreads;
  shape.shared_bytes = kHeadBytes + general_shared_bytes(args.max_rank, std::is_same_v<T, __half>);
  bool plain = args.x_vectors && args.y_vectors && args.h_in % 8 == 0 && args.x_row_bytes < INT32_MAX &&
               args.y_row_bytes < INT32_MAX;
  for (int s = 0; s <= args.num_slices; ++s) plain = plain && args.slice_begin[s] % 8 == 0;
  if (!plain) return launcher.launch<add_lora_general_kernel<kArch, T>>(shape, args, team_bits);
  if constexpr (kArch == Arch::kSm80) {
    return launch_plain<kArch, T, 0>(launcher, args, shape);
  } else {
    switch (team_bits) {
      case 3:
        return launch_plain<kArch, T, 3>(launcher, args, shape);
      case 2:
        return launch_plain<kArch, T, 2>(launcher, args, shape);
      default:
        return launch_plain<kArch, T, 1>(launcher, args, shape);
    }
  }
}

template <class T>
Status launch_ring_as(const Launcher& launcher, const Args& args) {
  return launcher.arch == Arch::kSm90 ? launch_ring_on<Arch::kSm90, T>(launcher, args)
                                      : launch_ring_on<Arch::kSm80, T>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
