// The fast prefill's warps that copy keys and values.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

// By kCopyWarps warps, or one for each box of a tile if those are fewer: a box takes a warp some 65 cycles to ask for.
template <int kDim>
__device__ __forceinline__ void copy_items(const AttentionArgs& args, const CUtensorMap* map, int box_rows,
                                           PrefillShared<kDim>& shared) {
  constexpr int kColumns = kDim / 64, kColumnBytes = kPrefillKeys * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int boxes = kPrefillKeys / box_rows, box_bytes = box_rows * 128;
  if (warp >= boxes) return;
  const uint32_t page_size = static_cast<uint32_t>(args.page_size);
  uint32_t number = 0;  // of tiles so far
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    const PrefillItem& item = shared.items[n % kItemsAhead];
    barrier_wait(shared_address(&shared.item_full[n % kItemsAhead]), n / kItemsAhead & 1);
    if (item.kv_head < 0) return;
    const int64_t* const page_table = args.kv_ptrs + item.first_page;
    const int64_t head_offset = args.key_bytes + item.kv_head * args.head_bytes;
    const int kv_len = item.kv_len, tiles = item.tiles;
    const int first = item.first_tile * kPrefillKeys;
    barrier_arrive(shared_address(&shared.item_empty[n % kItemsAhead]));
    // Where a box of keys of tile i lies; 0 behind the sequence.
    const auto find_box = [&](int i, int box) -> int64_t {
      const uint32_t at = static_cast<uint32_t>(first + i * kPrefillKeys + box * box_rows);
      if (i >= tiles || box >= boxes || at >= static_cast<uint32_t>(kv_len)) return 0;
      const uint32_t page = at / page_size;
      return page_table[page] + head_offset + static_cast<int64_t>(at - page * page_size) * (kDim * 2);
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
          copy_box(shared_address(to) + c * kColumnBytes + box * box_bytes, map, c * 64, 0,
                   static_cast<int>(at & ((uint64_t{1} << kAddressBits) - 1)), static_cast<int>(at >> kAddressBits),
                   shared_address(full));
        }
      }
      __syncwarp();
    };
    const int warps = min(kCopyWarps, boxes);
    // A lane has one box of a tile, and with boxes of a row, of which there are more than lanes, up to two.
    const auto copy_tile = [&](int i, int64_t address, int64_t offset, unsigned char* to, uint64_t* full) {
      copy(i, address == 0 ? 0 : address + offset, lane * warps + warp, to, full);
      if (boxes > 32 * warps) {
        const int box = (lane + 32) * warps + warp;
        const int64_t other = find_box(i, box);
        copy(i, other == 0 ? 0 : other + offset, box, to, full);
      }
    };
    const auto copy_keys = [&](int i, int64_t address) {
      const uint32_t at = number + i, stage = at % kPrefillStages, parity = (at / kPrefillStages & 1) ^ 1;
      barrier_wait(shared_address(&shared.key_empty[stage]), parity);
      copy_tile(i, address, 0, shared.keys[stage], &shared.key_full[stage]);
    };
    int64_t address = find_box(0, lane * warps + warp);
    if (tiles > 0) copy_keys(0, address);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      // Keys are taken a tile before the values that belong to them.
      const int64_t next = find_box(i + 1, lane * warps + warp);
      if (i + 1 < tiles) copy_keys(i + 1, next);
      const uint32_t at = number + i, stage = at % kPrefillStages, parity = (at / kPrefillStages & 1) ^ 1;
      barrier_wait(shared_address(&shared.value_empty[stage]), parity);
      copy_tile(i, address, args.value_bytes, shared.values[stage], &shared.value_full[stage]);
      address = next;
    }
    number += tiles;
  }
}

}  // namespace punica::cuda::prefill

#endif
