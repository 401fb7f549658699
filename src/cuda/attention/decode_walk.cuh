// Which splits a block of the fast decode takes, in which order, and where their tokens lie.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

template <Arch kArch, int kDim, int kColumns, bool kRope>
struct DecodeShape {
  static constexpr int kWarps = kArch == Arch::kSm80 && kDim > 128 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kSplitTokens / (kTileTokens * kWarps);  // of a warp in a split
  static constexpr int kHeads = 8 * kColumns;
  static constexpr int kBlocks = kArch == Arch::kSm90 && kDim > 128 ? 1 : 2;  // a multiprocessor, to aim at

  static constexpr int kTileBytes = kTileTokens * kDim * 2;  // of keys; values follow
  static constexpr int kStateBytes = kWarps * kHeads * 8, kNoteBytes = 64;
  static constexpr int kAngleBytes = kRope ? kTileTokens * ((kDim / 4 + 7) / 8 * 8) * 16 : 0;
  // Of the sm_80 path, what devices of any 8.x or later have.
  static constexpr int kShared = kArch == Arch::kSm80 ? 99 << 10 : ((228 << 10) / kBlocks - (1 << 10));
  // The sums of all warps, all dims at a time where that takes no tile from the rings, else 64. The row length sends
  // lanes of four heads to different banks.
  static constexpr int sum_bytes(int dims) { return kWarps * kHeads * (dims + 4) * 4; }
  // 128 KiB under way on a multiprocessor: more made decode slower, by 1% at 192 KiB.
  static constexpr int kAim = ((128 << 10) / kBlocks + kWarps * kTileBytes) / (kWarps * 2 * kTileBytes);
  static constexpr int stages(int dims) {
    const int room = (kShared - sum_bytes(dims) - kStateBytes - kNoteBytes - kAngleBytes) / (kWarps * 2 * kTileBytes);
    const int aim = kAim < 2 ? 2 : (kAim > 4 ? 4 : kAim);
    return room < aim ? room : aim;
  }
  static constexpr int kSumDims = stages(kDim) == stages(64) ? kDim : 64;
  static constexpr int kSumRow = kSumDims + 4, kSumBytes = sum_bytes(kSumDims);
  static constexpr int kStages = stages(kSumDims);
  static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // of a warp
  static constexpr int kSharedBytes = kWarps * kRingBytes + kSumBytes + kStateBytes + kNoteBytes + kAngleBytes;
  static_assert(kStages >= 2 && kStages <= kTiles);
  static_assert(kHeads * kSumRow * 4 >= kDim / 2 * 8);  // a warp's part also holds the angles of its queries
};

// Positions and counts of splits have 32 bits: decode_serves() sees to it. Long integers take several times as long,
// and the way to the first copy is short.
struct DecodePages {
  int32_t first_page, kv_len;
};

// A split of the walk, the same in all threads.
struct DecodeSplit {
  int32_t sequence, kv_len, first_page;
  int32_t slot;             // of the query's first split in the workspace
  int32_t index, count;     // this split of the query's
  int32_t group, in_group;  // splits of a group, this one of its group
  int32_t base;             // position of the split's first token
  int32_t part;
  int32_t begin, end;  // tokens that the query sees, from `base`; none where the walk has ended
  bool valid;
};

// Goes over the splits of a block in order.
struct DecodeWalk {
  const AttentionArgs& args;
  int32_t each, more;  // shares of the blocks (DecodePiece)
  int32_t left;        // splits that this block has still to take
  int32_t group_bits;
  bool whole;          // no room for partial results: queries are taken whole, by the block where they begin
  bool whole_queries;  // shares are whole queries
  DecodeSplit at;
  DecodePages next_pages;  // of the sequence after

  // sequence_pages() for sizes of 32 bits.
  __device__ __forceinline__ static DecodePages pages(const AttentionArgs& args, int32_t sequence) {
    const int32_t limit = static_cast<int32_t>(args.num_page_ptrs), page_size = static_cast<int32_t>(args.page_size);
    const int32_t begin = min(max(args.kv_indptr[sequence], 0), limit);
    const int32_t end = min(max(args.kv_indptr[sequence + 1], 0), limit);
    const int32_t last = args.last_page_offset[sequence];
    if (end <= begin || last < 1 || last > page_size) return {0, 0};
    return {begin, (end - begin - 1) * page_size + last};
  }
  // First key that the query sees.
  __device__ __forceinline__ static int32_t first_key(const AttentionArgs& args, int32_t kv_len) {
    const int32_t position = kv_len - 1;
    return args.window_left < 0 || args.window_left >= position ? 0 : position - static_cast<int32_t>(args.window_left);
  }
  // Of a part.
  __device__ __forceinline__ static int32_t kv_head(const AttentionArgs& args, int32_t part) {
    return args.head_tiles == 1 ? part : part / args.head_tiles;
  }
  __device__ __forceinline__ static int32_t num_splits(const AttentionArgs& args, int32_t kv_len) {
    if (kv_len == 0) return 1;
    constexpr uint32_t kTokens = kSplitTokens;
    return static_cast<int32_t>(static_cast<uint32_t>(kv_len - 1) / kTokens -
                                static_cast<uint32_t>(first_key(args, kv_len)) / kTokens + 1);
  }

  __device__ __forceinline__ DecodePages pages(int32_t sequence) const {
    return sequence < static_cast<int32_t>(args.num_sequences) ? pages(args, sequence) : DecodePages{0, 0};
  }
  // Before the first advance().
  __device__ __forceinline__ void look_ahead() { next_pages = pages(at.sequence + 1); }
  __device__ __forceinline__ void place() {
    const int32_t first = at.kv_len > 0 ? first_key(args, at.kv_len) : 0;
    at.base = static_cast<int32_t>(static_cast<uint32_t>(first) / kSplitTokens + at.index) * kSplitTokens;
    at.begin = max(first - at.base, 0);
    at.end = min(at.kv_len - at.base, kSplitTokens);
    at.valid = left > 0 || (whole && at.index > 0);
    if (!at.valid) at.begin = at.end = 0;
  }
  __device__ __forceinline__ void take(const DecodePages& pages) {
    at.kv_len = pages.kv_len;
    at.first_page = pages.first_page;
    at.count = num_splits(args, pages.kv_len);
    at.group = (at.count + (1 << group_bits) - 1) >> group_bits;
  }
  __device__ __forceinline__ void advance() {
    if (!at.valid) return;
    --left;
    if (++at.in_group == at.group) at.in_group = 0;
    if (++at.index == at.count) {
      at.index = at.in_group = 0;
      if (++at.part == args.num_kv_heads * args.head_tiles) {
        at.part = 0;
        at.slot += at.count;
        ++at.sequence;
        take(next_pages);
        next_pages = pages(at.sequence + 1);
      }
    }
    place();
  }
};

// a / b, where inverse is approximately 1 / b: a third of the time that a division takes, most of which others wait
// for.
__device__ __forceinline__ uint32_t quotient(uint32_t a, uint32_t b, float inverse) {
  if (a >= 1u << 22) return a / b;
  const uint32_t guess = __float2uint_rz(__fmul_rn(__uint2float_rn(a), inverse));  // off by one at most
  const int32_t rest = static_cast<int32_t>(a - guess * b);
  return rest < 0 ? guess - 1 : (rest >= static_cast<int32_t>(b) ? guess + 1 : guess);
}
__device__ __forceinline__ float approximate_inverse(uint32_t b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__uint2float_rn(b)));
  return inverse;
}

// How many splits this block takes, and from which one on, counted over the whole batch.
struct DecodeShare {
  int32_t each, more, first, count;
  bool whole_queries;  // no query is in two blocks
};

__device__ __forceinline__ DecodeShare share_of_block(uint32_t all, uint32_t longest, bool alike, int32_t group_bits,
                                                      float inverse_blocks) {
  uint32_t each = quotient(all, gridDim.x, inverse_blocks), more = all - each * gridDim.x;
  bool whole_queries = false;
  if (alike) {
    // All queries have as many splits. Shares of whole queries, or else of whole groups, leave less to merge, where
    // that leaves few blocks without work.
    const uint32_t most = quotient(all + all / 16, gridDim.x, inverse_blocks);
    const uint32_t least = each + (more > 0 ? 1 : 0), group = (longest + (1 << group_bits) - 1) >> group_bits;
    const auto rounded = [&](uint32_t unit) {
      const float inverse = approximate_inverse(unit);
      return unit == 1 ? least : quotient(least + unit - 1, unit, inverse) * unit;
    };
    const uint32_t queries = longest <= most ? rounded(longest) : most + 1;
    const uint32_t groups = group <= most ? rounded(group) : most + 1;
    whole_queries = queries <= most;
    if (whole_queries || groups <= most) {
      each = whole_queries ? queries : groups;
      more = 0;
    }
  }
  const uint32_t worker = blockIdx.x, first = min(each * worker + min(worker, more), all);
  const uint32_t count = min(all - first, each + (worker < more ? 1u : 0u));
  return {static_cast<int32_t>(each), static_cast<int32_t>(more), static_cast<int32_t>(first),
          static_cast<int32_t>(count), whole_queries};
}

// The share of this block: which split of which sequence is its first one. All threads call it; `scratch` holds
// kThreads / 16 + 4 values. inverse_blocks: of gridDim.x.
template <int kThreads>
__device__ __forceinline__ DecodeWalk find_share(const AttentionArgs& args, int group_bits, float inverse_blocks,
                                                 int32_t* scratch) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t parts = args.num_kv_heads * args.head_tiles, num_sequences = static_cast<int32_t>(args.num_sequences);
  // Every thread counts the splits of some consecutive sequences: one trip to memory. A warp suffices for 32, so then
  // each of them does it by itself, and each lane for the only one.
  const bool alone = num_sequences <= 32, only = num_sequences == 1;
  const int32_t many = alone ? 1 : (num_sequences + kThreads - 1) / kThreads;
  const int32_t begin = only ? 0 : min(many * (alone ? lane : thread), num_sequences);
  const int32_t end = min(begin + many, num_sequences);
  int32_t splits = 0, longest = 0;
  DecodePages found = {0, 0};
#pragma unroll 1
  for (int32_t i = begin; i < end; ++i) {
    found = DecodeWalk::pages(args, i);
    const int32_t here = DecodeWalk::num_splits(args, found.kv_len);
    splits += here;
    longest = max(longest, here);
  }
  int32_t before = 0, total = splits;
  if (!only) {
    longest = __reduce_max_sync(0xffffffffu, longest);
    before = splits;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, before, distance);
      if (lane >= distance) before += other;
    }
    total = __shfl_sync(0xffffffffu, before, 31);
    before -= splits;
  }
  constexpr int kWarps = kThreads / 32;
  int32_t* const place = scratch + 2 * kWarps;
  if (!alone) {
    if (lane == 31) {
      scratch[warp] = total;
      scratch[kWarps + warp] = longest;
    }
    __syncthreads();
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += scratch[w];
      total += scratch[w];
      longest = max(longest, scratch[kWarps + w]);
    }
  }
  const bool alike = static_cast<uint32_t>(total) == static_cast<uint32_t>(longest) * num_sequences;
  const DecodeShare share = share_of_block(static_cast<uint32_t>(total) * static_cast<uint32_t>(parts), longest, alike,
                                           group_bits, inverse_blocks);
  const int32_t first = share.first;
  DecodeWalk walk = {args, share.each, share.more, share.count, group_bits, total > args.num_slots, share.whole_queries,
                     {},   {0, 0}};
  const bool here = walk.left > 0 && first >= before * parts && first < (before + splits) * parts;
  if (only) {
    walk.at.valid = walk.left > 0;
    if (!walk.at.valid) return walk;
    walk.take(found);
  } else if (alone) {
    const uint32_t owner = __ffs(__ballot_sync(0xffffffffu, here)) - 1;
    walk.at.valid = walk.left > 0;
    if (!walk.at.valid) return walk;
    walk.at.sequence = owner;
    walk.at.slot = __shfl_sync(0xffffffffu, before, owner);
    walk.take({__shfl_sync(0xffffffffu, found.first_page, owner), __shfl_sync(0xffffffffu, found.kv_len, owner)});
  } else {
    if (here) {
      int32_t slot = before, i = begin;
      if (many > 1) {
#pragma unroll 1
        for (;; ++i) {
          found = DecodeWalk::pages(args, i);
          const int32_t its = DecodeWalk::num_splits(args, found.kv_len);
          if (first < (slot + its) * parts) break;
          slot += its;
        }
      }
      place[0] = i;
      place[1] = slot;
      place[2] = found.first_page;
      place[3] = found.kv_len;
    }
    __syncthreads();
    walk.at.valid = walk.left > 0;
    if (!walk.at.valid) return walk;
    walk.at.sequence = place[0];
    walk.at.slot = place[1];
    walk.take({place[2], place[3]});
  }
  const uint32_t local = first - walk.at.slot * parts, count = walk.at.count, group = walk.at.group;
  walk.at.part = static_cast<int32_t>(quotient(local, count, approximate_inverse(count)));
  walk.at.index = local - walk.at.part * count;
  walk.at.in_group = group == 1 ? 0 : walk.at.index % group;
  if (walk.whole && walk.at.index > 0) {
    // The block before takes this query to its end.
    walk.left -= walk.at.count - walk.at.index - 1;
    walk.at.index = walk.at.count - 1;
    walk.look_ahead();
    walk.advance();
  }
  walk.place();
  return walk;
}

// Addresses of this lane's tokens of a split: number k is token lane % 16 of the warp's tile 2k + lane / 16.
template <class Shape>
struct DecodeAddresses {
  static constexpr int kCount = Shape::kTiles / 2;
  int64_t page[kCount];  // the page's address, then the key's; 0 where the query does not see the token
  uint32_t slot[kCount];

  __device__ __forceinline__ static int token(int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return ((2 * k + lane / 16) * Shape::kWarps + warp) * kTileTokens + lane % 16;
  }
  __device__ __forceinline__ void fetch(const AttentionArgs& args, const DecodeSplit& split) {
    const uint32_t page_size = static_cast<uint32_t>(args.page_size);
    if ((page_size & (page_size - 1)) == 0) {
      const int shift = 31 - __clz(page_size);
      fetch(args, split, [&](uint32_t position) { return position >> shift; });
    } else {
      fetch(args, split, [&](uint32_t position) { return position / page_size; });
    }
  }
  template <class PageOf>
  __device__ __forceinline__ void fetch(const AttentionArgs& args, const DecodeSplit& split, PageOf page_of) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      page[k] = 0;
      slot[k] = 0;
      if (token(k) < split.begin || token(k) >= split.end) continue;
      const uint32_t position = split.base + token(k), number = page_of(position);
      slot[k] = position - number * static_cast<uint32_t>(args.page_size);
      page[k] = args.kv_ptrs[split.first_page + number];
    }
  }
  template <int kDim>
  __device__ __forceinline__ void finish(const AttentionArgs& args, int32_t part) {
    const int64_t offset = args.key_bytes + DecodeWalk::kv_head(args, part) * args.head_bytes;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (page[k] != 0) page[k] += offset + static_cast<int64_t>(slot[k]) * (kDim * 2);
    }
  }
  // The address of this lane's token where the tile's are. The compiler may not see that this is a choice from an
  // array, which it would keep in local memory: the stores to that, some a split, made decode 6% slower.
  __device__ __forceinline__ int64_t of_tile(int tile) const {
    int64_t address = page[0];
    asm("" : "+l"(address));
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      int64_t other = page[k];
      asm("" : "+l"(other));
      address = tile / 2 == k ? other : address;
    }
    return address;
  }
};

}  // namespace punica::cuda
