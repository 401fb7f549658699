// The fast prefill's warps that copy keys and values.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"
#include "src/cuda/common/tensor_map.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

// An item's queries, as soon as those of the item before are no longer needed. By a warp.
template <int kDim>
__device__ __forceinline__ void copy_queries(const AttentionArgs& args, const PrefillMaps& maps, int first_query,
                                             int kv_head, uint32_t n, PrefillShared<kDim>& shared) {
#pragma unroll
  for (int g = 0; g < kPrefillGroups<kDim>; ++g) {
    barrier_wait(shared_address(&shared.query_empty[g]), (n & 1) ^ 1);
    if (threadIdx.x % 32 == 0) {
      barrier_expect(shared_address(&shared.query_full[g]), 64 * kDim * 2);
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c) {
        copy_box(shared_address(shared.queries) + g * (64 * kDim * 2) + c * (64 * 128), &maps.queries, c * 64,
                 kv_head * args.group_size, first_query + g * (64 / args.group_size),
                 shared_address(&shared.query_full[g]));
      }
    }
  }
  __syncwarp();
}

// By kCopyWarps warps, or one for each box of a tile if those are fewer: a box takes a warp some 65 cycles to ask for.
// kRope: keys may have been rotated ahead.
template <int kDim, bool kRope>
__device__ __forceinline__ void copy_items(const AttentionArgs& args, const PrefillMaps& maps, const PrefillCall& call,
                                           PrefillShared<kDim>& shared) {
  constexpr int kColumns = kDim / 64, kColumnBytes = kPrefillKeys * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int box_rows = call.box_rows, boxes = kPrefillKeys / box_rows, box_bytes = box_rows * 128;
  if (warp >= boxes) return;
  const uint32_t page_size = static_cast<uint32_t>(args.page_size);
  const uint64_t policy = call.read_once ? read_once_policy() : read_again_policy();
  uint32_t number = 0;  // of tiles so far
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    const PrefillItem& item = shared.items[n % kItemsAhead];
    barrier_wait(shared_address(&shared.item_full[n % kItemsAhead]), n / kItemsAhead & 1);
    if (item.kv_head < 0) return;
    const int64_t* const page_table = args.kv_ptrs + item.first_page;
    const int kv_head = item.kv_head, first_query = item.first_query;
    const int64_t head_offset = args.key_bytes + kv_head * args.head_bytes;
    const int kv_len = item.kv_len, tiles = item.tiles;
    const int first = item.first_tile * kPrefillKeys;
    const bool rotated = kRope && item.pages_before >= 0;
    const int64_t rotated_keys = reinterpret_cast<int64_t>(call.rotated) +
                                 (int64_t{item.pages_before} * args.num_kv_heads + kv_head) * args.head_bytes;
    barrier_arrive(shared_address(&shared.item_empty[n % kItemsAhead]));
    // Where a box of keys of tile i lies, and the one of its values; 0 behind the sequence.
    struct Place {
      int64_t keys, values;
    };
    const auto find_box = [&](int i, int box) -> Place {
      const uint32_t at = static_cast<uint32_t>(first + i * kPrefillKeys + box * box_rows);
      if (i >= tiles || box >= boxes || at >= static_cast<uint32_t>(kv_len)) return {0, 0};
      const uint32_t page = at / page_size;
      const int64_t offset = static_cast<int64_t>(at - page * page_size) * (kDim * 2);
      const int64_t keys = page_table[page] + head_offset + offset;
      if (!rotated) return {keys, keys + args.value_bytes};
      return {rotated_keys + static_cast<int64_t>(page) * args.num_kv_heads * args.head_bytes + offset,
              keys + args.value_bytes};
    };
    const auto copy = [&](int i, int64_t address, int box, unsigned char* to, uint64_t* full) {
      if (box == 0) {
        const int left = kv_len - first - i * kPrefillKeys;
        const int valid = left < kPrefillKeys ? (left + box_rows - 1) / box_rows : boxes;
        barrier_expect(shared_address(full), valid * box_bytes * kColumns);
      }
      if (address != 0) {
        const uint64_t at = static_cast<uint64_t>(address) >> 4;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          copy_box(shared_address(to) + c * kColumnBytes + box * box_bytes, &maps.memory, c * 64, 0,
                   static_cast<int>(at & ((uint64_t{1} << kTensorAddressBits) - 1)),
                   static_cast<int>(at >> kTensorAddressBits), shared_address(full), policy);
        }
      }
      __syncwarp();
    };
    const int warps = min(kCopyWarps, boxes);
    // A lane has one box of a tile, and with boxes of a row, of which there are more than lanes, up to two.
    const auto copy_tile = [&](int i, const Place& place, int64_t Place::* part, unsigned char* to, uint64_t* full) {
      copy(i, place.*part, lane * warps + warp, to, full);
      if (boxes > 32 * warps) {
        const int box = (lane + 32) * warps + warp;
        copy(i, find_box(i, box).*part, box, to, full);
      }
    };
    const auto copy_keys = [&](int i, const Place& place) {
      const uint32_t at = number + i, stage = at % kPrefillStages, parity = (at / kPrefillStages & 1) ^ 1;
      barrier_wait(shared_address(&shared.key_empty[stage]), parity);
      copy_tile(i, place, &Place::keys, shared.keys[stage], &shared.key_full[stage]);
    };
    Place place = find_box(0, lane * warps + warp);
    if (tiles > 0) copy_keys(0, place);
    if (call.copy_q && warp == 0) copy_queries<kDim>(args, maps, first_query, kv_head, n, shared);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      // Keys are taken a tile before the values that belong to them.
      const Place next = find_box(i + 1, lane * warps + warp);
      if (i + 1 < tiles) copy_keys(i + 1, next);
      const uint32_t at = number + i, stage = at % kPrefillStages, parity = (at / kPrefillStages & 1) ^ 1;
      barrier_wait(shared_address(&shared.value_empty[stage]), parity);
      copy_tile(i, place, &Place::values, shared.values[stage], &shared.value_full[stage]);
      place = next;
    }
    number += tiles;
  }
}

}  // namespace punica::cuda::prefill

#endif
