// The second half of decode: the partial results of each row's splits, merged from left to right. A block takes one
// sequence and some of its heads, a warp one head at a time. Sequences of a single split are done already.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

inline constexpr int kMergeThreads = 128;

// Heads of one sequence are spread over `head_blocks` blocks.
template <Arch kArch, class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ AttentionArgs args, int head_blocks) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kColumns = kMaxHeadDim / 32, kWarps = kMergeThreads / 32;
    __shared__ unsigned long long first_slot, num_slots;
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t sequence = blockIdx.x / head_blocks;
    const int64_t count = args.num_splits(args.pages(sequence).kv_len);
    if (count <= 1) return;
    // Partial results lie in the order of the items of attention_kernel: those of all sequences before come first.
    if (threadIdx.x == 0) first_slot = num_slots = 0;
    __syncthreads();
    unsigned long long before = 0, all = 0;
    for (int64_t i = threadIdx.x; i < args.num_sequences; i += kMergeThreads) {
      const int64_t splits = args.num_splits(args.pages(i).kv_len);
      all += splits;
      if (i < sequence) before += splits;
    }
    atomicAdd(&first_slot, before);
    atomicAdd(&num_slots, all);
    __syncthreads();
    if (num_slots > static_cast<unsigned long long>(args.num_slots)) return;

    for (int64_t head = blockIdx.x % head_blocks * kWarps + warp; head < args.num_heads();
         head += static_cast<int64_t>(head_blocks) * kWarps) {
      RowState<kColumns> total;
      total.clear();
      for (int64_t split = 0; split < count; ++split) {
        const int64_t index = (static_cast<int64_t>(first_slot) + split) * args.num_heads() + head;
        const float2 state = args.partial_states[index];
        RowState<kColumns> part;
        part.maximum = state.x;
        part.weight = state.y;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int d = lane + 32 * c;
          part.sums[c] = d < args.head_dim ? args.partial_sums[index * args.head_dim + d] : 0.0f;
        }
        total.merge(part);
      }
      T* to = static_cast<T*>(args.o) + sequence * args.o_stride + head * args.head_dim;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane + 32 * c;
        if (d < args.head_dim) to[d] = from_float<T>(__fdiv_rn(total.sums[c], total.weight));
      }
      if (args.lse != nullptr && lane == 0) args.lse[sequence * args.num_heads() + head] = total.log_sum();
    }
  }
}

}  // namespace punica::cuda
