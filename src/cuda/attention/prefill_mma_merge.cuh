// The second half of the prefill by warp products where splits were items of their own: a warp merges the partial
// results of a query and a head, from left to right, as MmaWarp::fold_split() does. Grid: (rows of q, blocks that share
// the heads).
#pragma once

#include <cstdint>

#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/prefill_mma_items.cuh"

namespace punica::cuda {

inline constexpr int kMmaMergeThreads = 128;

template <Arch kArch, class T>
__global__ void __launch_bounds__(kMmaMergeThreads)
    merge_prefill_mma_kernel(const __grid_constant__ AttentionArgs args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kPairs = kMaxHeadDim / 64, kWarps = kMmaMergeThreads / 32;
    __shared__ int sequence_of_row;
    __shared__ unsigned long long slots_before;
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = blockIdx.x;
    if (!find_way(args, {}).apart) return;
    if (threadIdx.x == 0) sequence_of_row = -1, slots_before = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < args.num_sequences; i += kMmaMergeThreads) {
      const int64_t begin = args.row_begin(i);
      if (row >= begin && row < begin + args.num_queries(i)) atomicMax(&sequence_of_row, static_cast<int>(i));
    }
    __syncthreads();
    const int64_t sequence = sequence_of_row;
    if (sequence < 0) return;
    const SequencePages pages = args.pages(sequence);
    const int64_t splits = mma_splits(pages.kv_len);
    if (splits == 1) return;
    unsigned long long slots = 0;
    for (int64_t i = threadIdx.x; i < sequence; i += kMmaMergeThreads) {
      slots += args.num_queries(i) * mma_splits(args.pages(i).kv_len);
    }
    atomicAdd(&slots_before, slots);
    __syncthreads();
    const int64_t query = row - args.row_begin(sequence);
    const int64_t position = pages.kv_len - args.num_queries(sequence) + query;
    const int64_t first_slot = static_cast<int64_t>(slots_before) + query * splits;
    const int64_t begin = position < 0 ? 0 : args.first_key(position) / kMmaSplitTokens;
    const int64_t end = position < 0 ? 0 : position / kMmaSplitTokens + 1;
    for (int64_t head = int64_t{blockIdx.y} * kWarps + warp; head < args.num_heads();
         head += int64_t{gridDim.y} * kWarps) {
      float maximum = minus_infinity(), weight = 0.0f;
      float2 sums[kPairs] = {};
#pragma unroll 4
      for (int64_t split = begin; split < end; ++split) {
        const int64_t index = (first_slot + split) * args.num_heads() + head;
        const float2 state = args.partial_states[index];
        const float2* const from = reinterpret_cast<const float2*>(args.partial_sums + index * args.head_dim) + lane;
        float2 later[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          later[i] = 2 * lane + 64 * i < args.head_dim ? from[32 * i] : make_float2(0.0f, 0.0f);
        }
        const Fold fold(maximum, state.x);
        fold(weight, state.y);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          fold(sums[i].x, later[i].x);
          fold(sums[i].y, later[i].y);
        }
      }
      const bool empty = begin == end;
      const float inverse = empty ? 0.0f : __fdiv_rn(1.0f, weight);
      T* const to = static_cast<T*>(args.o) + row * args.o_stride + head * args.head_dim;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int d = 2 * lane + 64 * i;
        if (d >= args.head_dim) continue;
        to[d] = from_float<T>(empty ? 0.0f : __fadd_rn(__fmul_rn(sums[i].x, inverse), 0.0f));
        to[d + 1] = from_float<T>(empty ? 0.0f : __fadd_rn(__fmul_rn(sums[i].y, inverse), 0.0f));
      }
      if (args.lse != nullptr && lane == 0) {
        args.lse[row * args.num_heads() + head] = empty ? minus_infinity() : __fadd_rn(maximum, log2f(weight));
      }
    }
  }
}

}  // namespace punica::cuda
