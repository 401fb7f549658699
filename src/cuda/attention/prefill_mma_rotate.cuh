// Rotates the keys of all sequences once, ahead of a prefill whose blocks would rotate them again and again: in tiles
// of 64 tokens, all heads of a tile by one block, so that an angle serves all of them.
#pragma once

#include <cstdint>

#include "src/cuda/attention/prefill_mma_items.cuh"
#include "src/cuda/attention/prefill_mma_rope.cuh"

namespace punica::cuda {

inline constexpr int kRotateThreads = 256, kRotateTokens = 64;

struct RotateShared {
  KeyAngles<kMaxHeadDim, kRotateTokens> angles;
  struct {
    const unsigned char* from;  // null: nobody sees it
    unsigned char* to;
  } rows[kRotateTokens];
  uint64_t turns[kMaxHeadDim / 2];
  MmaWalk walk;
  int64_t first;  // token of the tile; negative: there are no more
};

// D a multiple of 16. Grid: any.
template <Arch kArch, class T>
__global__ void __launch_bounds__(kRotateThreads, 4)
    rotate_keys_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ MmaCall call,
                       const __grid_constant__ RopeTable rope) {
  if constexpr (kCompiled<kArch>) {
    __shared__ RotateShared shared;
    const int thread = threadIdx.x, half = args.head_dim / 2, pairs = half / 8;
    launch_dependents<kArch>();
    for (int d = thread; d < half; d += kRotateThreads) shared.turns[d] = rope.turns[d];
    __syncthreads();
    shared.angles.set_near(shared.turns, half);
    if (thread == 0) shared.walk = {-1};
    grid_dependency_wait<kArch>();
    if (call.next_item != nullptr && blockIdx.x == 0 && thread == 0) *call.next_item = 0;
    if (!find_way(args, call).rotated) return;
    const auto first_tile = [&](int64_t sequence, int64_t kv_len) {
      const int64_t position = kv_len - args.num_queries(sequence);
      return args.first_key(position < 0 ? 0 : position) / kRotateTokens;
    };
    for (int64_t index = blockIdx.x;; index += gridDim.x) {
      __syncthreads();
      if (thread < 32) {
        MmaWalk walk = shared.walk;
        const bool found = walk_to(index, args.num_sequences, walk, [&](int64_t i, int64_t&, int64_t& num_pages) {
          const SequencePages pages = args.pages(i);
          num_pages = pages.num_pages;
          if (args.num_queries(i) == 0) return int64_t{0};
          return (pages.kv_len + kRotateTokens - 1) / kRotateTokens - first_tile(i, pages.kv_len);
        });
        __syncwarp();
        if (thread == 0) {
          shared.walk = walk;
          shared.first = -1;
          if (found) {
            const int64_t tile = first_tile(walk.sequence, args.pages(walk.sequence).kv_len) + index - walk.first;
            shared.first = tile * kRotateTokens;
          }
        }
      }
      __syncthreads();
      const int64_t first = shared.first;
      if (first < 0) break;
      if (thread < kRotateTokens) {
        const SequencePages pages = args.pages(shared.walk.sequence);
        auto& row = shared.rows[thread];
        row = {nullptr, nullptr};
        if (first + thread < pages.kv_len) {
          const TokenPlace place = token_place(first + thread, args.page_size);
          const int64_t slot = place.slot * args.head_dim * 2;
          row.from = reinterpret_cast<const unsigned char*>(args.kv_ptrs[pages.first_page + place.page]) +
                     args.key_bytes + slot;
          row.to = call.rotated + (shared.walk.pages_before + place.page) * args.num_kv_heads * args.head_bytes + slot;
        }
      }
      shared.angles.set_far(shared.turns, half, first);
      __syncthreads();
      for (int i = thread; i < kRotateTokens * pairs; i += kRotateThreads) {
        const int token = i / pairs, c = i - token * pairs;
        const auto row = shared.rows[token];
        if (row.from == nullptr) continue;
        float4 angles[4];
        chunk_angles(shared.angles, token, c, angles);
        const unsigned char* from = row.from + 16 * c;
        unsigned char* to = row.to + 16 * c;
#pragma unroll 4
        for (int head = 0; head < args.num_kv_heads; ++head) {
          uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + 2 * half);
          rotate_chunks<T>(angles, low, high);
          *reinterpret_cast<uint4*>(to) = low;
          *reinterpret_cast<uint4*>(to + 2 * half) = high;
          from += args.head_bytes;
          to += args.head_bytes;
        }
      }
    }
  }
}

}  // namespace punica::cuda
