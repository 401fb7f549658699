// Which sequence a block works on, found on the device: the host does not know the tables.
#pragma once

#include <cstdint>

namespace punica::cuda {

// Item `local` of the `count` items of `sequence`, which are the items first, first + 1, ... of all `total`.
// sequence is -1 where the index is not below total.
struct Work {
  int64_t sequence, local, first, count, total;
};

template <int kThreads>
struct WorkScratch {
  int64_t warp_totals[kThreads / 32];
  int64_t sequence, first, count;
};

// Every thread of the block calls it and gets the same. Sequence i has count(i) items, in the order of sequences: one
// scan over all, right for any counts, so malformed tables cannot hide a sequence whose own entries are well.
template <int kThreads, class Count>
__device__ __forceinline__ Work find_work(int64_t index, int64_t num_sequences, WorkScratch<kThreads>& scratch,
                                          Count count) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int64_t before = 0;
  if (thread == 0) scratch.sequence = -1;
  for (int64_t base = 0; base < num_sequences; base += kThreads) {
    const int64_t items = base + thread < num_sequences ? count(base + thread) : 0;
    int64_t end = items;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, end, distance);
      if (lane >= distance) end += other;
    }
    if (lane == 31) scratch.warp_totals[warp] = end;
    __syncthreads();
    int64_t step = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w == warp) end += before + step;
      step += scratch.warp_totals[w];
    }
    if (index >= end - items && index < end) {
      scratch.sequence = base + thread;
      scratch.first = end - items;
      scratch.count = items;
    }
    before += step;
    __syncthreads();
  }
  return {scratch.sequence, index - scratch.first, scratch.first, scratch.count, before};
}

}  // namespace punica::cuda
