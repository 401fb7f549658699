// What the parts of the fast prefill share: what an item is, what lies in shared memory, how sequences are split.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/hopper.cuh"

namespace punica::cuda {

inline constexpr int kPrefillKeys = 128, kPrefillStages = 2;
inline constexpr int kPrefillSplitTokens = 2048;
inline constexpr int kPrefillSplitTiles = kPrefillSplitTokens / kPrefillKeys;
// Warpgroups that multiply, 64 rows each; another one finds items and copies. With D = 128 registers suffice for two.
template <int kDim>
inline constexpr int kPrefillGroups = kDim == 64 ? 3 : 2;
template <int kDim>
inline constexpr int kPrefillRows = 64 * kPrefillGroups<kDim>;
template <int kDim>
inline constexpr int kPrefillThreads = 128 * (1 + kPrefillGroups<kDim>);
inline constexpr int kCopyWarps = 3;
// The one whose output is written, the one that is computed, and the next. More would be taken from blocks that are
// done sooner.
inline constexpr int kItemsAhead = 3;

// What a block works on. Positions, rows and pages fit into 32 bits (serves_prefill).
struct PrefillItem {
  int64_t first_slot;  // of partial results: that of the item's first query and its split
  int32_t first_page, kv_len;
  int32_t first_query;     // row of q and o of the item's first query
  int32_t first_position;  // of that query; may be negative
  int32_t first_head;      // of that query, in the group: the item begins with it
  int32_t first_tile;      // of keys, counted from position 0
  int32_t rows, tiles;
  int32_t splits;   // of the sequence, where each is an item of its own; otherwise 0, and the item writes its output
  int32_t kv_head;  // -1: there are no more items
  // Where keys have been rotated: pages of the sequences before. -1: they have not been.
  int32_t pages_before;
};

// One call, beyond AttentionArgs.
struct PrefillCall {
  int box_rows;         // rows that lie together in a page and in a tile
  bool wide_q, wide_o;  // rows of q, o allow accesses of 16 bytes
  // Tensor copies of queries, a group's 64 rows at once, and of outputs, a warp's 16: 16-byte accesses, and heads of a
  // group that divide them.
  bool copy_q, copy_o;
  bool read_once;  // no key is in two items
  // Items taken beyond each block's first; null: a block has every gridDim.x-th.
  unsigned* next_item;
  // Keys rotated ahead, [pages of all sequences, N, P, D]; null: there are none.
  const unsigned char* rotated;
};

struct PrefillMaps {
  CUtensorMap memory;  // all of it, for keys and values: coordinates are an element of a row, a row, and an address
  CUtensorMap queries, outputs;  // an element, a head, a row
};

template <int kDim>
struct PrefillShared {
  static constexpr int kTileBytes = kPrefillKeys * kDim * 2;
  alignas(1024) unsigned char queries[kPrefillRows<kDim> * kDim * 2];
  unsigned char keys[kPrefillStages][kTileBytes];
  unsigned char values[kPrefillStages][kTileBytes];
  // Of each warp: merged splits, what each thread has of them; or the output on its way.
  alignas(1024) float4 saved[4 * kPrefillGroups<kDim>][kDim / 8][32];
  float2 saved_states[kPrefillRows<kDim>];  // maximum and weight of each row
  uint64_t key_full[kPrefillStages], key_empty[kPrefillStages];
  uint64_t value_full[kPrefillStages], value_empty[kPrefillStages];
  uint64_t item_full[kItemsAhead], item_empty[kItemsAhead];
  uint64_t query_full[kPrefillGroups<kDim>], query_empty[kPrefillGroups<kDim>];  // where tensor copies bring them
  PrefillItem items[kItemsAhead];
  uint64_t turns[kDim / 2];  // RopeTable
};

#ifdef __CUDACC__
// What sums are times in the end, wherever splits are merged. Within 1 ulp; a weight is far from 2^126.
__device__ __forceinline__ float inverse_weight(float weight) { return __fdividef(1.0f, weight); }

// Splits of a sequence, at least one.
__device__ __forceinline__ int64_t prefill_splits(int64_t kv_len) {
  return kv_len > 0 ? (kv_len - 1) / kPrefillSplitTokens + 1 : 1;
}

// Whether splits are items of their own: where there is room for the partial results, one a query and split. By a whole
// warp; all get the same.
__device__ __forceinline__ bool prefill_splits_apart(const AttentionArgs& args) {
  if (args.num_slots == 0) return false;
  int64_t slots = 0;
  for (int64_t i = threadIdx.x % 32; i < args.num_sequences; i += 32) {
    slots += args.num_queries(i) * prefill_splits(args.pages(i).kv_len);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) slots += __shfl_xor_sync(~0u, slots, lane);
  return slots <= args.num_slots;
}
#endif

}  // namespace punica::cuda
