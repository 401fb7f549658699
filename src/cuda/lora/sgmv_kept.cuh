// sgmv for float16 and bfloat16 on the sm_90 path where sgmv_tall serves, rows are many and a block's part of W fits in
// its shared memory: W stays there, and x passes.
//
// A cluster has a block for each part of d_in (ShrinkPlan), and takes neighbouring tiles of 64 rows, 64 columns after
// 64 columns. Of W, which in sgmv_tall comes as often through the second-level cache as there are tiles, a block copies
// its part once a segment; x comes through a ring of boxes of 64 rows x 128 of d_in, whatever W is waited for. The sums
// of a tile go to the blocks that own its rows while the next one is multiplied. They are those of sgmv_tall: the same
// products in the same order, parts added as a balanced tree.
#pragma once

#include "src/cuda/common/tensor_map.h"
#include "src/cuda/lora/sgmv_shrink_plan.h"
#include "src/cuda/lora/sgmv_shrink_tile.cuh"
#include "src/cuda/lora/sgmv_sum.cuh"

namespace punica::cuda {

struct Kept {
  static constexpr int kRows = 64, kColumns = 64;
  static constexpr int kConsumers = 128, kWeightThreads = 128, kXWarps = 2;
  static constexpr int kThreads = kConsumers + kWeightThreads + kXWarps * 32;
  static constexpr int kChunkBytes = 64 * 128, kPairBytes = 2 * kChunkBytes;  // 64 and 128 of d_in
  static constexpr int kMostPairs = kKeptPairs, kMostSlots = 12;
  static constexpr int kSumsBytes = kRows * kColumns * 4;
  static constexpr int kMostBytes = 225 << 10;
};

struct KeptPlan {
  int parts;  // of d_in, and blocks of a cluster
  int pairs;  // of a part of W, at most
  int slots;  // of x
};

template <Arch kArch, class T, bool kInOut>
__global__ void __launch_bounds__(Kept::kThreads, 1)
    sgmv_kept(const SgmvArgs args, const KeptPlan plan, const __grid_constant__ CUtensorMap x_map,
              const __grid_constant__ CUtensorMap w_map) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Kept;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) uint64_t full_barriers[S::kMostSlots], empty_barriers[S::kMostSlots],
      w_full_barriers[S::kMostPairs], w_free_barrier, received_barriers[2];
  launch_dependents<kArch>();

  const int parts_bits = 31 - __clz(plan.parts);
  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const int warp = __shfl_sync(0xffffffffu, id / 32, 0);
  const uint32_t rank = blockIdx.x & (plan.parts - 1), cluster = blockIdx.x >> parts_bits;
  const uint32_t clusters = gridDim.x >> parts_bits;
  const int all_pairs = static_cast<int>((args.d_in + 127) / 128), all_chunks = static_cast<int>(args.d_in / 64);
  const int first_pair = all_pairs * static_cast<int>(rank) >> parts_bits;
  const int pairs = (all_pairs * static_cast<int>(rank + 1) >> parts_bits) - first_pair;
  const auto chunks_of = [&](int pair) { return min(all_chunks - (first_pair + pair) * 2, 2); };
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + S::kColumns - 1) / S::kColumns);
  const uint32_t w_at = shared_address(memory), x_at = w_at + plan.pairs * S::kPairBytes;
  const uint32_t sums_at = x_at + plan.slots * S::kPairBytes;
  const uint32_t full_at = shared_address(full_barriers), empty_at = shared_address(empty_barriers);
  const uint32_t w_full_at = shared_address(w_full_barriers), w_free = shared_address(&w_free_barrier);
  const uint32_t received_at = shared_address(received_barriers);

  if (id == 0) {
    for (int i = 0; i < plan.slots; ++i) {
      hopper::barrier_init(full_at + i * 8, 1);
      hopper::barrier_init(empty_at + i * 8, S::kConsumers / 32);
    }
    for (int i = 0; i < plan.pairs; ++i) hopper::barrier_init(w_full_at + i * 8, 1);
    hopper::barrier_init(w_free, S::kConsumers / 32);
    hopper::barrier_init(received_at, 1);
    hopper::barrier_init(received_at + 8, 1);
    hopper::barrier_init_fence();
  }
  if (id == S::kConsumers) {
    hopper::prefetch_map(&x_map);
    hopper::prefetch_map(&w_map);
  }
  // The units of a cluster: tiles of some columns, then of the next columns.
  const auto begin_of = [&](uint32_t tiles, uint32_t of) {
    return static_cast<uint32_t>(uint64_t{tiles} * columns_blocks * of / clusters);
  };
  {
    // In the time in which the last blocks of the kernel before end, the second-level cache is asked for the first
    // columns of x where the first tile is if segments cover all rows in order and end with a tile.
    const uint32_t guessed = static_cast<uint32_t>((args.rows + S::kRows - 1) / S::kRows);
    const int64_t guess = int64_t{begin_of(guessed, cluster) % guessed} * S::kRows;
    constexpr int kLines = 4;
    if (id < S::kRows * kLines) {
      const int64_t row = guess + id / kLines;
      if (row < args.rows) {
        prefetch_line(static_cast<const T*>(args.x) + row * args.x_stride + first_pair * 128 + id % kLines * 64);
      }
    }
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  __syncthreads();
  if (plan.parts > 1) cluster_arrive();
  const WarpTiles<T, S::kRows> tiles(args);
  const uint32_t begin = begin_of(tiles.all, cluster), end = begin_of(tiles.all, cluster + 1);
  if (begin == end) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }
  const auto column_of = [&](uint32_t unit) { return static_cast<int64_t>(unit / tiles.all) * S::kColumns; };
  const auto tile_of = [&](uint32_t unit) { return tiles.at(args, unit % tiles.all); };
  const auto columns_of = [&](uint32_t unit) {
    return static_cast<int>(min(args.d_out - column_of(unit), int64_t{S::kColumns}));
  };
  // Whether a unit needs other weights than the one before it.
  const auto is_new = [&](uint32_t unit, const T* w, const T* w_before) {
    return unit == begin || w != w_before || unit % tiles.all == 0;
  };

  if (warp >= (S::kConsumers + S::kWeightThreads) / 32) {
    // x.
    const int own = warp - (S::kConsumers + S::kWeightThreads) / 32;
    if (args.early_reads) grid_dependency_wait<kArch>();
    int slot = own, turn = 1, pair = own;
    uint32_t unit = begin;
    while (pair >= pairs) pair -= pairs, ++unit;
    while (unit < end) {
      const SgmvTile<T> tile = tile_of(unit);
      for (; pair < pairs; pair += S::kXWarps) {
        if (lane == 0) {
          hopper::barrier_wait(empty_at + slot * 8, turn);
          hopper::barrier_expect(full_at + slot * 8, S::kPairBytes);
          hopper::copy_box(x_at + slot * S::kPairBytes, &x_map, 0, static_cast<int>(tile.row),
                           (first_pair + pair) * 2, full_at + slot * 8);
        }
        slot += S::kXWarps;
        if (slot >= plan.slots) slot -= plan.slots, turn ^= 1;
      }
      while (pair >= pairs) pair -= pairs, ++unit;
    }
    return;
  }

  if (warp >= S::kConsumers / 32) {
    // W.
    const int fill_id = id - S::kConsumers, fill_warp = warp - S::kConsumers / 32;
    const T* before = nullptr;
    bool waited = !args.early_reads;
    int turn = 0;
#pragma unroll 1
    for (uint32_t unit = begin; unit < end; ++unit) {
      const SgmvTile<T> tile = tile_of(unit);
      if (!is_new(unit, tile.w, before)) continue;
      before = tile.w;
      if (unit != begin) {
        hopper::barrier_wait(w_free, turn);
        turn ^= 1;
      }
      const int64_t column = column_of(unit);
      const int columns = columns_of(unit);
      const uint64_t address = reinterpret_cast<uint64_t>(tile.w) >> 4;
      const int low = static_cast<int>(address & ((uint64_t{1} << kTensorAddressBits) - 1));
      const int high = static_cast<int>(address >> kTensorAddressBits);
      if (reinterpret_cast<uintptr_t>(tile.w) % 16 == 0) {
        for (int pair = fill_warp; pair < pairs && lane == 0; pair += 4) {
          const uint32_t to = w_at + pair * S::kPairBytes, full = w_full_at + pair * 8;
          const int chunks = chunks_of(pair);
          hopper::barrier_expect(full, chunks * S::kChunkBytes);
          for (int i = 0; i < chunks; ++i) {
            const int k = ((first_pair + pair) * 2 + i) * 64;
            hopper::copy_box(to + i * S::kChunkBytes, &w_map, kInOut ? static_cast<int>(column) : k,
                             kInOut ? k : static_cast<int>(column), low, high, full);
          }
        }
        __syncwarp();
      } else {
#pragma unroll 1
        for (int pair = 0; pair < pairs; ++pair) {
#pragma unroll 1
          for (int i = 0; i < chunks_of(pair); ++i) {
            fill_weights<kInOut, S::kColumns>(w_at + pair * S::kPairBytes + i * S::kChunkBytes, tile.w,
                                              int64_t{(first_pair + pair) * 2 + i} * 64, column, columns, args, fill_id);
          }
          hopper::fence_async_proxy();
          hopper::named_barrier_sync(1, S::kWeightThreads);
          if (fill_id == 0) hopper::barrier_arrive(w_full_at + pair * 8);
        }
      }
      if (!waited) grid_dependency_wait<kArch>();
      waited = true;
    }
    return;
  }

  if (args.early_reads) grid_dependency_wait<kArch>();
  using Sums = ShrinkSums<T, S::kRows, S::kColumns, S::kConsumers>;
  const uint64_t x_descriptor = hopper::wgmma_descriptor(x_at, 1, 16, 8 * 128);
  const uint64_t w_descriptor = hopper::wgmma_descriptor(w_at, 1, kInOut ? 64 * 128 : 16, 8 * 128);
  constexpr uint32_t kWNext = (kInOut ? 16 * 128 : 32) >> 4;
  const auto release = [&](int slot) {
    if (lane == 0) hopper::barrier_arrive(empty_at + slot * 8);
  };
  const auto add_sums = [&](const Sums& sums, uint32_t number) {
    hopper::named_barrier_sync(2, S::kConsumers);  // the block's own sums are there
    if (plan.parts > 1) hopper::barrier_wait(received_at + number % 2 * 8, number / 2 & 1);
    sums.add(reinterpret_cast<const float4*>(memory + (sums_at - w_at) + number % 2 * S::kSumsBytes), plan.parts);
  };
  int slot = 0, turn = 0, w_turn = 0;
  SgmvTile<T> tile = tile_of(begin);
  Sums last(static_cast<T*>(args.y), args.y_stride, args.y_aligned, 0, 0, rank, parts_bits);
#pragma unroll 1
  for (uint32_t unit = begin; unit < end; ++unit) {
    float sums[1][32] = {};
    int pending = -1;
#pragma unroll 1
    for (int pair = 0; pair < pairs; ++pair) {
      hopper::barrier_wait(w_full_at + pair * 8, w_turn);
      hopper::barrier_wait(full_at + slot * 8, turn);
      const int chunks = chunks_of(pair);
      hopper::products_fence();
#pragma unroll 1
      for (int i = 0; i < chunks; ++i) {
        const uint64_t a = x_descriptor + (slot * S::kPairBytes + i * S::kChunkBytes >> 4);
        const uint64_t b = w_descriptor + (pair * S::kPairBytes + i * S::kChunkBytes >> 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) hopper::wgmma_m64k16<T, 64, kInOut>(sums[0], a + k * 2, b + k * kWNext);
      }
      hopper::products_commit();
      hopper::products_wait<1>();
      if (pending >= 0) release(pending);
      pending = slot;
      if (++slot == plan.slots) slot = 0, turn ^= 1;
    }
    hopper::products_wait<0>();
    hopper::pin(sums[0]);
    release(pending);
    const uint32_t number = unit - begin;
    const SgmvTile<T> now = tile;
    if (unit + 1 < end) {
      tile = tile_of(unit + 1);
      if (is_new(unit + 1, tile.w, now.w)) {
        if (lane == 0) hopper::barrier_arrive(w_free);
        w_turn ^= 1;
      }
    }
    if (number > 0) {
      add_sums(last, number - 1);
      // A block that has what this one sends next may send the sums of two tiles on to where these were.
      hopper::named_barrier_sync(2, S::kConsumers);
    } else if (plan.parts > 1) {
      cluster_wait();
    }
    const int64_t column = column_of(unit);
    last = Sums(static_cast<T*>(args.y) + now.row * args.y_stride + column, args.y_stride, args.y_aligned, now.rows,
                columns_of(unit), rank, parts_bits);
    const uint32_t received = received_at + number % 2 * 8;
    if (id == 0 && plan.parts > 1) hopper::barrier_expect(received, last.foreign_bytes(plan.parts));
    last.template send<64, 1>(sums, now.rows, sums_at + number % 2 * S::kSumsBytes, received);
    last.load();
  }
  add_sums(last, end - begin - 1);
#endif
}

}  // namespace punica::cuda
