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
    const int64_t count = piece.count - piece.prefix + 1;
    for (int h = blockIdx.y; h < num_heads; h += gridDim.y) {
      const int64_t head = first_head + h;
      float maximum = minus_infinity(), weight = 0.0f, sums[kColumns] = {};
#pragma unroll 1
      for (int64_t base = 0; base < count; base += kBatch) {
        float2 states[kBatch];
        float parts[kBatch][kColumns];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (base + i >= count) continue;
          const int64_t slot = piece.first_slot + (base + i == 0 ? 0 : piece.prefix + base + i - 1);
          const int64_t index = slot * args.num_heads() + head;
          states[i] = args.partial_states[index];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const int d = threadIdx.x + kMergeDecodeThreads * c;
            parts[i][c] = d < args.head_dim ? args.partial_sums[index * args.head_dim + d] : 0.0f;
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (base + i >= count) continue;
          const Fold fold(maximum, states[i].x);
          fold(weight, states[i].y);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) fold(sums[c], parts[i][c]);
        }
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
