// How the fast decode merges without a second launch: of the blocks that have parts of a query, the last one to end
// folds all of them.
//
// Blocks count themselves at a counter of the query, the one of the block where the query begins. Workspaces are not
// initialised, so counters lie in memory of the module, which is zero when it is loaded, a set for each workspace
// (decode_counters()): calls with the same workspace do not overlap in time. The last block of a launch sets all of
// them to zero again. It knows that it is the last by a counter that every block of a launch counts at exactly once
// whatever is in the tables; so a call whose tables changed while it ran leaves nothing wrong behind.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// The first of a set counts the blocks of the launch.
static __device__ uint32_t decode_counter_sets[kDecodeCounterSets][kDecodeCounters];

// The parts of a query in the workspace, in order (DecodePiece).
struct DecodeParts {
  int32_t each, more, count, group;
  int32_t owner, owner_end;  // block that has the next part, and the split behind its last one
  int32_t at, group_end;     // next part, and the split behind its group
  bool begins;               // it begins a group, or is all groups of the first block
  int32_t first_owner, last_owner;

  __device__ __forceinline__ DecodeParts(const DecodePiece& piece, int32_t parts, int32_t group_bits)
      : each(piece.each),
        more(piece.more),
        count(piece.count),
        group((piece.count + (1 << group_bits) - 1) >> group_bits),
        at(0),
        begins(true) {
    const int32_t first = piece.first_slot * parts + piece.part * count;  // among all splits of the batch
    owner = first_owner = owner_of(first);
    last_owner = owner_of(first + count - 1);
    owner_end = each * (owner + 1) + min(owner + 1, more) - first;
    const int32_t groups = owner_end / group;
    group_end = groups > 0 ? groups * group : min(group, count);
  }
  __device__ __forceinline__ int32_t owner_of(int32_t split) const {
    const int32_t longer = more * (each + 1);
    return split < longer ? split / (each + 1) : more + (split - longer) / each;
  }
  __device__ __forceinline__ void advance() {
    at = begins ? min(group_end, owner_end) : at + 1;
    begins = at == group_end;
    if (begins) group_end = min(group_end + group, count);
    while (at < count && at >= owner_end) {
      ++owner;
      owner_end += each + (owner < more ? 1 : 0);
    }
  }
};

// Folds all parts of a query; each thread four dims of one head at a time.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ void merge_parts(const AttentionArgs& args, const DecodePiece& piece, int group_bits,
                                            int tile_heads, bool aligned) {
  constexpr int kBatch = 16;  // parts whose loads are under way at once
  const int kv_head = piece.part / args.head_tiles, head_tile = piece.part - kv_head * args.head_tiles;
  const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * tile_heads;
  const int num_heads = min(args.group_size - head_tile * tile_heads, tile_heads);
  const int64_t stride = args.num_heads();  // from split to split
#pragma unroll 1
  for (int item = threadIdx.x; item < num_heads * (kDim / 4); item += kThreads) {
    const int head = item / (kDim / 4), dim = item % (kDim / 4) * 4;
    const int64_t first = piece.first_slot * stride + first_head + head;
    DecodeParts parts(piece, args.num_kv_heads * args.head_tiles, group_bits);
    float maximum = minus_infinity(), weight = 0.0f, sum[4] = {};
    float2 group = make_float2(0.0f, 0.0f);
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto fold_group = [&] {
      const Fold fold(maximum, group.x);
      fold(weight, group.y);
      fold(sum[0], sums.x);
      fold(sum[1], sums.y);
      fold(sum[2], sums.z);
      fold(sum[3], sums.w);
    };
    bool fresh = true;
#pragma unroll 1
    while (parts.at < parts.count) {
      float2 states[kBatch];
      float4 values[kBatch];
      uint32_t begins = 0, there = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (parts.at < parts.count) {
          const int64_t index = first + parts.at * stride;
          // What other blocks wrote is not in this multiprocessor's cache.
          states[i] = __ldcg(args.partial_states + index);
          values[i] = __ldcg(reinterpret_cast<const float4*>(args.partial_sums + index * kDim + dim));
          there |= 1u << i;
          begins |= (parts.begins ? 1u : 0u) << i;
          parts.advance();
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if ((there >> i & 1) == 0) continue;
        if ((begins >> i & 1) != 0) {
          if (!fresh) fold_group();
          fresh = false;
          group = states[i];
          sums = values[i];
        } else {
          const Fold fold(group.x, states[i].x);
          fold(group.y, states[i].y);
          fold(sums.x, values[i].x);
          fold(sums.y, values[i].y);
          fold(sums.z, values[i].z);
          fold(sums.w, values[i].w);
        }
      }
    }
    fold_group();
    T* to = static_cast<T*>(args.o) + piece.sequence * args.o_stride + (first_head + head) * kDim + dim;
    Vec<T, 4> output;
#pragma unroll
    for (int i = 0; i < 4; ++i) output.values[i] = from_float<T>(__fdiv_rn(sum[i], weight));
    if (aligned) {
      store(to, output);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = output.values[i];
    }
    if (args.lse != nullptr && dim == 0) {
      args.lse[piece.sequence * args.num_heads() + first_head + head] = __fadd_rn(maximum, log2f(weight));
    }
  }
}

// All threads call it when the block's parts are stored. notes[0]: the query that began before this block and ends in
// it or behind it; notes[1]: the one that begins in it and ends behind it; counts of 0 where there is none. `flags`
// holds 2 values in shared memory.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ void arrive_and_merge(const AttentionArgs& args, const DecodePiece* notes, int set,
                                                 int group_bits, int tile_heads, bool aligned, int32_t* flags) {
  uint32_t* const counters = decode_counter_sets[set];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    uint32_t before[2] = {}, blocks[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (notes[i].count == 0) continue;
      const DecodeParts parts(notes[i], args.num_kv_heads * args.head_tiles, group_bits);
      blocks[i] = parts.last_owner - parts.first_owner + 1;
      before[i] = atomicAdd(counters + 1 + parts.first_owner, 1u);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) flags[i] = blocks[i] != 0 && before[i] == blocks[i] - 1;
    __threadfence();
  }
  __syncthreads();
  // After the counts above have come back, so that no count of this launch comes after the zeros.
  uint32_t ended = 0;
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) ended = atomicAdd(counters, 1u);
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (flags[i] != 0) merge_parts<T, kDim, kThreads>(args, notes[i], group_bits, tile_heads, aligned);
  }
  if (threadIdx.x < 32 && __shfl_sync(0xffffffffu, ended, 0) == gridDim.x - 1) {
    for (int i = threadIdx.x; i < static_cast<int>(gridDim.x) + 1; i += 32) counters[i] = 0;
  }
}

}  // namespace punica::cuda
