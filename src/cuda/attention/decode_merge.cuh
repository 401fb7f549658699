// The second half of the fast decode: queries that several blocks of decode_kernel had parts of. Block (x, y) takes the
// one that began in block x of that kernel and did not end there, and of its heads every gridDim.y-th from y. Each warp
// folds the splits of a group, all of whose loads are under way at once, then the block folds the groups.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// Many threads for few queries, of which each may have many groups; few where there are many pieces.
template <Arch kArch, class T, int kDim, int kThreads>
__global__ void __launch_bounds__(kThreads, 768 / kThreads)
    merge_decode_kernel(const __grid_constant__ AttentionArgs args, const DecodePiece* pieces, int tile_heads) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kWarps = kThreads / 32, kVectors = (kDim + 127) / 128;
    constexpr int kDims = (kDim + kThreads - 1) / kThreads;  // of a thread
    __shared__ float group_sums[kWarps][kDim];
    __shared__ float2 group_states[kWarps];
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    const DecodePiece piece = pieces[blockIdx.x];
    if (piece.count == 0) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int kv_head = piece.part / args.head_tiles, head_tile = piece.part - kv_head * args.head_tiles;
    const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * tile_heads;
    const int heads_left = args.group_size - head_tile * tile_heads;
    const int num_heads = heads_left < tile_heads ? heads_left : tile_heads;
    // The number of the query's first split among all of the batch.
    const int first_index = piece.first_slot * args.num_kv_heads * args.head_tiles + piece.part * piece.count;
    const auto owner = [&](int index) {
      const int longer = piece.more * (piece.each + 1);
      return index < longer ? index / (piece.each + 1) : piece.more + (index - longer) / piece.each;
    };
    const int64_t stride = args.num_heads();  // from split to split
    const int num_groups = (piece.count + kGroupSplits - 1) / kGroupSplits;

    for (int h = blockIdx.y; h < num_heads; h += gridDim.y) {
      const int64_t first = piece.first_slot * stride + first_head + h;
      float maximum = minus_infinity(), weight = 0.0f, sum[kDims] = {};  // of dims `thread`, + kThreads ..
      if (piece.groups > 0) {
        const float2 state = args.partial_states[first];
        maximum = state.x;
        weight = state.y;
#pragma unroll
        for (int c = 0; c < kDims; ++c) {
          const int d = thread + c * kThreads;
          if (d < kDim) sum[c] = args.partial_sums[first * kDim + d];
        }
      }
      for (int base = piece.groups; base < num_groups; base += kWarps) {
        if (base + warp < num_groups) {
          const int begin = (base + warp) * kGroupSplits, end = min(begin + kGroupSplits, piece.count);
          // Splits of the group that its first block has are one.
          const int next = owner(first_index + begin) + 1;
          const int skipped = min(piece.each * next + min(next, piece.more) - first_index, end) - begin - 1;
          const int count = end - begin - skipped;
          float2 states[kGroupSplits];
          float4 sums[kGroupSplits][kVectors];
#pragma unroll
          for (int i = 0; i < kGroupSplits; ++i) {
            if (i >= count) continue;
            const int64_t index = first + static_cast<int64_t>(begin + (i == 0 ? 0 : i + skipped)) * stride;
            states[i] = args.partial_states[index];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              const int d = 4 * lane + 128 * v;
              if (d < kDim) sums[i][v] = *reinterpret_cast<const float4*>(args.partial_sums + index * kDim + d);
            }
          }
#pragma unroll
          for (int i = 1; i < kGroupSplits; ++i) {
            if (i >= count) continue;
            const Fold fold(states[0].x, states[i].x);
            fold(states[0].y, states[i].y);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              fold(sums[0][v].x, sums[i][v].x);
              fold(sums[0][v].y, sums[i][v].y);
              fold(sums[0][v].z, sums[i][v].z);
              fold(sums[0][v].w, sums[i][v].w);
            }
          }
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int d = 4 * lane + 128 * v;
            if (d < kDim) *reinterpret_cast<float4*>(&group_sums[warp][d]) = sums[0][v];
          }
          if (lane == 0) group_states[warp] = states[0];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          if (base + i >= num_groups) continue;
          const Fold fold(maximum, group_states[i].x);
          fold(weight, group_states[i].y);
#pragma unroll
          for (int c = 0; c < kDims; ++c) {
            const int d = thread + c * kThreads;
            if (d < kDim) fold(sum[c], group_sums[i][d]);
          }
        }
        __syncthreads();
      }
      T* to = static_cast<T*>(args.o) + piece.sequence * args.o_stride + (first_head + h) * kDim;
#pragma unroll
      for (int c = 0; c < kDims; ++c) {
        const int d = thread + c * kThreads;
        if (d < kDim) to[d] = from_float<T>(__fdiv_rn(sum[c], weight));
      }
      if (args.lse != nullptr && thread == 0) {
        args.lse[piece.sequence * args.num_heads() + first_head + h] = __fadd_rn(maximum, log2f(weight));
      }
    }
  }
}

}  // namespace punica::cuda
