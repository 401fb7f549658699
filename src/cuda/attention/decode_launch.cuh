// From a call to the instance of decode_kernel that serves it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/cuda/attention/decode.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_merge.cuh"

namespace punica::cuda {

inline constexpr int64_t kMergeInside = 4;  // queries and KV heads, from which on the last block of each merges it

template <Arch kArch, class T, int kDim, int kColumns, bool kRope>
Status launch_decode_kernel(const Launcher& launcher, const AttentionArgs& call, const RopeTable* rope) {
  using Shape = DecodeShape<kArch, kDim, kColumns, kRope>;
  AttentionArgs args = call;
  // No window is the widest one, of 32 bits as all positions here (decode_serves()).
  constexpr int64_t kWidest = INT32_MAX;
  args.window_left = args.window_left < 0 ? kWidest : std::min(args.window_left, kWidest);
  // What there may be to do at most, as far as the host knows: all sequences but one may end in a split of their own.
  const double tokens = static_cast<double>(args.num_page_ptrs) * static_cast<double>(args.page_size);
  const int64_t parts = args.num_kv_heads * static_cast<int64_t>(args.head_tiles);
  const double splits =
      std::floor((static_cast<double>(args.num_sequences) * (kSplitTokens - 1) + tokens) / kSplitTokens) *
      static_cast<double>(parts);
  const int64_t most = std::min<int64_t>(Shape::kBlocks * launcher.num_multiprocessors(), kMaxDecodeWorkers);
  const int group_bits = decode_group_bits(parts);
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(
      splits < static_cast<double>(most) ? std::max<int64_t>(1, static_cast<int64_t>(splits)) : most);
  shape.block.x = Shape::kThreads;
  shape.shared_bytes = Shape::kLaunchBytes;
  DecodeMerge left = {nullptr, -1};
  if (args.num_slots > 0) {
    // A block merges a whole query: where there are few of them, a second launch has more blocks for each.
    if (args.num_sequences * parts >= kMergeInside && shape.grid.x < kDecodeCounters) {
      left.counters = decode_counters(args.partial_sums);
    }
    if (left.counters < 0) {
      // Behind the other partial results.
      const uintptr_t end = reinterpret_cast<uintptr_t>(args.partial_states + args.num_slots * args.num_heads());
      left.pieces = reinterpret_cast<DecodePiece*>((end + alignof(DecodePiece) - 1) / alignof(DecodePiece) *
                                                   alignof(DecodePiece));
    }
  }
  if constexpr (kRope) {
    PUNICA_RETURN_IF_ERROR((launcher.launch<decode_kernel<kArch, T, kDim, kColumns, true>>(
        shape, args, left, group_bits, launcher.early_reads, *rope)));
  } else {
    PUNICA_RETURN_IF_ERROR((launcher.launch<decode_kernel<kArch, T, kDim, kColumns, false>>(
        shape, args, left, group_bits, launcher.early_reads, NoRope{})));
  }
  if (left.pieces == nullptr) return {};
  const int64_t queries = args.num_sequences * parts;
  LaunchShape merge;
  merge.grid.y = static_cast<unsigned>(std::min(args.group_size, Shape::kHeads));
  const DecodePiece* const pieces = left.pieces;
  const int tile_heads = Shape::kHeads;
  merge.grid.x = static_cast<unsigned>(std::min<int64_t>(queries, shape.grid.x));
  if (static_cast<int64_t>(merge.grid.x) * merge.grid.y <= launcher.num_multiprocessors()) {
    merge.block.x = 512;
    merge.shared_bytes = merge_decode_shared(kDim, 512);
    return launcher.launch<merge_decode_kernel<kArch, T, kDim, 512>>(merge, args, pieces, group_bits, tile_heads);
  }
  merge.block.x = 128;
  merge.shared_bytes = merge_decode_shared(kDim, 128);
  return launcher.launch<merge_decode_kernel<kArch, T, kDim, 128>>(merge, args, pieces, group_bits, tile_heads);
}

template <Arch kArch, class T, int kDim>
Status launch_decode_dim(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope) {
  if constexpr (decode_head_tile(16, kDim) == 16) {
    if (args.group_size > 8) {
      return rope == nullptr ? launch_decode_kernel<kArch, T, kDim, 2, false>(launcher, args, rope)
                             : launch_decode_kernel<kArch, T, kDim, 2, true>(launcher, args, rope);
    }
  }
  return rope == nullptr ? launch_decode_kernel<kArch, T, kDim, 1, false>(launcher, args, rope)
                         : launch_decode_kernel<kArch, T, kDim, 1, true>(launcher, args, rope);
}

template <Arch kArch, class T>
Status launch_decode_arch(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope) {
  switch (args.head_dim) {
    case 64:
      return launch_decode_dim<kArch, T, 64>(launcher, args, rope);
    case 96:
      return launch_decode_dim<kArch, T, 96>(launcher, args, rope);
    case 128:
      return launch_decode_dim<kArch, T, 128>(launcher, args, rope);
    default:
      return launch_decode_dim<kArch, T, 256>(launcher, args, rope);
  }
}

template <class T>
Status launch_decode_type(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope) {
  if (launcher.arch == Arch::kSm90) return launch_decode_arch<Arch::kSm90, T>(launcher, args, rope);
  return launch_decode_arch<Arch::kSm80, T>(launcher, args, rope);
}

}  // namespace punica::cuda
