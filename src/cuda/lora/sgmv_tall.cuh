// sgmv for float16 and bfloat16 on the sm_90 path where d_in is large, d_out from 17 to 512, and rows of x and W start
// at multiples of 16 bytes: x is what moves. (Addresses of W alone may be anywhere.)
//
// A cluster has a tile of rows and up to 128 columns, a block of it a part of d_in, which it walks over in steps of 64
// through a ring in shared memory that tensor copies fill and wgmma reads. Up to three warpgroups multiply 64 rows
// each, one more asks for the copies. The ring takes most of a multiprocessor's shared memory: what is on its way is
// what keeps the memory busy.
//
// The sum over d_in is that of a number of parts, of d_in alone, added as a balanced tree. A block sums one or more
// neighbouring parts, and the blocks of a cluster, each for the rows it owns, what they are sent by the others. How
// many blocks share d_in, and the tile, follow from the number of rows: they say who adds, not what to what.
#pragma once

#include "src/cuda/common/tensor_map.h"
#include "src/cuda/lora/sgmv_shrink_plan.h"
#include "src/cuda/lora/sgmv_shrink_tile.cuh"

namespace punica::cuda {

// kRows: of a tile, 16 or a multiple of 64. kWide: products along the columns. kLevels: of the tree of parts within a
// block. kBlocks: of a multiprocessor, 1 or 2.
template <int kN, int kWide, int kRows, int kLevels, int kBlocks>
struct Tall {
  static constexpr int kWarpgroups = kRows < 64 ? 1 : kRows / 64;
  static constexpr int kColumns = kN * kWide;
  static constexpr int kConsumers = 128 * kWarpgroups, kFillThreads = 128, kThreads = kConsumers + kFillThreads;
  // Registers of a thread that fills and of one that multiplies, where they do not get the same.
  static constexpr int kFillRegisters = 56;
  static constexpr int kMultiplyRegisters = kWarpgroups == 3 ? 152 : 224;
  // A step is of 64 of d_in, 128 bytes.
  static constexpr int kXBytes = kRows * 128, kWBytes = kColumns * 128, kStageBytes = kXBytes + kWBytes;
  // Of a tile of 16 rows a product reads 64 all the same, whatever follows.
  static constexpr int kTailBytes = kStageBytes < 64 * 128 ? 64 * 128 - kStageBytes : 0;
  static constexpr int kMostStages = ((kBlocks == 1 ? 225 << 10 : 111 << 10) - kTailBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 16 ? kMostStages : 16;
  static constexpr int kRingBytes = kStages * kStageBytes + kTailBytes;
  static constexpr int kGuessed = 2;  // steps of x that are asked for before it is known where the tile is
  static_assert(kStages >= 4);
  static constexpr int kSaved = kLevels > 0 ? kLevels : 1;
  static_assert(kRows * kColumns * 4 <= kRingBytes);
};

template <Arch kArch, class T, bool kInOut, int kN, int kWide, int kRows, int kLevels, int kBlocks>
__global__ void __launch_bounds__(Tall<kN, kWide, kRows, kLevels, kBlocks>::kThreads, kBlocks)
    sgmv_tall(const SgmvArgs args, const ShrinkPlan plan, const __grid_constant__ CUtensorMap x_map,
              const __grid_constant__ CUtensorMap w_map) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Tall<kN, kWide, kRows, kLevels, kBlocks>;
  constexpr int kWarpgroups = S::kWarpgroups, kColumns = S::kColumns, kStages = S::kStages;
  constexpr int kThreads = S::kThreads, kConsumers = S::kConsumers;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier, guessed_barrier, full_barriers[kStages], empty_barriers[kStages];
  launch_dependents<kArch>();

  // Powers of 2: a division takes a warp as long as a product.
  const int cluster_bits = 31 - __clz(plan.cluster), parts_bits = 31 - __clz(plan.parts);
  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const uint32_t rank = blockIdx.x & (plan.cluster - 1), item = blockIdx.x >> cluster_bits;
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kColumns - 1) / kColumns);
  const uint32_t tile_number = columns_blocks == 1 ? item : item / columns_blocks;
  // Parts of d_in begin at multiples of 128.
  const int64_t all_pairs = (args.d_in + 127) / 128;
  const int own_parts = plan.parts >> cluster_bits, first_part = rank * own_parts;
  const int64_t all_steps = (args.d_in + 63) / 64;
  const auto part_begin = [&](int part) { return min((all_pairs * (first_part + part) >> parts_bits) * 2, all_steps); };
  const int64_t begin = part_begin(0);
  const int steps = static_cast<int>(part_begin(own_parts) - begin);
  const auto column_of = [&](int step) { return (begin + step) * 64; };
  const uint32_t shared = shared_address(memory);
  const int group = static_cast<int>(__shfl_sync(0xffffffffu, id / 128, 0));
  const bool fills = group == kWarpgroups;

  const int fill_id = id % 128;
  constexpr int kPrefetched = 4;  // lines of a row
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(min(max(args.rows - row, int64_t{0}), int64_t{kRows}));
  };
  const uint32_t received_barrier = shared_address(&barrier), guess_barrier = shared_address(&guessed_barrier);
  const uint32_t full_at = shared_address(full_barriers), empty_at = shared_address(empty_barriers);
  if (id == 0) {
    hopper::barrier_init(received_barrier, 1);
    hopper::barrier_init(guess_barrier, 1);
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full_at + i * 8, 1);
      hopper::barrier_init(empty_at + i * 8, kConsumers / 32);
    }
    hopper::barrier_init_fence();
  }
  if (id == kConsumers) {
    hopper::prefetch_map(&x_map);
    hopper::prefetch_map(&w_map);
  }
  const int64_t guess = int64_t{tile_number} * kRows;
  // Before the wait the second-level cache is asked for the first columns of x where the tile is if the segments cover
  // all rows in order, in the time in which the last blocks of the kernel before end. That is no read: all writes end
  // up there.
#pragma unroll
  for (int i = 0; i < (kRows * kPrefetched + kThreads - 1) / kThreads; ++i) {
    const int line = id + i * kThreads, row = line / kPrefetched, step = line % kPrefetched;
    if (row < rows_from(guess) && step < steps) {
      prefetch_line(static_cast<const T*>(args.x) + (guess + row) * args.x_stride + column_of(step));
    }
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  __syncthreads();

  const auto copy_x = [&](int64_t first_row, int step, int slot, uint32_t at_barrier) {
    hopper::copy_box(shared + slot * S::kStageBytes, &x_map, static_cast<int>(column_of(step)),
                     static_cast<int>(first_row), at_barrier);
  };
  SgmvTile<T> tile;
  // In the time that the tables take, the first steps of x are read where the tile is if the segments cover all rows in
  // order. No more: W would have to wait behind them.
  const int guessed_steps = !args.early_reads ? min(S::kGuessed, steps) : 0;
  const bool asks = fills && fill_id == 0;
  const bool found = find_tile<kRows, kThreads>(args, tile_number, scratch, &tile, [&] {
    if (!asks || guessed_steps == 0) return;
    hopper::barrier_expect(guess_barrier, guessed_steps * S::kXBytes);
#pragma unroll 1
    for (int i = 0; i < guessed_steps; ++i) copy_x(guess, i, i, guess_barrier);
  });
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    // A block does not end before what it asked for has come.
    if (asks && guessed_steps > 0) hopper::barrier_wait(guess_barrier, 0);
    return;
  }
  const bool guessed = guessed_steps > 0 && tile.row == guess;
  const int64_t column = int64_t{item - tile_number * columns_blocks} * kColumns;
  const int columns = static_cast<int>(min(args.d_out - column, int64_t{kColumns}));

  if (fills) {
    if constexpr (kWarpgroups > 1) hopper::lower_registers<S::kFillRegisters>();
    const auto fill_w = [&](int step, int slot) {
      fill_weights<kInOut, kColumns>(shared + slot * S::kStageBytes + S::kXBytes, tile.w, column_of(step), column,
                                     columns, args, fill_id);
    };
    // A box has something of W in it: one that lies outside as a whole ends the kernel, as the map begins at address 0.
    const int w_bytes = kInOut ? (columns + kN - 1) / kN * (kN * 128) : S::kWBytes;
    const uint64_t w_at = reinterpret_cast<uint64_t>(tile.w) >> 4;
    const auto copy_w = [&](int step, int slot) {
      const uint32_t to = shared + slot * S::kStageBytes + S::kXBytes, full = full_at + slot * 8;
      const int k = static_cast<int>(column_of(step));
      const int low = static_cast<int>(w_at & ((uint64_t{1} << kTensorAddressBits) - 1));
      const int high = static_cast<int>(w_at >> kTensorAddressBits);
      if constexpr (!kInOut) {
        hopper::copy_box(to, &w_map, k, static_cast<int>(column), low, high, full);
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          if (i * kN >= columns) continue;
          hopper::copy_box(to + i * (64 * 128), &w_map, static_cast<int>(column) + i * kN, k, low, high, full);
        }
      }
    };
    const bool w_boxes = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0;
    const int first_steps = args.early_reads ? min(kStages, steps) : 0;  // of W, before the wait
    // To ask for the boxes of a step costs a thread 0.3 us, as long as it takes to multiply two: four take turns.
    constexpr int kAskers = 4;
    const int fill_warp = fill_id / 32;
    if (args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < first_steps; ++i) {
        if (!w_boxes) {
          fill_w(i, i);
        } else if (lane == 0 && i % kAskers == fill_warp) {
          copy_w(i, i);
        }
      }
      grid_dependency_wait<kArch>();
    }
    if (lane == 0 && !guessed && guessed_steps > 0) hopper::barrier_wait(guess_barrier, 0);
    if (w_boxes) {
      int slot = fill_warp, turn = 1;
#pragma unroll 1
      for (int step = fill_warp; step < steps && lane == 0; step += kAskers) {
        const uint32_t full = full_at + slot * 8;
        hopper::barrier_wait(empty_at + slot * 8, turn);
        const bool has_x = guessed && step < guessed_steps;
        hopper::barrier_expect(full, (has_x ? 0 : S::kXBytes) + w_bytes);
        if (step >= first_steps) copy_w(step, slot);
        if (!has_x) copy_x(tile.row, step, slot, full);
        slot += kAskers;
        if (slot >= kStages) slot -= kStages, turn ^= 1;
      }
    } else {
      int slot = 0, turn = 1;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        hopper::barrier_wait(empty_at + slot * 8, turn);
        if (step >= first_steps) fill_w(step, slot);
        hopper::fence_async_proxy();
        hopper::named_barrier_sync(1, 128);
        if (asks) {
          const bool has_x = guessed && step < guessed_steps;
          hopper::barrier_expect(full_at + slot * 8, has_x ? 0 : S::kXBytes);
          if (!has_x) copy_x(tile.row, step, slot, full_at + slot * 8);
        }
        if (++slot == kStages) slot = 0, turn ^= 1;
      }
    }
    __syncwarp();
    if (plan.cluster > 1) {
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
    return;
  }
  if constexpr (kWarpgroups > 1) hopper::raise_registers<S::kMultiplyRegisters>();
  if (args.early_reads) grid_dependency_wait<kArch>();
  ShrinkSums<T, kRows, kColumns, kConsumers> end(static_cast<T*>(args.y) + tile.row * args.y_stride + column,
                                                 args.y_stride, args.y_aligned, tile.rows, columns, rank, cluster_bits);
  if (id == 0 && plan.cluster > 1) hopper::barrier_expect(received_barrier, end.foreign_bytes(plan.cluster));
  // y at once where a thread has registers for what it adds to, so that nobody waits for it in the end.
  constexpr bool kLoadsEarly = decltype(end)::kUnits <= 2;
  if constexpr (kLoadsEarly) {
    end.load();
    if (!end.whole) end.prefetch();
  } else {
    end.prefetch();
  }

  if (guessed) hopper::barrier_wait(guess_barrier, 0);
  float sums[kWide][kN / 2] = {}, saved[S::kSaved][kWide][kN / 2];
  constexpr int kUnitBytes = kInOut && kN < 64 ? kN * 2 : 128;
  constexpr uint64_t kSwizzle = kUnitBytes == 128 ? 1 : kUnitBytes == 64 ? 2 : 3;
  constexpr uint32_t kWNext = (kInOut ? 16 * kUnitBytes : 32) >> 4;
  const uint64_t x_descriptor = hopper::wgmma_descriptor(shared + group * (64 * 128), 1, 16, 8 * 128);
  const uint64_t w_descriptor =
      hopper::wgmma_descriptor(shared + S::kXBytes, kSwizzle, kInOut ? 64 * 128 : 16, 8 * kUnitBytes);
  int part = 0, part_end = static_cast<int>(part_begin(1) - begin);
  int slot = 0, turn = 0, pending = -1;
  const auto release = [&](int slot) {
    if (lane == 0) hopper::barrier_arrive(empty_at + slot * 8);
  };
  const auto pin_sums = [&] {
#pragma unroll
    for (int m = 0; m < kWide; ++m) hopper::pin(sums[m]);
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    hopper::barrier_wait(full_at + slot * 8, turn);
    const uint32_t at = slot * (S::kStageBytes >> 4);
    const uint64_t a = x_descriptor + at, b = w_descriptor + at;
    hopper::products_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int m = 0; m < kWide; ++m) {
        hopper::wgmma_m64k16<T, kN, kInOut>(sums[m], a + k * 2, b + m * (64 * 128 >> 4) + k * kWNext);
      }
    }
    hopper::products_commit();
    hopper::products_wait<1>();
    if (pending >= 0) release(pending);
    pending = slot;
    if (++slot == kStages) slot = 0, turn ^= 1;
    if (step + 1 == part_end) {
      hopper::products_wait<0>();
      pin_sums();
      release(pending);
      pending = -1;
      bool done = false;
#pragma unroll
      for (int level = 0; level < kLevels; ++level) {
        if (done) continue;
        if (part >> level & 1) {
#pragma unroll
          for (int m = 0; m < kWide; ++m) {
#pragma unroll
            for (int i = 0; i < kN / 2; ++i) sums[m][i] += saved[level][m][i];
          }
        } else {
          done = true;
          if (step + 1 < steps) {
#pragma unroll
            for (int m = 0; m < kWide; ++m) {
#pragma unroll
              for (int i = 0; i < kN / 2; ++i) saved[level][m][i] = sums[m][i], sums[m][i] = 0.0f;
            }
          }
        }
      }
      part_end = static_cast<int>(part_begin(++part + 1) - begin);
    }
  }
  hopper::products_wait<0>();
  pin_sums();
  if constexpr (!kLoadsEarly) end.load();
  if (plan.cluster > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    hopper::named_barrier_sync(2, kConsumers);
  }
  end.template send<kN, kWide>(sums, tile.rows, shared, received_barrier);
  hopper::named_barrier_sync(2, kConsumers);
  if (plan.cluster > 1) hopper::barrier_wait(received_barrier, 0);
  end.add(reinterpret_cast<const float4*>(memory), plan.cluster);
#endif
}

}  // namespace punica::cuda
