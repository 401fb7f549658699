// The second half of the fast decode where the last block of a query does not merge it (decode_arrive.cuh): queries
// that several blocks of decode_kernel had parts of. Block (x, y) takes the one that began in block x of that kernel
// and did not end there, and of its heads every gridDim.y-th from y. Each warp folds the splits of a group, all of
// whose loads are under way at once, then the block folds the groups.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

inline constexpr int merge_decode_shared(int dim, int threads) { return threads / 32 * (dim * 4 + 8); }

// Many threads for few queries, of which each may have many groups; few where there are many pieces.
template <Arch kArch, class T, int kDim, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 128 && kDim <= 128 ? 8 : 1)
    merge_decode_kernel(const __grid_constant__ AttentionArgs args, const DecodePiece* pieces, int group_bits,
                        int tile_heads) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kWarps = kThreads / 32, kVectors = (kDim + 127) / 128;
    constexpr int kDims = (kDim + kThreads - 1) / kThreads;  // of a thread
    constexpr int kBatch = kThreads == 128 ? 4 : 8;          // splits whose loads are under way at once
    // Dynamic, because then it runs with the same division of the first-level cache as decode_kernel: a multiprocessor
    // has to be empty to change it.
    extern __shared__ __align__(16) unsigned char merge_shared[];
    float (*const group_sums)[kDim] = reinterpret_cast<float (*)[kDim]>(merge_shared);
    float2* const group_states = reinterpret_cast<float2*>(merge_shared + kWarps * kDim * 4);
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
    const int group = (piece.count + (1 << group_bits) - 1) >> group_bits;
    const int num_groups = (piece.count + group - 1) / group;
    const int second = owner(first_index) + 1;
    const int whole_groups = (piece.each * second + min(second, piece.more) - first_index) / group;

    for (int h = blockIdx.y; h < num_heads; h += gridDim.y) {
      const int64_t first = piece.first_slot * stride + first_head + h;
      float maximum = minus_infinity(), weight = 0.0f, sum[kDims] = {};  // of dims `thread`, + kThreads ..
      if (whole_groups > 0) {
        const float2 state = args.partial_states[first];
        maximum = state.x;
        weight = state.y;
#pragma unroll
        for (int c = 0; c < kDims; ++c) {
          const int d = thread + c * kThreads;
          if (d < kDim) sum[c] = args.partial_sums[first * kDim + d];
        }
      }
      for (int base = whole_groups; base < num_groups; base += kWarps) {
        if (base + warp < num_groups) {
          const int begin = (base + warp) * group, end = min(begin + group, piece.count);
          // Splits of the group that its first block has are one.
          const int next = owner(first_index + begin) + 1;
          const int skipped = min(piece.each * next + min(next, piece.more) - first_index, end) - begin - 1;
          const int count = end - begin - skipped;
          float2 state = make_float2(0.0f, 0.0f);
          float4 sums[kVectors] = {};
#pragma unroll 1
          for (int from = 0; from < count; from += kBatch) {
            float2 states[kBatch];
            float4 parts[kBatch][kVectors];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (from + i >= count) continue;
              const int64_t index =
                  first + static_cast<int64_t>(begin + (from + i == 0 ? 0 : from + i + skipped)) * stride;
              states[i] = args.partial_states[index];
#pragma unroll
              for (int v = 0; v < kVectors; ++v) {
                const int d = 4 * lane + 128 * v;
                if (d < kDim) parts[i][v] = *reinterpret_cast<const float4*>(args.partial_sums + index * kDim + d);
              }
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (from + i >= count) continue;
              if (from + i == 0) {
                state = states[0];
#pragma unroll
                for (int v = 0; v < kVectors; ++v) sums[v] = parts[0][v];
                continue;
              }
              const Fold fold(state.x, states[i].x);
              fold(state.y, states[i].y);
#pragma unroll
              for (int v = 0; v < kVectors; ++v) {
                fold(sums[v].x, parts[i][v].x);
                fold(sums[v].y, parts[i][v].y);
                fold(sums[v].z, parts[i][v].z);
                fold(sums[v].w, parts[i][v].w);
              }
            }
          }
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int d = 4 * lane + 128 * v;
            if (d < kDim) *reinterpret_cast<float4*>(&group_sums[warp][d]) = sums[v];
          }
          if (lane == 0) group_states[warp] = state;
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
      const float inverse = __fdiv_rn(1.0f, weight);
      T* to = static_cast<T*>(args.o) + piece.sequence * args.o_stride + (first_head + h) * kDim;
#pragma unroll
      for (int c = 0; c < kDims; ++c) {
        const int d = thread + c * kThreads;
        if (d < kDim) to[d] = from_float<T>(__fmul_rn(sum[c], inverse));
      }
      if (args.lse != nullptr && thread == 0) {
        args.lse[piece.sequence * args.num_heads() + first_head + h] = __fadd_rn(maximum, log2f(weight));
      }
    }
  }
}

}  // namespace punica::cuda
