// What the prefill by warp products (prefill_mma.cuh) works on: items, found on the device.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// Splits are counted from position 0 and merged from left to right, whoever does it: part of the definition of the
// bits.
inline constexpr int kMmaSplitTokens = 2048;

// One call, beyond AttentionArgs.
struct MmaCall {
  // For each block: what it has merged of an item's splits, [rows, padded D]. Null where no sequence has two splits.
  float* saved;
  // Keys rotated ahead, [pages of all sequences, N, P, D]; null: tiles are rotated as they come.
  unsigned char* rotated;
  // Number of items that blocks have asked for beyond their first; null: each takes every gridDim.x-th.
  unsigned* next_item;
  uint32_t page_inverse;  // 2^32 / page_size, rounded up
  bool wide_q, wide_o;    // rows of q, o allow accesses of 16 bytes
};

// Some rows of a sequence, pairs (query, head of the group), of one KV head.
struct MmaItem {
  int64_t first_page;
  int64_t pages_before;        // of other sequences, where keys have been rotated
  int64_t first_query;         // row of q and o of the sequence's first query
  int64_t first_position;      // of that query; may be negative
  int64_t first_slot;          // of partial results: that of the sequence's first query and the item's split
  int tile_query, first_head;  // of the sequence, of the group: the first row
  int rows;
  int begin, end;  // keys that the rows see together, in the item's split
  int limit;       // keys of the sequence
  int splits;      // of the sequence, where each is an item of its own; otherwise 0, and the item writes its output
  int kv_head;     // -1: there are no more items
};

// What a row of the item sees, [begin, end), and where it comes from: query of the sequence, head of the group.
struct alignas(16) MmaRow {
  int begin, end, query, head;
};

// The place of the search in the sequences: indices only grow. In shared memory, registers are short.
struct MmaWalk {
  int64_t sequence;
  int64_t first, count;       // its items are first, first + 1, ..
  int64_t first_slot, slots;  // its partial results
  int64_t pages_before, pages;
  // Of the sequence, as read when the search came to it.
  SequencePages table;
  int64_t queries, first_query;
};

__device__ __forceinline__ int64_t mma_splits(int64_t kv_len) {
  return kv_len > 0 ? (kv_len - 1) / kMmaSplitTokens + 1 : 1;
}

// a / b of numbers that are not negative: seldom a division of 64 bits.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// How this launch goes about its work, which the tables decide. No bit depends on it.
struct MmaWay {
  bool apart;    // splits are items of their own: there is room for the partial results, one a query and split
  bool rotated;  // keys have been rotated: there is room for all pages, which malformed tables may count twice
};

// By a whole warp; all get the same.
__device__ __forceinline__ MmaWay find_way(const AttentionArgs& args, const MmaCall& call) {
  if (args.num_slots == 0 && call.rotated == nullptr) return {false, false};
  int64_t slots = 0, num_pages = 0;
  for (int64_t i = threadIdx.x % 32; i < args.num_sequences; i += 32) {
    const SequencePages pages = args.pages(i);
    slots += args.num_queries(i) * mma_splits(pages.kv_len);
    num_pages += pages.num_pages;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    slots += __shfl_xor_sync(~0u, slots, lane);
    num_pages += __shfl_xor_sync(~0u, num_pages, lane);
  }
  return {slots <= args.num_slots, call.rotated != nullptr && num_pages <= args.num_page_ptrs};
}

// Goes on to the sequence that item `index` belongs to, 32 sequences a step, by a whole warp. count(i, slots, pages)
// gives the items, partial results and pages of a sequence. False: there is none.
template <class Count>
__device__ __forceinline__ bool walk_to(int64_t index, int64_t num_sequences, MmaWalk& walk, Count count) {
  const int lane = threadIdx.x % 32;
  while (index - walk.first >= walk.count) {
    walk.first += walk.count;
    walk.first_slot += walk.slots;
    walk.pages_before += walk.pages;
    const int64_t i = walk.sequence + 1 + lane;
    int64_t items = 0, slots = 0, pages = 0;
    if (i < num_sequences) items = count(i, slots, pages);
    int64_t end = items, slots_end = slots, pages_end = pages;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t before = __shfl_up_sync(~0u, end, distance);
      const int64_t slots_before = __shfl_up_sync(~0u, slots_end, distance);
      const int64_t pages_before = __shfl_up_sync(~0u, pages_end, distance);
      if (lane >= distance) end += before, slots_end += slots_before, pages_end += pages_before;
    }
    const unsigned found = __ballot_sync(~0u, index - walk.first < end);
    const int at = found == 0 ? 31 : __ffs(found) - 1;
    const auto of_it = [&](int64_t value) {
      const int64_t its = __shfl_sync(~0u, value, at);
      return found == 0 ? 0 : its;
    };
    walk.count = of_it(items);
    walk.slots = of_it(slots);
    walk.pages = of_it(pages);
    walk.first += __shfl_sync(~0u, end, at) - walk.count;
    walk.first_slot += __shfl_sync(~0u, slots_end, at) - walk.slots;
    walk.pages_before += __shfl_sync(~0u, pages_end, at) - walk.pages;
    walk.sequence += 1 + at;
    if (found == 0 && walk.sequence + 1 >= num_sequences) return false;
  }
  return true;
}

// Item `index`, by a whole warp.
template <int kRows>
__device__ __forceinline__ void find_item(const AttentionArgs& args, const MmaWay& way, int64_t index, MmaWalk& kept,
                                          MmaItem& item) {
  const int lane = threadIdx.x % 32;
  const auto tiles_of = [&](int64_t queries) { return (queries * args.group_size + kRows - 1) / kRows; };
  MmaWalk walk = kept;
  __syncwarp();
  const bool found = walk_to(index, args.num_sequences, walk, [&](int64_t i, int64_t& slots, int64_t& num_pages) {
    const int64_t queries = args.num_queries(i), items = tiles_of(queries) * args.num_kv_heads;
    if (!way.apart && !way.rotated) return items;
    const SequencePages pages = args.pages(i);
    num_pages = pages.num_pages;
    if (!way.apart) return items;
    slots = queries * mma_splits(pages.kv_len);
    return items * mma_splits(pages.kv_len);
  });
  if (!found) {
    if (lane == 0) item.kv_head = -1;
    return;  // `kept` is as it was: nobody asks again
  }
  if (lane != 0) return;
  if (walk.sequence != kept.sequence) {
    walk.table = args.pages(walk.sequence);
    walk.queries = args.num_queries(walk.sequence);
    walk.first_query = args.row_begin(walk.sequence);
    kept = walk;
  }
  const SequencePages& pages = kept.table;
  const int64_t queries = kept.queries, splits = way.apart ? mma_splits(pages.kv_len) : 1;
  const int64_t local = index - walk.first, of_head = divide(local, args.num_kv_heads);
  const int64_t from_last = divide(of_head, splits), split = of_head - from_last * splits;
  item.kv_head = static_cast<int>(local - of_head * args.num_kv_heads);
  item.first_page = pages.first_page;
  item.pages_before = walk.pages_before;
  item.first_query = kept.first_query;
  item.first_position = pages.kv_len - queries;
  // Late rows of a prompt see the most keys: they start first.
  const int64_t first_row = (tiles_of(queries) - 1 - from_last) * kRows, left = queries * args.group_size - first_row;
  const int64_t query = divide(first_row, args.group_size);
  item.tile_query = static_cast<int>(query);
  item.first_head = static_cast<int>(first_row - query * args.group_size);
  item.rows = static_cast<int>(left < kRows ? left : kRows);
  const int64_t position = item.first_position + query;
  const int64_t last = position + divide(item.first_head + item.rows - 1, args.group_size);
  int64_t begin = args.first_key(position), end = last >= 0 && pages.kv_len > 0 ? last + 1 : 0;
  item.splits = 0;
  if (splits > 1) {
    item.splits = static_cast<int>(splits);
    item.first_slot = walk.first_slot + split;
    begin = max(begin, split * kMmaSplitTokens);
    end = min(end, (split + 1) * kMmaSplitTokens);
  }
  item.begin = static_cast<int>(begin);
  item.end = static_cast<int>(end);
  item.limit = static_cast<int>(pages.kv_len);
}

}  // namespace punica::cuda
