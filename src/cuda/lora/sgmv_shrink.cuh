// sgmv for float16 and bfloat16 on the sm_90 path where d_in is large, d_out from 17 to 512, and rows of x or W do not
// start at multiples of 16 bytes, which sgmv_tall.cuh asks for: the same sums.
//
// A cluster has a tile of rows and up to 64 columns, a block of it a part of d_in, which it walks over in steps of 128
// through a ring in shared memory that cp.async fills with words of 4 bytes. They are put together in one tile when
// they have come, and wgmma reads that, 64 rows and all columns at once. Blocks stay, and take one tile after another.
//
// Rows and columns of a tile that are not there are not filled: a product's element is a function of its own row and
// column alone, and those are not stored.
#pragma once

#include "src/cuda/lora/sgmv_shrink_plan.h"
#include "src/cuda/lora/sgmv_shrink_tile.cuh"

namespace punica::cuda {

// Steps of x that are asked for before it is known where the tile is.
inline constexpr int kGuessedSteps = 2;

// kN: columns of a tile, 32 or 64. kRows: 16 or 64. kBlocks: of a multiprocessor.
template <bool kInOut, int kN, int kRows, int kBlocks>
struct Shrink {
  static constexpr int kThreads = 128;
  // A step in units of 64 elements, 128 bytes: the widest swizzle of wgmma.
  static constexpr int kAtoms = 2;
  static constexpr int kStep = kAtoms * 64;
  static constexpr int kXBytes = kRows * 128, kWBytes = kN * 128;  // of an atom
  static constexpr int kAtomBytes = kXBytes + kWBytes;
  static constexpr int kTileBytes = kAtoms * kAtomBytes;  // of a step, as wgmma reads it
  // A stage of the ring holds the words of 4 bytes that the rows lie in; the tile lies before the ring.
  using RawX = RawTile<kRows, kStep>;
  using RawW = RawTile<kInOut ? kStep : kN, kInOut ? kN : kStep>;
  static constexpr int kStageBytes = RawX::kBytes + RawW::kBytes;
  // Of a tile of 16 rows a product reads 64 all the same, whatever follows.
  static constexpr int kTailBytes = kAtomBytes < 64 * 128 ? 64 * 128 - kAtomBytes : 0;
  // The sums of the rows that a block owns: beside the ring if they are small, else over it, when all of the cluster
  // are done with theirs.
  static constexpr int kSumBytes = kRows * kN * 4;
  static constexpr bool kSumsBeside = kN == 32;
  static constexpr int kOtherBytes = kTailBytes + (kSumsBeside ? kSumBytes : 0) + kTileBytes;
  static constexpr int kRoom = (228 << 10) / kBlocks - (2 << 10);  // 1 KiB is the system's, 1 KiB static
  static constexpr int kMostStages = (kRoom - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kAhead = kStages - 1;  // steps of copies under way
  static constexpr int kRingBytes = kStages * kStageBytes + kTileBytes;
  static constexpr int kSharedBytes = kRingBytes + kTailBytes + (kSumsBeside ? kSumBytes : 0);
  static constexpr int kLevels = shrink_levels(kN);
  static_assert(kAhead >= 2 && (kSumsBeside || kSumBytes <= kRingBytes));
};

template <Arch kArch, class T, bool kInOut, int kN, int kRows, int kBlocks>
__global__ void __launch_bounds__(Shrink<kInOut, kN, kRows, kBlocks>::kThreads, kBlocks)
    sgmv_shrink(const SgmvArgs args, const ShrinkPlan plan) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shrink<kInOut, kN, kRows, kBlocks>;
  constexpr int kThreads = S::kThreads, kStep = S::kStep;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier;
  launch_dependents<kArch>();

  const int id = static_cast<int>(threadIdx.x);
  // Powers of 2: a division takes a warp as long as a product.
  const int cluster_bits = 31 - __clz(plan.cluster), parts_bits = 31 - __clz(plan.parts);
  const uint32_t rank = blockIdx.x & (plan.cluster - 1), clusters = gridDim.x >> cluster_bits;
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kN - 1) / kN);
  const int64_t all_steps = (args.d_in + kStep - 1) / kStep;
  const int own_parts = plan.parts >> cluster_bits, first_part = rank * own_parts;
  const auto part_begin = [&](int part) { return all_steps * (first_part + part) >> parts_bits; };
  const int64_t begin = part_begin(0);
  const int steps = static_cast<int>(part_begin(own_parts) - begin);
  const int64_t first_k = begin * kStep;
  const uint32_t shared = shared_address(memory);
  const uint32_t ring = shared + S::kTileBytes;

  const auto fill_x = [&](int64_t first_row, int rows, int step, int slot) {
    const int64_t k = first_k + int64_t{step} * kStep;
    const T* const from = static_cast<const T*>(args.x) + first_row * args.x_stride + k;
    S::RawX::template fill<kThreads>(ring + slot * S::kStageBytes, from, args.x_stride, rows, args.d_in - k,
                                     k == 0 ? kRows : 0, k + kStep >= args.d_in ? kRows : 0);
  };

  const uint32_t received_barrier = shared_address(&barrier);
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(min(max(args.rows - row, int64_t{0}), int64_t{kRows}));
  };
  uint32_t item = blockIdx.x >> cluster_bits;  // column by column, tile by tile
  const int64_t guess = int64_t{item / columns_blocks} * kRows;
  if (id == 0) {
    hopper::barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }

  int phase = 0;
#pragma unroll 1
  for (bool is_first = true;; is_first = false, item += clusters, phase ^= 1) {
    SgmvTile<T> tile;
    // In the time that the tables take, the first steps of x are read where the tile is if the segments cover all rows
    // in order, as they mostly do. No more: W would have to wait behind them.
    const int guessed_steps = is_first && !args.early_reads ? min(kGuessedSteps, steps) : 0;
    const bool found = find_tile<kRows, kThreads>(args, item / columns_blocks, scratch, &tile, [&] {
#pragma unroll 1
      for (int i = 0; i < guessed_steps; ++i) fill_x(guess, rows_from(guess), i, i);
    });
    if (!found) {
      if (is_first && args.early_reads) grid_dependency_wait<kArch>();
      copy_commit();
      copy_wait<0>();
      return;  // the other blocks of the cluster find the same
    }
    const bool guessed = guessed_steps > 0 && tile.row == guess && tile.rows <= rows_from(guess);
    const int64_t column = int64_t{item % columns_blocks} * kN;
    const int columns = static_cast<int>(min(args.d_out - column, int64_t{kN}));

    ShrinkSums<T, kRows, kN, kThreads> end(static_cast<T*>(args.y) + tile.row * args.y_stride + column, args.y_stride,
                                           args.y_aligned, tile.rows, columns, rank, cluster_bits);
    if (plan.cluster > 1) {
      if (id == 0) hopper::barrier_expect(received_barrier, end.foreign_bytes(plan.cluster));
      if constexpr (S::kSumsBeside) {
        // There is room for sums. Waited for before the first remote store.
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      }
    }

    const auto fill_w = [&](int step, int slot) {
      const int64_t k0 = first_k + int64_t{step} * kStep;
      const uint32_t to = ring + slot * S::kStageBytes + S::RawX::kBytes;
      // Rows of W follow each other: only before the first and behind the last one there may be nothing.
      const int beginning = k0 == 0 && column == 0 ? 1 : 0;
      const int ending = k0 + kStep >= args.d_in && column + kN >= args.d_out ? 1 : 0;
      if constexpr (kInOut) {
        S::RawW::template fill<kThreads>(to, tile.w + k0 * args.d_out + column, args.d_out,
                                         static_cast<int>(min(args.d_in - k0, int64_t{kStep})), columns, beginning,
                                         ending);
      } else {
        S::RawW::template fill<kThreads>(to, tile.w + column * args.d_in + k0, args.d_in, columns, args.d_in - k0,
                                         beginning, ending);
      }
    };

    if (is_first && args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < min(S::kAhead, steps); ++i) fill_w(i, i);
      grid_dependency_wait<kArch>();
    } else if (!guessed) {
      // The copies of a wrong guess end before others go to the same places: committed, as only those are waited for,
      // and in all threads, as which thread copies what depends on where rows begin.
      copy_commit();
      copy_wait<0>();
      if (guessed_steps > 0) __syncthreads();
    }
#pragma unroll 1
    for (int i = 0; i < S::kAhead; ++i) {
      if (i < steps) {
        if (!is_first || !args.early_reads) fill_w(i, i);
        if (!guessed || i >= guessed_steps) fill_x(tile.row, tile.rows, i, i);
      }
      copy_commit();
    }
    end.prefetch();

    float all_sums[1][kN / 2] = {}, saved[S::kLevels][kN / 2];
    float (&sums)[kN / 2] = all_sums[0];
    constexpr int kUnitBytes = kInOut && kN < 64 ? kN * 2 : 128;  // of a row of W in shared memory
    constexpr uint64_t kSwizzle = kUnitBytes == 128 ? 1 : kUnitBytes == 64 ? 2 : 3;
    constexpr uint32_t kWNext = (kInOut ? 16 * kUnitBytes : 32) >> 4;
    const uint64_t x_descriptor = hopper::wgmma_descriptor(shared, 1, 16, 8 * 128);
    const uint64_t w_descriptor =
        hopper::wgmma_descriptor(shared + S::kXBytes, kSwizzle, kInOut ? 64 * 128 : 16, 8 * kUnitBytes);
    int part = 0, part_end = static_cast<int>(part_begin(1) - begin);
    const auto multiply = [&] {
      hopper::products_fence();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        const int atom = k / 4 * (S::kAtomBytes >> 4);
        hopper::wgmma_m64k16<T, kN, kInOut>(sums, x_descriptor + atom + k % 4 * 2,
                                            w_descriptor + atom + k % 4 * kWNext);
      }
      hopper::products_commit();
    };
    const auto finish = [&] {
      hopper::products_wait<0>();
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    };
    // At the end of a part.
    const auto add_part = [&](bool is_last) {
      // The tree: part i has the sum of as many parts before it to add as i has ones at its end.
      bool done = false;
#pragma unroll
      for (int level = 0; level < S::kLevels; ++level) {
        if (done) continue;
        if (part >> level & 1) {
#pragma unroll
          for (int i = 0; i < kN / 2; ++i) sums[i] += saved[level][i];
        } else {
          done = true;
          if (!is_last) {
#pragma unroll
            for (int i = 0; i < kN / 2; ++i) saved[level][i] = sums[i], sums[i] = 0.0f;
          }
        }
      }
      part_end = static_cast<int>(part_begin(++part + 1) - begin);
    };
    int slot = 0, next_slot = S::kAhead;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_wait<S::kAhead - 1>();
      __syncthreads();
      const int64_t k = first_k + int64_t{step} * kStep;
      const uint32_t stage = ring + slot * S::kStageBytes;
      S::RawX::template spread<kThreads>(stage, static_cast<const T*>(args.x) + tile.row * args.x_stride, args.x_stride,
                                         tile.rows, args.d_in - k, [&](int row, int chunk) {
                                           return shared + chunk / 8 * S::kAtomBytes + row * 128 +
                                                  (chunk % 8 ^ (row & 7)) * 16;
                                         });
      if constexpr (kInOut) {
        S::RawW::template spread<kThreads>(
            stage + S::RawX::kBytes, tile.w + column, args.d_out, static_cast<int>(min(args.d_in - k, int64_t{kStep})),
            columns, [&](int row, int chunk) {
              constexpr int kUnit = kN / 8 < 8 ? kN / 8 : 8;  // chunks
              const int turn = kUnit == 8 ? row & 7 : kUnit == 4 ? row >> 1 & 3 : row >> 2 & 1;
              return shared + row / 64 * S::kAtomBytes + S::kXBytes + chunk / kUnit * (64 * 128) +
                     (row % 64 * kUnit + (chunk % kUnit ^ turn)) * 16;
            });
      } else {
        S::RawW::template spread<kThreads>(stage + S::RawX::kBytes, tile.w + column * args.d_in, args.d_in, columns,
                                           args.d_in - k, [&](int row, int chunk) {
                                             return shared + chunk / 8 * S::kAtomBytes + S::kXBytes + row * 128 +
                                                    (chunk % 8 ^ (row & 7)) * 16;
                                           });
      }
      hopper::fence_async_proxy();
      __syncthreads();
      multiply();
      // Into the slot whose products ended before the barrier above.
      if (step + S::kAhead < steps) {
        fill_x(tile.row, tile.rows, step + S::kAhead, next_slot);
        fill_w(step + S::kAhead, next_slot);
      }
      copy_commit();
      finish();
      if (++slot == S::kStages) slot = 0;
      if (++next_slot == S::kStages) next_slot = 0;
      if (step + 1 == part_end) add_part(step + 1 == steps);
    }
    copy_wait<0>();
    end.load();
    if (plan.cluster > 1) {
      if constexpr (!S::kSumsBeside) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    } else if constexpr (!S::kSumsBeside) {
      __syncthreads();
    }

    const uint32_t received = shared + (S::kSumsBeside ? S::kRingBytes + S::kTailBytes : 0);
    end.template send<kN, 1>(all_sums, tile.rows, received, received_barrier);
    __syncthreads();
    if (plan.cluster > 1) hopper::barrier_wait(received_barrier, phase);
    end.add(reinterpret_cast<const float4*>(memory + (received - shared)), plan.cluster);
    const uint32_t next = item + clusters;
    if (next >= plan.items || next / columns_blocks >= tile.tiles) return;
    __syncthreads();  // before the ring and the sums are written again
  }
#endif
}

}  // namespace punica::cuda
