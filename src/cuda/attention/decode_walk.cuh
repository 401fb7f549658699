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
#ifndef V_BLOCKS
#define V_BLOCKS 2
#endif
  static constexpr int kBlocks = kArch == Arch::kSm90 && kDim > 128 ? 1 : V_BLOCKS;  // a multiprocessor, to aim at

  static constexpr int kTileBytes = kTileTokens * kDim * 2;  // of keys; values follow
  static constexpr int kStateBytes = kWarps * kHeads * 8;
  static constexpr int kAngleBytes = kRope ? kTileTokens * ((kDim / 4 + 7) / 8 * 8) * 16 : 0;
  // Of the sm_80 path, what devices of any 8.x or later have.
  static constexpr int kShared = kArch == Arch::kSm80 ? 99 << 10 : ((228 << 10) / kBlocks - (1 << 10));
  // The sums of all warps, all dims at a time where that takes no tile from the rings, else 64. The row length sends
  // lanes of four heads to different banks.
  static constexpr int sum_bytes(int dims) { return kWarps * kHeads * (dims + 4) * 4; }
  static constexpr int stages(int dims) {
    const int room = (kShared - sum_bytes(dims) - kStateBytes - kAngleBytes) / (kWarps * 2 * kTileBytes);
    return room < 4 ? room : 4;
  }
  static constexpr int kSumDims = stages(kDim) == stages(64) ? kDim : 64;
  static constexpr int kSumRow = kSumDims + 4, kSumBytes = sum_bytes(kSumDims);
  static constexpr int kStages = stages(kSumDims);
  static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // of a warp
  static constexpr int kSharedBytes = kWarps * kRingBytes + kSumBytes + kStateBytes + kAngleBytes;
  static_assert(kStages >= 2 && kStages <= kTiles);
  static_assert(kHeads * kSumRow * 4 >= kDim / 2 * 8);  // a warp's part also holds the angles of its queries
};

// A split of the walk, the same in all threads.
struct DecodeSplit {
  int64_t kv_len;
  int64_t base;  // position of the split's first token
  int64_t slot;  // of the query's first split in the workspace
  int32_t sequence, first_page;
  int32_t index, count;  // this split of the query's
  int32_t part;
  int32_t begin, end;  // tokens that the query sees, from `base`; none where the walk has ended
  bool valid;
};

// a / b, both at least 0. Most values have 32 bits, where a division takes a fifth of the time.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Goes over the splits of a block in order.
struct DecodeWalk {
  const AttentionArgs& args;
  DecodeShares shares;
  int64_t left;  // splits that this block has still to take
  bool whole;    // no room for partial results: queries are taken whole, by the block where they begin
  DecodeSplit at;
  SequencePages next_pages;  // of the sequence after

  __device__ __forceinline__ SequencePages pages(int64_t sequence) const {
    return sequence < args.num_sequences ? args.pages(sequence) : SequencePages{0, 0, 0};
  }
  __device__ __forceinline__ void place() {
    const int64_t first = at.kv_len > 0 ? args.first_key(at.kv_len - 1) : 0;
    at.base = (first / kSplitTokens + at.index) * kSplitTokens;
    at.begin = first > at.base ? static_cast<int32_t>(first - at.base) : 0;
    const int64_t end = at.kv_len - at.base;
    at.end = static_cast<int32_t>(end < kSplitTokens ? end : kSplitTokens);
    at.valid = left > 0 || (whole && at.index > 0);
    if (!at.valid) at.begin = at.end = 0;
  }
  __device__ __forceinline__ void take(const SequencePages& pages) {
    at.kv_len = pages.kv_len;
    at.first_page = static_cast<int32_t>(pages.first_page);
    at.count = static_cast<int32_t>(args.num_splits(pages.kv_len));
  }
  __device__ __forceinline__ void advance() {
    if (!at.valid) return;
    --left;
    if (++at.index == at.count) {
      at.index = 0;
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

// Where the splits [*first, *first + *count) of a block begin: the sequence with split *first, and its index there.
// All threads call it; `scratch` holds kThreads / 32 + 5 values.
template <int kThreads>
__device__ __forceinline__ DecodeWalk find_share(const AttentionArgs& args, int64_t* scratch) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t parts = static_cast<int64_t>(args.num_kv_heads) * args.head_tiles;
  // Every thread counts the splits of some consecutive sequences: one trip to memory.
  const int64_t each = (args.num_sequences + kThreads - 1) / kThreads;
  const int64_t begin = each * thread < args.num_sequences ? each * thread : args.num_sequences;
  const int64_t end = begin + each < args.num_sequences ? begin + each : args.num_sequences;
  int64_t splits = 0;
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) splits += args.num_splits(args.pages(i).kv_len);
  int64_t before = splits;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == 31) scratch[warp] = before;
  __syncthreads();
  before -= splits;
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  const int64_t workers = gridDim.x, worker = blockIdx.x;
  DecodeShares shares;
  shares.each = divide(total * parts, workers);
  shares.more = total * parts - shares.each * workers;
  const int64_t first = shares.begin(worker), left = shares.begin(worker + 1) - first;
  if (left > 0 && first >= before * parts && first < (before + splits) * parts) {
    int64_t slot = before, i = begin;
    for (;; ++i) {
      const int64_t here = args.num_splits(args.pages(i).kv_len);
      if (first < (slot + here) * parts) break;
      slot += here;
    }
    scratch[kThreads / 32] = i;
    scratch[kThreads / 32 + 1] = slot;
  }
  __syncthreads();
  DecodeWalk walk = {args, shares, left, total > args.num_slots, {}, {}};
  walk.at.valid = left > 0;
  if (!walk.at.valid) return walk;
  walk.at.sequence = static_cast<int32_t>(scratch[kThreads / 32]);
  walk.at.slot = scratch[kThreads / 32 + 1];
  walk.take(walk.pages(walk.at.sequence));
  walk.next_pages = walk.pages(walk.at.sequence + 1);
  const int64_t local = first - walk.at.slot * parts;
  walk.at.part = static_cast<int32_t>(divide(local, walk.at.count));
  walk.at.index = static_cast<int32_t>(local - walk.at.part * static_cast<int64_t>(walk.at.count));
  if (walk.whole && walk.at.index > 0) {
    // The block before takes this query to its end.
    const int64_t skipped = walk.at.count - walk.at.index;
    walk.left -= skipped - 1;
    walk.at.index = walk.at.count - 1;
    walk.at.valid = true;
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
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      page[k] = 0;
      slot[k] = 0;
      if (token(k) < split.begin || token(k) >= split.end) continue;
      const int64_t position = split.base + token(k);
      const int64_t number = divide(position, args.page_size);
      slot[k] = static_cast<uint32_t>(position - number * args.page_size);
      page[k] = args.kv_ptrs[split.first_page + number];
    }
  }
  template <int kDim>
  __device__ __forceinline__ void finish(const AttentionArgs& args, int32_t part) {
    const int64_t offset = args.key_bytes + part / args.head_tiles * args.head_bytes;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (page[k] != 0) page[k] += offset + static_cast<int64_t>(slot[k]) * (kDim * 2);
    }
  }
  __device__ __forceinline__ int64_t of_tile(int tile) const {
    int64_t address = page[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) address = tile / 2 == k ? page[k] : address;
    return address;
  }
};

}  // namespace punica::cuda
