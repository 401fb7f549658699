// The second half of the fast decode: queries that several blocks of decode_kernel had parts of. Block (x, y) takes
// what block x of that kernel began and left, and of its heads every gridDim.y-th from y.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

inline constexpr int kMergeDecodeThreads = 128;

// kColumns: dims of a thread.
template <Arch kArch, class T, int kColumns>
__global__ void __launch_bounds__(kMergeDecodeThreads)
    merge_decode_kernel(const __grid_constant__ AttentionArgs args, const DecodePiece* pieces, int tile_heads) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kBatch = 8;  // loads under way
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    const DecodePiece piece = pieces[blockIdx.x];
    if (piece.count == 0) return;
    const int kv_head = piece.part / args.head_tiles, head_tile = piece.part - kv_head * args.head_tiles;
    const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * tile_heads;
    const int heads_left = args.group_size - head_tile * tile_heads;
    const int num_heads = heads_left < tile_heads ? heads_left : tile_heads;
    // What follows the splits that the block had summed, and their sum in front.
    const int64_t count = piece.count - piece.prefix;
    const int64_t stride = args.num_heads();  // from split to split
    for (int h = blockIdx.y; h < num_heads; h += gridDim.y) {
      const int64_t head = first_head + h, begin = piece.first_slot * stride + head;
      float maximum = minus_infinity(), weight = 0.0f, sums[kColumns] = {};
      const auto fold_in = [&](const float2& state, const float (&part)[kColumns]) {
        const Fold fold(maximum, state.x);
        fold(weight, state.y);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) fold(sums[c], part[c]);
      };
      const auto load_part = [&](const float* from, float (&part)[kColumns]) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int d = threadIdx.x + kMergeDecodeThreads * c;
          part[c] = d < args.head_dim ? from[kMergeDecodeThreads * c] : 0.0f;
        }
      };
      float2 states[kBatch];
      float parts[kBatch][kColumns];
      states[0] = args.partial_states[begin];
      load_part(args.partial_sums + begin * args.head_dim + threadIdx.x, parts[0]);
      const float2* next_state = args.partial_states + begin + piece.prefix * stride;
      const float* next_part = args.partial_sums + (begin + piece.prefix * stride) * args.head_dim + threadIdx.x;
      const int64_t part_stride = stride * args.head_dim;
      int first = 1;  // the front is in the first batch
#pragma unroll 1
      for (int64_t left = count; left > 0 || first == 1; first = 0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (i < first || i - first >= left) continue;
          states[i] = *next_state;
          load_part(next_part, parts[i]);
          next_state += stride;
          next_part += part_stride;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (i - first < left) fold_in(states[i], parts[i]);
        }
        left -= kBatch - first;
      }
      T* to = static_cast<T*>(args.o) + piece.sequence * args.o_stride + head * args.head_dim;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = threadIdx.x + kMergeDecodeThreads * c;
        if (d < args.head_dim) to[d] = from_float<T>(__fdiv_rn(sums[c], weight));
      }
      if (args.lse != nullptr && threadIdx.x == 0) {
        args.lse[piece.sequence * args.num_heads() + head] = __fadd_rn(maximum, log2f(weight));
      }
    }
  }
}

}  // namespace punica::cuda
