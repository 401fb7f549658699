// How the fast decode merges without a second launch: of the blocks that have parts of a query, the last one to end
// folds all of them.
//
// Blocks count themselves at a counter of the query, the one of the block where the query begins. Workspaces are not
// initialised, so counters lie in memory of the module, which is zero when it is loaded, a set for each workspace
// (decode_counters()): calls with the same workspace do not overlap in time. The last block of a launch sets all of
// them to zero again. It knows that it is the last by a counter that every block of a launch counts at exactly once,
// whatever is in the tables; so a call whose tables changed while it ran leaves nothing wrong behind.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/decode_walk.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// The first of a set counts the blocks of the launch.
static __device__ uint32_t decode_counter_sets[kDecodeCounterSets][kDecodeCounters];

static __device__ DecodeHint decode_hints[kDecodeCounterSets];

// May be one that another call is just replacing.
__device__ __forceinline__ DecodeHint load_hint(int set) {
  uint64_t both;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(both) : "l"(decode_hints + set) : "memory");
  return {static_cast<int32_t>(both), static_cast<int32_t>(both >> 32)};
}
__device__ __forceinline__ void store_hint(int set, DecodeHint hint) {
  const uint64_t both = static_cast<uint32_t>(hint.splits) | static_cast<uint64_t>(static_cast<uint32_t>(hint.pages))
                                                                 << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(decode_hints + set), "l"(both) : "memory");
}

// Adds 1 and returns what was there. Not by an addition: of those the compiler makes one for the whole warp, whose
// lanes share the answer and so wait for it at once.
__device__ __forceinline__ uint32_t count_up(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Counts the block as one that will count itself at no query any more. What it returns is for reset_counters().
__device__ __forceinline__ uint32_t count_block(int set) {
  return threadIdx.x == 0 ? count_up(decode_counter_sets[set]) : 0;
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
    const uint32_t begin = at < longer ? 0 : longer, share = each + (at < longer ? 1 : 0);
    return (at < longer ? 0 : more) + static_cast<int32_t>(quotient(at - begin, share, approximate_inverse(share)));
  }
  __device__ __forceinline__ int32_t end_of(int32_t owner) const {
    return each * (owner + 1) + min(owner + 1, more) - first;
  }
};

// A query that begins or ends outside the block, in shared memory, and who has parts of it: found while the first
// copies are on their way, for at the end others wait.
struct alignas(16) DecodeNote {
  DecodePiece piece;
  int32_t first_owner, owners;  // blocks
  // What merge_parts() needs of it: its first split's partial results, its output, in elements from the beginning.
  const float* sums;
  const float2* states;
  int64_t output;
  int32_t first_head, num_heads;

  __device__ __forceinline__ static DecodeNote make(const AttentionArgs& args, const DecodePiece& piece,
                                                    int32_t group_bits, int tile_heads) {
    const DecodeParts parts(piece, args.num_kv_heads * args.head_tiles, group_bits);
    const int kv_head = DecodeWalk::kv_head(args, piece.part), head_tile = piece.part - kv_head * args.head_tiles;
    const int first_head = kv_head * args.group_size + head_tile * tile_heads;
    const int64_t first = piece.first_slot * args.num_heads() + first_head;
    return {piece,
            parts.first_owner,
            parts.last_owner - parts.first_owner + 1,
            args.partial_sums + first * args.head_dim,
            args.partial_states + first,
            piece.sequence * args.o_stride + static_cast<int64_t>(first_head) * args.head_dim,
            first_head,
            min(args.group_size - head_tile * tile_heads, tile_heads)};
  }
};

// The parts of a query, up to 33 of them.
struct alignas(16) DecodeList {
  uint32_t parts[36];  // first splits
  int32_t count;       // of all parts
};

// What a block has in shared memory to merge a query: 32 parts at a time, one a lane of the warps that compute factors,
// of as many heads as there are threads for, four dims each.
template <int kDim, int kThreads>
struct MergeShared {
  static constexpr int kHeads = kThreads / (kDim / 4);
  float4 values[32][kThreads];
  float4 factors[kHeads][32];  // of the group so far and of the part, of the sums so far and of the group
  float weights[kHeads][32];
  float2 maxima[kHeads];  // of the group, of all, behind the last part
};
// Of a part in the list. A run: whole groups, folded already.
inline constexpr uint32_t kBeginsGroup = 1u << 31, kEndsGroup = 1u << 30, kRun = 1u << 29;
inline constexpr uint32_t kPartSplit = kRun - 1;

// Writes the parts from number `from` on, up to 33. By a warp, a group a lane.
__device__ __forceinline__ void list_parts(const DecodeParts& query, int from, DecodeList& list) {
  const int lane = threadIdx.x % 32;
  const int whole_groups = query.end_of(query.first_owner) / query.group;  // of the first block: one part
  const int begin = (whole_groups + lane) * query.group, end = min(begin + query.group, query.count);
  // What the group's first block has is one part, later splits are a part each.
  const bool there = begin < query.count;
  const int later = there ? min(end, query.end_of(query.owner_of(begin))) : end;
  const int number = there ? 1 + end - later : 0;
  int place = number;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, place, distance);
    if (lane >= distance) place += other;
  }
  const int run = whole_groups > 0 ? 1 : 0;
  if (lane == 31) list.count = run + place;
  place += run - number - from;
  const auto write = [&](int at, uint32_t part) {
    if (at >= 0 && at < 33) list.parts[at] = part;
  };
  if (run == 1 && lane == 0) write(-from, kBeginsGroup | kEndsGroup | kRun);
  if (there) write(place, static_cast<uint32_t>(begin) | kBeginsGroup | (number == 1 ? kEndsGroup : 0));
#pragma unroll 1
  for (int i = max(1, -place); i < number && place + i < 33; ++i) {
    write(place + i, static_cast<uint32_t>(later + i - 1) | (i == number - 1 ? kEndsGroup : 0));
  }
}

// The factors that Fold has for up to 32 parts of a head, a part a lane.
template <class Shared>
__device__ __forceinline__ void find_factors(float2 state, uint32_t part, int head, int count, bool first,
                                             Shared& shared) {
  const int lane = threadIdx.x % 32;
  const bool there = lane < count, begins = (part & kBeginsGroup) != 0, ends = there && (part & kEndsGroup) != 0;
  const float2 before = first ? make_float2(minus_infinity(), minus_infinity()) : shared.maxima[head];
  // The maximum of the group up to each part, then of all groups up to it.
  float group = there ? state.x : minus_infinity();
  if (!__all_sync(0xffffffffu, begins)) {
    bool bounded = begins;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, group, distance);
      const bool other_bounded = __shfl_up_sync(0xffffffffu, bounded, distance);
      if (lane >= distance && !bounded) {
        group = fmaxf(other, group);
        bounded = other_bounded;
      }
    }
    if (!bounded) group = fmaxf(before.x, group);
  }
  float all = ends ? group : minus_infinity();
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(0xffffffffu, all, distance);
    if (lane >= distance) all = fmaxf(other, all);
  }
  all = fmaxf(before.y, all);
  float group_before = __shfl_up_sync(0xffffffffu, group, 1), all_before = __shfl_up_sync(0xffffffffu, all, 1);
  if (lane == 0) group_before = before.x, all_before = before.y;
  const float group_subtracted = finite_or_zero(group), subtracted = finite_or_zero(all);
  shared.factors[head][lane] =
      make_float4(exp2_fast(__fsub_rn(group_before, group_subtracted)), exp2_fast(__fsub_rn(state.x, group_subtracted)),
                  exp2_fast(__fsub_rn(all_before, subtracted)), exp2_fast(__fsub_rn(group, subtracted)));
  shared.weights[head][lane] = state.y;
  __syncwarp();  // all lanes have read the maxima
  if (lane == count - 1) shared.maxima[head] = make_float2(group, all);
}

// Folds all parts of a query: Fold's arithmetic, whose factors are found for all parts at once. Little code, for it is
// seldom in the multiprocessor's cache of instructions.
// `listed`: the first parts are in the list already.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ void merge_parts(const AttentionArgs& args, const DecodeNote& note, int group_bits,
                                            bool aligned, bool listed, DecodeList& list,
                                            MergeShared<kDim, kThreads>& shared) {
  constexpr int kHeads = MergeShared<kDim, kThreads>::kHeads;
  const int num_heads = note.num_heads;
  // From split to split, in bytes of states and of sums: one multiplication finds an address.
  const uint32_t heads_of_all = static_cast<uint32_t>(args.num_kv_heads) * static_cast<uint32_t>(args.group_size);
  const uint32_t state_bytes = heads_of_all * 8, sum_bytes = heads_of_all * (kDim * 4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, its_head = threadIdx.x / (kDim / 4);
  const int dim = threadIdx.x % (kDim / 4) * 4;
#pragma unroll 1
  for (int base = 0; base < num_heads; base += kHeads) {
    const int heads = min(num_heads - base, kHeads);
    const unsigned char* const states = reinterpret_cast<const unsigned char*>(note.states + base + warp);
    const unsigned char* const values =
        reinterpret_cast<const unsigned char*>(note.sums + (base + its_head) * kDim + dim);
    float group_weight = 0.0f, group[4] = {}, weight = 0.0f, sum[4] = {};
    int all = 1;
#pragma unroll 1
    for (int from = 0; from < all; from += 32) {
      if (!listed) {
        __syncthreads();
        if (warp == 0) {
          list_parts(DecodeParts(note.piece, args.num_kv_heads * args.head_tiles, group_bits), from, list);
        }
        __syncthreads();
      }
      listed = false;
      all = list.count;
      const int count = min(all - from, 32);
      const uint32_t part = list.parts[min(lane, count - 1)];
      float2 state = make_float2(0.0f, 0.0f);
      const float2* const its_states =
          reinterpret_cast<const float2*>(states + static_cast<uint64_t>(part & kPartSplit) * state_bytes);
      if (warp < heads) state = __ldcg(its_states);
      // What other blocks wrote is in the second-level cache, not in this multiprocessor's: nor do copies look there.
      if (its_head < heads) {
        const uint32_t to = shared_address(&shared.values[0][threadIdx.x]);
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
          if (i >= count) break;
          const uint4 four = *reinterpret_cast<const uint4*>(list.parts + i);
          const uint32_t splits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (i + j < count) {
              copy_chunk(to + (i + j) * static_cast<uint32_t>(sizeof(shared.values[0])),
                         values + static_cast<uint64_t>(splits[j] & kPartSplit) * sum_bytes);
            }
          }
        }
      }
      copy_commit();
#pragma unroll 1
      for (int h = warp; h < heads; h += kThreads / 32) {
        if (h != warp) state = __ldcg(its_states + h - warp);
        find_factors(state, part, h, count, from == 0, shared);
      }
      __syncthreads();
      constexpr uint32_t kGroup = kBeginsGroup | kEndsGroup;
      const bool groups = __all_sync(0xffffffffu, (part & kGroup) == kGroup);
      if (its_head >= heads) continue;
      if (groups) {
        // Every part is a group: no choice in the loop, so that loads run ahead of sums. (A run of groups, always the
        // first part, is folded to nothing: that changes no bit.)
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          const float4 f = shared.factors[its_head][i];
          weight = __fmaf_rn(shared.weights[its_head][i], f.w, __fmul_rn(weight, f.z));
        }
        copy_wait<0>();  // what this thread copied it alone reads
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          const float4 f = shared.factors[its_head][i], v = shared.values[i][threadIdx.x];
          const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[c] = __fmaf_rn(value[c], f.w, __fmul_rn(sum[c], f.z));
        }
        continue;
      }
      copy_wait<0>();
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const uint32_t part = list.parts[i];
        const float4 f = shared.factors[its_head][i], v = shared.values[i][threadIdx.x];
        const float value[4] = {v.x, v.y, v.z, v.w}, its_weight = shared.weights[its_head][i];
        if ((part & kBeginsGroup) != 0) {
          group_weight = its_weight;
#pragma unroll
          for (int c = 0; c < 4; ++c) group[c] = value[c];
        } else {
          group_weight = __fmaf_rn(its_weight, f.y, __fmul_rn(group_weight, f.x));
#pragma unroll
          for (int c = 0; c < 4; ++c) group[c] = __fmaf_rn(value[c], f.y, __fmul_rn(group[c], f.x));
        }
        if ((part & kEndsGroup) != 0) {
          weight = __fmaf_rn(group_weight, f.w, __fmul_rn(weight, f.z));
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[c] = __fmaf_rn(group[c], f.w, __fmul_rn(sum[c], f.z));
        }
      }
    }
    if (its_head >= heads) continue;
    T* to = static_cast<T*>(args.o) + note.output + (base + its_head) * kDim + dim;
    const float inverse = __fdiv_rn(1.0f, weight);
    Vec<T, 4> output;
#pragma unroll
    for (int i = 0; i < 4; ++i) output.values[i] = from_float<T>(__fmul_rn(sum[i], inverse));
    if (aligned) {
      store(to, output);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = output.values[i];
    }
    if (args.lse != nullptr && dim == 0) {
      args.lse[note.piece.sequence * args.num_heads() + note.first_head + base + its_head] =
          __fadd_rn(shared.maxima[its_head].y, log2f(weight));
    }
  }
}

// All threads call it when the block's parts are stored. notes[0]: the query that began before this block and ends in
// it or behind it; notes[1]: the one that begins in it and ends behind it; counts of 0 where there is none. `flags`
// holds 2 values in shared memory. Returns what count_block() does.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ uint32_t arrive_and_merge(const AttentionArgs& args, const DecodeNote* notes, int set,
                                                     int group_bits, bool aligned, int32_t* flags, DecodeList& list,
                                                     MergeShared<kDim, kThreads>& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before[2] = {};
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (notes[i].piece.count == 0) continue;
      asm volatile("atom.acquire.gpu.global.inc.u32 %0, [%1], 0x7fffffff;"
                   : "=r"(before[i])
                   : "l"(decode_counter_sets[set] + 1 + notes[i].first_owner)
                   : "memory");
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      flags[i] = notes[i].piece.count != 0 && before[i] == static_cast<uint32_t>(notes[i].owners) - 1;
    }
  }
  // Meanwhile another warp prepares to merge, in case that this block is the last one.
  const int prepared = notes[0].piece.count != 0 ? 0 : 1;
  if (threadIdx.x / 32 == 1 && notes[prepared].piece.count != 0) {
    list_parts(DecodeParts(notes[prepared].piece, args.num_kv_heads * args.head_tiles, group_bits), 0, list);
  }
  __syncthreads();
  // The counts above have come back: none of this launch comes after the zeros.
  const uint32_t ended = count_block(set);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (flags[i] != 0) merge_parts<T, kDim, kThreads>(args, notes[i], group_bits, aligned, i == prepared, list, shared);
  }
  return ended;
}

}  // namespace punica::cuda
