// How the fast decode merges without a second launch: of the blocks that have parts of a query, the last one to end
// folds all of them.
//
// Blocks count themselves at a counter of the query, the one of the block where the query begins. Workspaces are not
// initialised, so counters lie in memory of the module, which is zero when it is loaded, a set for each workspace
// (decode_counters()): calls with the same workspace do not overlap in time. The last block of a launch sets all of them
// to zero again. It knows that it is the last by a counter that every block of a launch counts at exactly once, whatever
// is in the tables; so a call whose tables changed while it ran leaves nothing wrong behind.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// The first of a set counts the blocks of the launch.
static __device__ uint32_t decode_counter_sets[kDecodeCounterSets][kDecodeCounters];

// Counts the block as one that will count itself at no query any more. What it returns is for reset_counters().
__device__ __forceinline__ uint32_t count_block(int set) {
  return threadIdx.x == 0 ? atomicAdd(decode_counter_sets[set], 1u) : 0;
}

__device__ __forceinline__ void reset_counters(int set, uint32_t ended) {
  if (threadIdx.x >= 32 || __shfl_sync(0xffffffffu, ended, 0) != gridDim.x - 1) return;
  for (uint32_t i = threadIdx.x; i < gridDim.x + 1; i += 32) decode_counter_sets[set][i] = 0;
}

// A query that several blocks have parts of.
struct DecodeParts {
  int32_t each, more, count, group;
  int32_t first;                    // its first split among all of the batch
  int32_t first_owner, last_owner;  // blocks

  __device__ __forceinline__ DecodeParts(const DecodePiece& piece, int32_t parts, int32_t group_bits)
      : each(piece.each),
        more(piece.more),
        count(piece.count),
        group((piece.count + (1 << group_bits) - 1) >> group_bits),
        first(piece.first_slot * parts + piece.part * count),
        first_owner(owner_of(0)),
        last_owner(owner_of(count - 1)) {}

  // The block of a split, and the split behind its last one; splits are counted from the query's first.
  __device__ __forceinline__ int32_t owner_of(int32_t split) const {
    const uint32_t at = first + split, longer = more * (each + 1);
    return at < longer ? at / (each + 1u) : more + (at - longer) / each;
  }
  __device__ __forceinline__ int32_t end_of(int32_t owner) const {
    return each * (owner + 1) + min(owner + 1, more) - first;
  }
};

// Writes the parts from number `from` on, kListed at most, as their first splits to shared memory. By a warp, a group a
// lane. Returns how many there are in all.
inline constexpr int kListed = 4096;
inline constexpr uint32_t kBeginsGroup = 1u << 31;
__device__ __forceinline__ int list_parts(const DecodeParts& parts, int from, uint32_t* list) {
  const int lane = threadIdx.x % 32;
  const int whole_groups = parts.end_of(parts.first_owner) / parts.group;  // of the first block: one part
  const int begin = (whole_groups + lane) * parts.group, end = min(begin + parts.group, parts.count);
  // What the group's first block has is one part, later splits are a part each.
  const bool there = begin < parts.count;
  const int later = there ? min(end, parts.end_of(parts.owner_of(begin))) : end;
  const int number = there ? 1 + end - later : 0;
  int place = number;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, place, distance);
    if (lane >= distance) place += other;
  }
  const int run = whole_groups > 0 ? 1 : 0, all = run + __shfl_sync(0xffffffffu, place, 31);
  place += run - number - from;
  if (there && place >= 0 && place < kListed) list[place] = static_cast<uint32_t>(begin) | kBeginsGroup;
  for (int i = 1; i < number; ++i) {
    if (place + i >= 0 && place + i < kListed) list[place + i] = static_cast<uint32_t>(later + i - 1);
  }
  if (run == 1 && from == 0 && lane == 0) list[0] = kBeginsGroup;
  return all;
}

// Folds all parts of a query; each thread four dims of one head at a time. `list` has room for kListed + 1 numbers.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ void merge_parts(const AttentionArgs& args, const DecodePiece& piece, int group_bits,
                                            int tile_heads, bool aligned, uint32_t* list) {
  constexpr int kBatch = 16;  // parts whose loads are under way at once
  const DecodeParts parts(piece, args.num_kv_heads * args.head_tiles, group_bits);
  const int kv_head = piece.part / args.head_tiles, head_tile = piece.part - kv_head * args.head_tiles;
  const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * tile_heads;
  const int num_heads = min(args.group_size - head_tile * tile_heads, tile_heads);
  const int64_t stride = args.num_heads();  // from split to split
  int all = 0;
#pragma unroll 1
  for (int base = 0; base < num_heads * (kDim / 4); base += kThreads) {
    const int item = base + threadIdx.x, head = item / (kDim / 4), dim = item % (kDim / 4) * 4;
    const int64_t first = piece.first_slot * stride + first_head + head;
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
#pragma unroll 1
    for (int from = 0; from == 0 || from < all; from += kListed) {
      if (base == 0 || all > kListed) {
        __syncthreads();
        if (threadIdx.x < 32) {
          const int found = list_parts(parts, from, list);
          if (threadIdx.x == 0) list[kListed] = found;
        }
        __syncthreads();
        all = list[kListed];
      }
      if (head >= num_heads) continue;
      const int count = min(all - from, kListed);
#pragma unroll 1
      for (int j = 0; j < count; j += kBatch) {
        uint32_t places[kBatch];
        float2 states[kBatch];
        float4 values[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) places[i] = list[min(j + i, count - 1)];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int64_t index = first + static_cast<int64_t>(places[i] & ~kBeginsGroup) * stride;
          // What other blocks wrote is not in this multiprocessor's cache.
          states[i] = __ldcg(args.partial_states + index);
          values[i] = __ldcg(reinterpret_cast<const float4*>(args.partial_sums + index * kDim + dim));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (j + i >= count) continue;
          if ((places[i] & kBeginsGroup) != 0) {
            if (from + j + i > 0) fold_group();
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
    }
    if (head >= num_heads) continue;
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
// it or behind it; notes[1]: the one that begins in it and ends behind it; counts of 0 where there is none. `flags` holds
// 2 values in shared memory. Returns what count_block() does.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ uint32_t arrive_and_merge(const AttentionArgs& args, const DecodePiece* notes, int set,
                                                     int group_bits, int tile_heads, bool aligned, int32_t* flags,
                                                     uint32_t* list) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before[2] = {}, blocks[2] = {};
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (notes[i].count == 0) continue;
      const DecodeParts parts(notes[i], args.num_kv_heads * args.head_tiles, group_bits);
      blocks[i] = parts.last_owner - parts.first_owner + 1;
      before[i] = atomicAdd(decode_counter_sets[set] + 1 + parts.first_owner, 1u);
    }
    bool last = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      flags[i] = blocks[i] != 0 && before[i] == blocks[i] - 1;
      last = last || flags[i] != 0;
    }
    if (last) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
  // The counts above have come back: none of this launch comes after the zeros.
  const uint32_t ended = count_block(set);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (flags[i] != 0) merge_parts<T, kDim, kThreads>(args, notes[i], group_bits, tile_heads, aligned, list);
  }
  return ended;
}

}  // namespace punica::cuda
