// The fast prefill's warp that finds items.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

using namespace hopper;

// Whether there is room for the keys of all sequences, which malformed tables may count twice: as rotate_keys_kernel
// decides. By a whole warp; all get the same.
__device__ __forceinline__ bool fits_rotated(const AttentionArgs& args) {
  int64_t pages = 0;
  for (int64_t i = threadIdx.x % 32; i < args.num_sequences; i += 32) pages += args.pages(i).num_pages;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) pages += __shfl_xor_sync(~0u, pages, lane);
  return pages <= args.num_page_ptrs;
}

// What of an item says where its queries lie.
struct PrefillQueries {
  int first_query, first_head, rows, kv_head;
};

// Finds items in ascending order of their index; the sequences before are not looked at again. A lane knows one of 32
// sequences at a time.
template <int kRows>
class ItemFinder {
 public:
  __device__ __forceinline__ ItemFinder(const AttentionArgs& args, bool rotated)
      : args_(args),
        splits_apart_(args.num_sequences > 32 ? prefill_splits_apart(args) : args.num_slots > 0),
        rotated_(rotated) {
    load();
    // Of up to 32 sequences one trip to the tables suffices: prefill_splits_apart() has these slots.
    if (splits_apart_ && args.num_sequences <= 32 && __shfl_sync(~0u, slots_end_, 31) > args.num_slots) {
      splits_apart_ = false;
      load();
    }
  }

  // By the whole warp; the lane of the item's sequence writes it. Whether there is one; its queries are then known to
  // all lanes.
  __device__ __forceinline__ bool find(int64_t index, PrefillItem* item, PrefillQueries* queries) {
    while (first_sequence_ < args_.num_sequences && index >= __shfl_sync(~0u, end_, 31)) {
      before_ = __shfl_sync(~0u, end_, 31);
      slots_before_ = __shfl_sync(~0u, slots_end_, 31);
      pages_before_ = __shfl_sync(~0u, pages_end_, 31);
      first_sequence_ += 32;
      load();
    }
    if (first_sequence_ >= args_.num_sequences) {
      if (threadIdx.x % 32 == 0) item->kv_head = -1, item->tiles = item->rows = 0;
      return false;
    }
    const int owner = __ffs(__ballot_sync(~0u, index < end_)) - 1;
    if (threadIdx.x % 32 == owner) {
      write(index, item);
      *queries = {item->first_query, item->first_head, item->rows, item->kv_head};
    }
    queries->first_query = __shfl_sync(~0u, queries->first_query, owner);
    queries->first_head = __shfl_sync(~0u, queries->first_head, owner);
    queries->rows = __shfl_sync(~0u, queries->rows, owner);
    queries->kv_head = __shfl_sync(~0u, queries->kv_head, owner);
    return true;
  }

 private:
  __device__ __forceinline__ void write(int64_t index, PrefillItem* item) const {
    const uint32_t heads = args_.num_kv_heads, group = args_.group_size, splits = splits_;
    const uint32_t local =
        static_cast<uint32_t>(index - (end_ - static_cast<int64_t>(row_tiles(q_len_) * splits * heads)));
    const uint32_t part = local / heads, place = part / splits, split = part - place * splits;
    // Late rows see the most keys: they start first.
    // Counted from the last row, so that a tile that is not full has those that see the fewest keys.
    const uint32_t end_row = q_len_ * group - place * kRows, first_row = end_row - min(end_row, uint32_t{kRows});
    const uint32_t query = first_row / group;
    const int rows = static_cast<int>(end_row - first_row);
    const int head = static_cast<int>(first_row - query * group);
    const int first = kv_len_ - q_len_ + static_cast<int>(query);
    const int last = first + (head + rows - 1) / static_cast<int>(group);
    item->first_slot = slots_end_ + static_cast<int64_t>(static_cast<int>(query) - q_len_) * splits + split;
    item->first_page = first_page_;
    item->kv_len = kv_len_;
    item->pages_before = rotated_ ? static_cast<int>(pages_end_ - num_pages_) : -1;
    item->first_query = first_row_ + static_cast<int>(query);
    item->first_position = first;
    item->first_head = head;
    item->rows = rows;
    item->splits = splits > 1 ? static_cast<int>(splits) : 0;
    item->kv_head = static_cast<int>(local - part * heads);
    int first_tile = static_cast<int>(args_.first_key(max(first, 0))) / kPrefillKeys;
    int end_tile = kv_len_ > 0 && last >= 0 ? last / kPrefillKeys + 1 : 0;
    if (splits > 1) {
      first_tile = max(first_tile, static_cast<int>(split) * kPrefillSplitTiles);
      end_tile = min(end_tile, static_cast<int>(split + 1) * kPrefillSplitTiles);
    }
    item->first_tile = first_tile;
    item->tiles = max(end_tile - first_tile, 0);
  }

  __device__ __forceinline__ uint32_t row_tiles(int q_len) const {
    return (static_cast<uint32_t>(q_len) * args_.group_size + kRows - 1) / kRows;
  }

  // The next 32 sequences: what each is, and its items and slots with those before it.
  __device__ __forceinline__ void load() {
    const int lane = threadIdx.x % 32;
    const int64_t sequence = first_sequence_ + lane;
    q_len_ = kv_len_ = first_page_ = num_pages_ = first_row_ = 0;
    splits_ = 1;
    if (sequence < args_.num_sequences) {
      const AttentionArgs::Entry entry = args_.entry(sequence);
      q_len_ = static_cast<int>(entry.num_queries);
      first_row_ = static_cast<int>(entry.row_begin);
      kv_len_ = static_cast<int>(entry.pages.kv_len);
      first_page_ = static_cast<int>(entry.pages.first_page);
      num_pages_ = static_cast<int>(entry.pages.num_pages);
      if (splits_apart_) splits_ = static_cast<int>(prefill_splits(kv_len_));
    }
    end_ = static_cast<int64_t>(row_tiles(q_len_) * static_cast<uint32_t>(splits_ * args_.num_kv_heads));
    slots_end_ = static_cast<int64_t>(q_len_) * splits_;
    pages_end_ = num_pages_;  // together no more than the table has, where keys have been rotated
    if (args_.num_sequences == 1) {
      end_ = __shfl_sync(~0u, end_, 0);
      slots_end_ = __shfl_sync(~0u, slots_end_, 0);
    } else {
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int64_t other = __shfl_up_sync(~0u, end_, distance);
        const int64_t other_slots = __shfl_up_sync(~0u, slots_end_, distance);
        const uint32_t other_pages = __shfl_up_sync(~0u, pages_end_, distance);
        if (lane >= distance) end_ += other, slots_end_ += other_slots, pages_end_ += other_pages;
      }
    }
    end_ += before_;
    slots_end_ += slots_before_;
    pages_end_ += pages_before_;
  }

  const AttentionArgs& args_;
  bool splits_apart_;
  const bool rotated_;
  // Items and slots before the 32 sequences, and up to the end of the lane's.
  int64_t before_ = 0, end_ = 0, slots_before_ = 0, slots_end_ = 0;
  int64_t first_sequence_ = 0;
  uint32_t pages_before_ = 0, pages_end_ = 0;
  int q_len_, kv_len_, first_page_, num_pages_, first_row_, splits_;  // of the lane's sequence
};

// Asks for an item's queries, which the groups copy later, to be brought into the second-level cache. By a whole warp.
__device__ __forceinline__ void prefetch_queries(const AttentionArgs& args, const PrefillQueries& item) {
  const uint32_t group = args.group_size, bytes = group * args.head_dim * 2;
  const int queries = (item.first_head + item.rows + group - 1) / group;
  const uint16_t* const q = static_cast<const uint16_t*>(args.q) + item.first_query * args.q_stride +
                            item.kv_head * static_cast<int64_t>(group) * args.head_dim;
  for (int i = threadIdx.x % 32; i < queries; i += 32) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(q + i * args.q_stride), "r"(bytes) : "memory");
  }
}

// Ahead of the warps that take the items by up to kItemsAhead. Items behind the first are counted up in next_item by
// whoever is free, or, without it, each block has every gridDim.x-th.
template <int kDim>
__device__ __forceinline__ void find_items(const AttentionArgs& args, const PrefillCall& call,
                                           PrefillShared<kDim>& shared) {
  ItemFinder<kPrefillRows<kDim>> finder(args, call.rotated != nullptr && fits_rotated(args));
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    PrefillItem& item = shared.items[n % kItemsAhead];
    barrier_wait(shared_address(&shared.item_empty[n % kItemsAhead]), (n / kItemsAhead & 1) ^ 1);
    int64_t index = blockIdx.x + static_cast<int64_t>(n) * gridDim.x;
    if (call.next_item != nullptr && n > 0) {
      unsigned taken = 0;
      if (threadIdx.x % 32 == 0) taken = atomicAdd(call.next_item, 1u);
      index = int64_t{gridDim.x} + __shfl_sync(~0u, taken, 0);
    }
    PrefillQueries queries = {};
    const bool found = finder.find(index, &item, &queries);
    barrier_arrive(shared_address(&shared.item_full[n % kItemsAhead]));
    __syncwarp();
    if (!found) return;
    if (call.wide_q) prefetch_queries(args, queries);
  }
}

}  // namespace punica::cuda::prefill

#endif
