// Launches of add_lora_ring.cuh, for the files that each compile one data type.
#pragma once

#include <algorithm>

#include "src/cuda/lora/add_lora_ring.cuh"

namespace punica::cuda::fused_lora {

template <Arch kArch, class T>
Status launch_plain(const Launcher& launcher, const Args& args, LaunchShape shape) {
  int fragment_bytes = 0;
  for (int bits = args.team_bits; bits <= args.max_team_bits; ++bits) {
    fragment_bytes = std::max(fragment_bytes, plain_fragment_bytes(std::min(args.max_rank, kPlainRank), bits));
  }
  // Also for what goes the general way in the end.
  shape.shared_bytes =
      std::max(shape.shared_bytes,
               kHeadBytes + fragment_bytes + size_t{kUnitBytes} * kPlainWarps * plain_depth(args.max_team_bits));
  const auto with_ranks = [&]<bool kFewRanks>(std::bool_constant<kFewRanks>) {
    return args.leaf_pieces > 1
               ? launcher.launch<add_lora_plain_kernel<kArch, T, true, kFewRanks>>(shape, args, fragment_bytes)
               : launcher.launch<add_lora_plain_kernel<kArch, T, false, kFewRanks>>(shape, args, fragment_bytes);
  };
  return args.max_rank <= 16 ? with_ranks(std::true_type{}) : with_ranks(std::false_type{});
}

template <Arch kArch, class T>
Status launch_ring_on(const Launcher& launcher, Args args) {
  LaunchShape shape;
  shape.cluster = 1u << args.max_team_bits;
  const int64_t clusters = ((max_tiles(args, kTileRows) << args.team_bits) + shape.cluster - 1) >> args.max_team_bits;
  constexpr int64_t kMostInRow = 32768;  // the second and the third dimension end at 65535
  shape.grid = dim3(static_cast<unsigned>(args.num_slices) << args.max_team_bits,
                    static_cast<unsigned>(std::min(clusters, kMostInRow)),
                    static_cast<unsigned>((clusters + kMostInRow - 1) / kMostInRow));
  args.slice_blocks = shape.grid.y * shape.grid.z << args.max_team_bits;
  shape.block = kRingThreads;
  shape.shared_bytes = kHeadBytes + general_shared_bytes(args.max_rank, std::is_same_v<T, __half>);
  bool plain = args.x_vectors && args.y_vectors && args.h_in % 8 == 0 && args.x_row_bytes < INT32_MAX &&
               args.y_row_bytes < INT32_MAX;
  for (int s = 0; s <= args.num_slices; ++s) plain = plain && args.slice_begin[s] % 8 == 0;
  if (!plain) return launcher.launch<add_lora_general_kernel<kArch, T>>(shape, args);
  return launch_plain<kArch, T>(launcher, args, shape);
}

template <class T>
Status launch_ring_as(const Launcher& launcher, const Args& args) {
  return launcher.arch == Arch::kSm90 ? launch_ring_on<Arch::kSm90, T>(launcher, args)
                                      : launch_ring_on<Arch::kSm80, T>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
