// The fast prefill's warps that find items and copy keys and values.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

// Finds items in ascending order of their index; the sequences before are not looked at again.
class ItemFinder {
 public:
  __device__ __forceinline__ explicit ItemFinder(const AttentionArgs& args)
      : args_(args), splits_apart_(prefill_splits_apart(args)) {
    load();
  }

  // By the whole warp; lane 0 writes the item.
  __device__ __forceinline__ void find(int64_t index, PrefillItem* item) {
    const int lane = threadIdx.x % 32;
    while (first_sequence_ < args_.num_sequences && index >= before_ + __shfl_sync(~0u, end_, 31)) {
      before_ += __shfl_sync(~0u, end_, 31);
      slots_before_ += __shfl_sync(~0u, slots_end_, 31);
      first_sequence_ += 32;
      load();
    }
    if (first_sequence_ >= args_.num_sequences) {
      if (lane == 0) item->kv_head = -1;
      return;
    }
    const unsigned behind = __ballot_sync(~0u, index < before_ + end_);
    const int owner = __ffs(behind) - 1;
    if (lane != owner) {
      // The one lane that writes is the sequence's.
    } else {
      const int64_t sequence = first_sequence_ + lane;
      const int64_t q_len = args_.num_queries(sequence);
      const SequencePages pages = args_.pages(sequence);
      const int64_t splits = splits_apart_ ? prefill_splits(pages.kv_len) : 1;
      const int64_t count = (q_len * args_.group_size + kPrefillRows - 1) / kPrefillRows;
      const int64_t local = index - before_ - (end_ - count * splits * args_.num_kv_heads);
      const int64_t part = local / args_.num_kv_heads, split = part % splits;
      // Late rows see the most keys: they start first.
      const int64_t tile = count - 1 - part / splits;
      item->kv_head = static_cast<int>(local % args_.num_kv_heads);
      item->splits = splits > 1 ? static_cast<int>(splits) : 0;
      const int64_t first_slot = slots_before_ + slots_end_ - q_len * splits + split;
      item->first_page = pages.first_page;
      item->kv_len = pages.kv_len;
      const int64_t first_row = tile * kPrefillRows, query = first_row / args_.group_size;
      item->first_query = args_.row_begin(sequence) + query;
      item->first_slot = first_slot + query * splits;
      item->first_position = pages.kv_len - q_len + query;
      item->first_head = static_cast<int>(first_row - query * args_.group_size);
      const int64_t rows = min(q_len * args_.group_size - first_row, int64_t{kPrefillRows});
      item->rows = static_cast<int>(rows);
      const int64_t first = item->first_position, last = first + (item->first_head + rows - 1) / args_.group_size;
      int64_t first_tile = args_.first_key(max(first, int64_t{0})) / kPrefillKeys;
      int64_t end_tile = pages.kv_len > 0 && last >= 0 ? last / kPrefillKeys + 1 : 0;
      if (splits > 1) {
        constexpr int kSplitTiles = kPrefillSplitTokens / kPrefillKeys;
        first_tile = max(first_tile, split * kSplitTiles);
        end_tile = min(end_tile, (split + 1) * kSplitTiles);
      }
      item->first_tile = first_tile;
      item->tiles = static_cast<int>(max(end_tile - first_tile, int64_t{0}));
    }
    __syncwarp();
  }

 private:
  // Items of the warp's 32 sequences, summed up.
  __device__ __forceinline__ void load() {
    const int lane = threadIdx.x % 32;
    const int64_t sequence = first_sequence_ + lane;
    end_ = slots_end_ = 0;
    if (sequence < args_.num_sequences) {
      const int64_t q_len = args_.num_queries(sequence);
      const int64_t splits = splits_apart_ ? prefill_splits(args_.pages(sequence).kv_len) : 1;
      end_ = (q_len * args_.group_size + kPrefillRows - 1) / kPrefillRows * splits * args_.num_kv_heads;
      slots_end_ = q_len * splits;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, end_, distance);
      const int64_t other_slots = __shfl_up_sync(~0u, slots_end_, distance);
      if (lane >= distance) end_ += other, slots_end_ += other_slots;
    }
  }

  const AttentionArgs& args_;
  const bool splits_apart_;
  int64_t first_sequence_ = 0, before_ = 0, end_ = 0, slots_before_ = 0, slots_end_ = 0;
};

// By four warps: a box takes a warp some 65 cycles to ask for. The first of them finds the items.
template <int kDim>
__device__ __forceinline__ void copy_items(const AttentionArgs& args, const CUtensorMap* map, int box_rows,
                                           PrefillShared<kDim>& shared) {
  constexpr int kColumns = kDim / 64, kColumnBytes = kPrefillKeys * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int boxes = kPrefillKeys / box_rows, box_bytes = box_rows * 128;
  const int box = lane * kCopyWarps + warp;  // of each tile, this lane's
  uint32_t number = 0;                       // of tiles so far
  const auto copy_item = [&](const PrefillItem& item) {
    const int64_t* const page_table = args.kv_ptrs + item.first_page;
    const int64_t head_offset = args.key_bytes + item.kv_head * args.head_bytes;
    const int64_t kv_len = item.kv_len;
    const int tiles = item.tiles;
    int64_t position = item.first_tile * kPrefillKeys;
    // Where the lane's box of the tile at `first` lies, 0 behind the sequence.
    const auto find_box = [&](int64_t first) -> int64_t {
      const int64_t at = first + box * box_rows;
      if (box >= boxes || at >= kv_len) return 0;
      int64_t page, slot;
      if (((at | args.page_size) >> 32) == 0) {
        page = static_cast<uint32_t>(at) / static_cast<uint32_t>(args.page_size);
        slot = at - page * args.page_size;
      } else {
        page = at / args.page_size;
        slot = at % args.page_size;
      }
      return page_table[page] + head_offset + slot * (kDim * 2);
    };
    int64_t address = tiles > 0 ? find_box(position) : 0;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, ++number, position += kPrefillKeys) {
      const uint32_t stage = number % kPrefillStages, parity = (number / kPrefillStages & 1) ^ 1;
      const int64_t next = i + 1 < tiles ? find_box(position + kPrefillKeys) : 0;
      const auto copy = [&](unsigned char* to, uint64_t* full, uint64_t* empty, int64_t offset) {
        barrier_wait(shared_address(empty), parity);
        if (box == 0) {
          const int64_t left = kv_len - position;
          const int valid = left < kPrefillKeys ? (static_cast<int>(left) + box_rows - 1) / box_rows : boxes;
          barrier_expect(shared_address(full), valid * box_bytes * kColumns);
        }
        if (address != 0) {
          const uint64_t at = static_cast<uint64_t>(address + offset) >> 4;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            copy_box(shared_address(to) + c * kColumnBytes + box * box_bytes, map, c * 64, 0,
                     static_cast<int>(at & ((uint64_t{1} << kAddressBits) - 1)), static_cast<int>(at >> kAddressBits),
                     shared_address(full));
          }
        }
        __syncwarp();
      };
      copy(shared.keys[stage], &shared.key_full[stage], &shared.key_empty[stage], 0);
      copy(shared.values[stage], &shared.value_full[stage], &shared.value_empty[stage], args.value_bytes);
      address = next;
    }
  };
  if (warp == 0) {
    ItemFinder finder(args);
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
      PrefillItem& item = shared.items[n % 2];
      barrier_wait(shared_address(&shared.item_empty[n % 2]), (n / 2 & 1) ^ 1);
      finder.find(blockIdx.x + static_cast<int64_t>(n) * gridDim.x, &item);
      if (lane == 0) barrier_arrive(shared_address(&shared.item_full[n % 2]));
      __syncwarp();
      if (item.kv_head < 0) return;
      copy_item(item);
    }
  } else if (warp < boxes) {
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
      const PrefillItem& item = shared.items[n % 2];
      barrier_wait(shared_address(&shared.item_full[n % 2]), n / 2 & 1);
      if (item.kv_head < 0) return;
      copy_item(item);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&shared.item_empty[n % 2]));
    }
  }
}

}  // namespace punica::cuda::prefill

#endif
