// sgmv for float16 and bfloat16 on the sm_90 path where d_in is large and d_out from 17 to 512: x is what moves.
//
// A cluster has a tile of rows and up to 128 columns, a block of it a part of d_in, which it walks over in steps of 64
// or 128 through a ring in shared memory that cp.async fills and wgmma reads, 64 rows and all columns a warpgroup. The
// ring takes most of a multiprocessor's shared memory: what is on its way is what keeps the memory busy.
//
// The sum over d_in is that of a number of parts, of d_in alone, added as a balanced tree. A block sums one or more
// neighbouring parts, and the blocks of a cluster, each for the rows it owns, what they are sent by the others. How
// many blocks share d_in, and the rows of a tile, follow from the number of rows: they say who adds, not what to what.
//
// Rows and columns of a tile that are not there are not filled: a product's element is a function of its own row and
// column alone, and those are not stored.
#pragma once

#include "src/cuda/lora/sgmv_shrink_tile.cuh"

namespace punica::cuda {

struct ShrinkPlan {
  int parts;      // of d_in: a power of 2
  int cluster;    // blocks that share them: a power of 2, at most `parts`
  int64_t items;  // tiles times blocks of columns, or more: there are no more if segments do not overlap
};

// Levels of the tree of parts within a block, as registers allow.
constexpr int shrink_levels(int columns) { return columns == 32 ? 3 : 2; }

// Steps of x that are asked for before it is known where the tile is.
inline constexpr int kGuessedSteps = 2;

// kN: columns of a tile, 32 or 64. kRows: 16 or 64. kBlocks: of a multiprocessor.
// kRaw: rows of x or W that do not start at multiples of 16 bytes.
template <bool kInOut, int kN, int kRows, int kBlocks, bool kRaw>
struct Shrink {
  static constexpr int kConsumers = 128;
  // Whether a warpgroup of its own fills the ring, so that products start while the first round of it is on its way: a
  // multiprocessor takes only so many requests, and the thread that makes one more waits.
  static constexpr bool kSplit = kBlocks == 1 && !kRaw;
  static constexpr int kThreads = kConsumers + (kSplit ? 128 : 0);
  static constexpr int kFillThreads = kSplit ? 128 : kThreads;
  // A step in units of 64 elements, 128 bytes: the widest swizzle of wgmma.
  static constexpr int kAtoms = 2;
  static constexpr int kStep = kAtoms * 64;
  static constexpr int kXBytes = kRows * 128, kWBytes = kN * 128;  // of an atom
  static constexpr int kAtomBytes = kXBytes + kWBytes;
  static constexpr int kTileBytes = kAtoms * kAtomBytes;  // of a step, as wgmma reads it
  // A stage of the ring holds that; or, if kRaw, the words of 4 bytes that the rows lie in, which are put together when
  // they have come, in one tile before the ring.
  using RawX = RawTile<kRows, kStep>;
  using RawW = RawTile<kInOut ? kStep : kN, kInOut ? kN : kStep>;
  static constexpr int kStageBytes = kRaw ? RawX::kBytes + RawW::kBytes : kTileBytes;
  // Of a tile of 16 rows a product reads 64 all the same, whatever follows.
  static constexpr int kTailBytes = kAtomBytes < 64 * 128 ? 64 * 128 - kAtomBytes : 0;
  // The sums of the rows that a block owns: beside the ring if they are small, else over it, when all of the cluster
  // are done with theirs.
  static constexpr int kSumBytes = kRows * kN * 4;
  static constexpr bool kSumsBeside = kN == 32;
  static constexpr int kOtherBytes = kTailBytes + (kSumsBeside ? kSumBytes : 0) + (kRaw ? kTileBytes : 0);
  static constexpr int kRoom = (228 << 10) / kBlocks - (2 << 10);  // 1 KiB is the system's, 1 KiB static
  static constexpr int kMostStages = (kRoom - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kAhead = kStages - 1;  // steps of copies under way
  static constexpr int kRingBytes = kStages * kStageBytes + (kRaw ? kTileBytes : 0);
  static constexpr int kSharedBytes = kRingBytes + kTailBytes + (kSumsBeside ? kSumBytes : 0);
  static constexpr int kLevels = shrink_levels(kN);
  static_assert(kAhead >= 2 && (kSumsBeside || kSumBytes <= kRingBytes));
};

template <Arch kArch, class T, bool kInOut, int kN, int kRows, int kBlocks, bool kRaw>
__global__ void __launch_bounds__(Shrink<kInOut, kN, kRows, kBlocks, kRaw>::kThreads, kBlocks)
    sgmv_shrink(const SgmvArgs args, const ShrinkPlan plan) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shrink<kInOut, kN, kRows, kBlocks, kRaw>;
  constexpr int kThreads = S::kThreads, kFillThreads = S::kFillThreads, kStep = S::kStep;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier, full_barriers[S::kStages], empty_barriers[S::kStages];
  launch_dependents<kArch>();

  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const uint32_t rank = blockIdx.x % plan.cluster;
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kN - 1) / kN);
  const int64_t all_steps = (args.d_in + kStep - 1) / kStep;
  const int own_parts = plan.parts / plan.cluster, first_part = rank * own_parts;
  const auto part_begin = [&](int part) { return all_steps * (first_part + part) / plan.parts; };
  const int64_t begin = part_begin(0);
  const int steps = static_cast<int>(part_begin(own_parts) - begin);
  const int64_t first_k = begin * kStep;
  const uint32_t shared = shared_address(memory);
  const uint32_t ring = shared + (kRaw ? S::kTileBytes : 0);

  // A thread's chunks are in one column of 16 bytes of an atom, turned within its 8 (wgmma's swizzle) by the row.
  constexpr int kRowChunks = S::kAtoms * 8, kRowStep = kFillThreads / kRowChunks;
  static_assert(kRowStep % 8 == 0);
  // The same in all lanes in the compiler's eyes too: it serialises products in a path that might diverge.
  const bool fills = !S::kSplit || __shfl_sync(0xffffffffu, id / 128, 0) >= S::kConsumers / 128;
  const int fill_id = S::kSplit ? id % 128 : id;
  const int fill_row = fill_id / kRowChunks, fill_chunk = fill_id % kRowChunks;
  const uint32_t fill_to = fill_chunk / 8 * S::kAtomBytes + fill_row * 128 + ((fill_chunk % 8 ^ (fill_row & 7)) * 16);
  const int64_t x_step = kRowStep * args.x_stride;
  const auto fill_x = [&](int64_t first_row, int rows, int step, int slot) {
    constexpr int kEach = (kRows + kRowStep - 1) / kRowStep;
    if constexpr (kRaw) {
      const int64_t k = first_k + int64_t{step} * kStep;
      const T* const from = static_cast<const T*>(args.x) + first_row * args.x_stride + k;
      S::RawX::template fill<kFillThreads>(ring + slot * S::kStageBytes, from, args.x_stride, rows, args.d_in - k,
                                           k == 0 ? kRows : 0, k + kStep >= args.d_in ? kRows : 0);
      return;
    }
    if (kRows < kRowStep && fill_row >= kRows) return;
    const int64_t k = first_k + int64_t{step} * kStep + fill_chunk * 8;
    const T* const from = static_cast<const T*>(args.x) + (first_row + fill_row) * args.x_stride + k;
    const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
    fill_vectors<kEach, kRowStep, false>(ring + slot * S::kStageBytes + fill_to, kRowStep * 128, from, x_step, count,
                                         rows - fill_row);
  };

  const uint32_t received_barrier = shared_address(&barrier);
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(min(max(args.rows - row, int64_t{0}), int64_t{kRows}));
  };
  uint32_t item = blockIdx.x / plan.cluster;  // column by column, tile by tile
  const int64_t guess = int64_t{item / columns_blocks} * kRows;
  if (id == 0) {
    hopper::barrier_init(received_barrier, 1);
    if constexpr (S::kSplit) {
      for (int i = 0; i < S::kStages; ++i) {
        hopper::barrier_init(shared_address(full_barriers + i), 128);
        hopper::barrier_init(shared_address(empty_barriers + i), S::kConsumers / 32);
      }
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  if constexpr (S::kSplit) __syncthreads();  // the barriers are there

  int phase = 0;
  int ring_slot = 0, ring_phase = 0;  // of the ring, if a warpgroup of its own fills it
#pragma unroll 1
  for (bool is_first = true;; is_first = false, item += gridDim.x / plan.cluster, phase ^= 1) {
    SgmvTile<T> tile;
    // In the time that the tables take, the first steps of x are read where the tile is if the segments cover all rows
    // in order, as they mostly do. No more: W would have to wait behind them.
    const int guessed_steps = is_first && !args.early_reads ? min(kGuessedSteps, steps) : 0;
    const bool found = find_tile<kRows, kThreads>(args, item / columns_blocks, scratch, &tile, [&] {
#pragma unroll 1
      for (int i = 0; i < guessed_steps && fills; ++i) fill_x(guess, rows_from(guess), i, i);
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

    // Rows of the tile that this block adds up in the end.
    const int share = kRows / plan.cluster;
    const int owned = min(max(tile.rows - static_cast<int>(rank) * share, 0), share);
    if (plan.cluster > 1) {
      if (id == 0) hopper::barrier_expect(received_barrier, owned * (plan.cluster - 1) * kN * 4);
      if constexpr (S::kSumsBeside) {
        // There is room for sums. Waited for before the first remote store.
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      }
    }

    const bool w_vectors = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0;
    const auto fill_w = [&](int step, int slot) {
      const int64_t k0 = first_k + int64_t{step} * kStep;
      if constexpr (kRaw) {
        const uint32_t to = ring + slot * S::kStageBytes + S::RawX::kBytes;
        // Rows of W follow each other: only before the first and behind the last one there may be nothing.
        const int beginning = k0 == 0 && column == 0 ? 1 : 0;
        const int ending = k0 + kStep >= args.d_in && column + kN >= args.d_out ? 1 : 0;
        if constexpr (kInOut) {
          S::RawW::template fill<kFillThreads>(to, tile.w + k0 * args.d_out + column, args.d_out,
                                               static_cast<int>(min(args.d_in - k0, int64_t{kStep})), columns,
                                               beginning, ending);
        } else {
          S::RawW::template fill<kFillThreads>(to, tile.w + column * args.d_in + k0, args.d_in, columns, args.d_in - k0,
                                               beginning, ending);
        }
        return;
      }
      const uint32_t stage = ring + slot * S::kStageBytes + S::kXBytes;
      if constexpr (!kInOut) {
        // Rows are columns of y.
        if (kN < kRowStep && fill_row >= kN) return;
        constexpr int kEach = kN < kRowStep ? 1 : kN / kRowStep;
        const int64_t k = k0 + fill_chunk * 8;
        const T* from = tile.w + (column + fill_row) * args.d_in + k;
        const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
        if (w_vectors) {
          fill_vectors<kEach, kRowStep, false>(stage + fill_to, kRowStep * 128, from, kRowStep * args.d_in, count,
                                               columns - fill_row);
        } else {
          fill_words<kEach, kRowStep>(stage + fill_to, kRowStep * 128, reinterpret_cast<const uint16_t*>(from),
                                      kRowStep * args.d_in, count, columns - fill_row);
        }
      } else {
        // Rows are those of d_in; in units of up to 64 columns, whose rows lie one after the other.
        constexpr int kChunks = kN / 8, kWStep = kFillThreads / kChunks;
        constexpr int kUnitChunks = kChunks < 8 ? kChunks : 8;
        constexpr int kEach = kWStep > 64 ? 1 : 64 / kWStep;
        static_assert(kWStep % 8 == 0);
        const int row = fill_id / kChunks, chunk = fill_id % kChunks;
        if (kWStep > 64 && row >= 64) return;
        const int turn = kUnitChunks == 8 ? row & 7 : kUnitChunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
        const uint32_t to =
            stage + chunk / kUnitChunks * (64 * 128) + (row * kUnitChunks + (chunk % kUnitChunks ^ turn)) * 16;
        const int count = min(max(columns - chunk * 8, 0), 8);
        if (count == 0) return;
#pragma unroll
        for (int atom = 0; atom < S::kAtoms; ++atom) {
          const int64_t k = k0 + atom * 64;
          const int rows = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{64})) - row;
          const T* from = tile.w + (k + row) * args.d_out + column + chunk * 8;
          const uint32_t atom_to = to + atom * S::kAtomBytes;
          if (w_vectors) {
            fill_vectors<kEach, kWStep, true>(atom_to, kWStep * kUnitChunks * 16, from, kWStep * args.d_out, count,
                                              rows);
          } else {
            fill_words<kEach, kWStep>(atom_to, kWStep * kUnitChunks * 16, reinterpret_cast<const uint16_t*>(from),
                                      kWStep * args.d_out, count, rows);
          }
        }
      }
    };

    constexpr int kFirst = S::kSplit ? S::kStages : S::kAhead;  // steps that there is room for at the beginning
    if (is_first && args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < min(kFirst, steps) && fills; ++i) fill_w(i, i);
      grid_dependency_wait<kArch>();
    } else if (!guessed) {
      // The copies of a wrong guess end before others go to the same places: committed, as only those are waited for,
      // and in all threads, as which thread copies what of unaligned rows depends on where they begin.
      copy_commit();
      copy_wait<0>();
      if (guessed_steps > 0) {
        if constexpr (!S::kSplit) {
          __syncthreads();
        } else if (fills) {
          hopper::named_barrier_sync(1, 128);
        }
      }
    }
    if constexpr (!S::kSplit) {
#pragma unroll 1
      for (int i = 0; i < S::kAhead; ++i) {
        if (i < steps) {
          if (!is_first || !args.early_reads) fill_w(i, i);
          if (!guessed || i >= guessed_steps) fill_x(tile.row, tile.rows, i, i);
        }
        copy_commit();
      }
    }

    // The sums lie as [block of the cluster][16 columns][row][t], four to a t: of columns 2t, 2t+1, 2t+8 and 2t+9, as a
    // lane has them. The thread's share of what the block owns in the end: the same for every share / kThreads.
    constexpr int kAtOnce = kN / 16 < 4 ? kN / 16 : 4;
    const int items = share * (kN / 4);
    T* const y = static_cast<T*>(args.y) + (tile.row + rank * share) * args.y_stride + column;
    const auto row_of = [&](int item) { return item / 4 % share; };
    const auto column_of = [&](int item) { return item / 4 / share * 16 + item % 4 * 2; };
    Pair<T> old[kAtOnce][2];
    const auto load_old = [&](int first) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * kThreads;
        if (item >= items || row_of(item) >= owned) continue;
        const T* const at = y + row_of(item) * args.y_stride + column_of(item);
        old[i][0].load(at, columns - column_of(item));
        old[i][1].load(at + 8, columns - column_of(item) - 8);
      }
    };
    load_old(id);
    for (int at = id + kAtOnce * kThreads; at < items; at += kThreads) {
      if (row_of(at) < owned && column_of(at) < columns) prefetch_line(y + row_of(at) * args.y_stride + column_of(at));
    }

    float sums[kN / 2] = {}, saved[S::kLevels][kN / 2];
    // A part of the descriptors that is the same in all stages, and what the next 16 of d_in are further on.
    constexpr int kUnitBytes = kInOut && kN < 64 ? kN * 2 : 128;  // of a row of W in shared memory
    constexpr uint64_t kSwizzle = kUnitBytes == 128 ? 1 : kUnitBytes == 64 ? 2 : 3;
    constexpr uint32_t kWNext = (kInOut ? 16 * kUnitBytes : 32) >> 4;
    const uint64_t x_descriptor = hopper::wgmma_descriptor(shared + id / 128 * (64 * 128), 1, 16, 8 * 128);
    const uint64_t w_descriptor =
        hopper::wgmma_descriptor(shared + S::kXBytes, kSwizzle, kInOut ? 64 * 128 : 16, 8 * kUnitBytes);
    int part = 0, part_end = static_cast<int>(part_begin(1) - begin);
    const auto multiply = [&](int slot) {
      const uint32_t at = kRaw ? 0 : slot * (S::kStageBytes >> 4);
      const uint64_t a = x_descriptor + at, b = w_descriptor + at;
      hopper::products_fence();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        const int atom = k / 4 * (S::kAtomBytes >> 4);
        hopper::wgmma_m64k16<T, kN, kInOut>(sums, a + atom + k % 4 * 2, b + atom + k % 4 * kWNext);
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
    if constexpr (S::kSplit) {
      int slot = ring_slot, turn = ring_phase;
      const auto advance = [&] {
        if (++slot == S::kStages) slot = 0, turn ^= 1;
      };
      if (fills) {
#pragma unroll 1
        for (int step = 0; step < steps; ++step, advance()) {
          hopper::barrier_wait(shared_address(empty_barriers + slot), turn ^ 1);
          if (!is_first || !args.early_reads || step >= kFirst) fill_w(step, slot);
          if (!guessed || step >= guessed_steps) fill_x(tile.row, tile.rows, step, slot);
          hopper::barrier_arrive_copies(shared_address(full_barriers + slot));
        }
      } else {
        const auto release = [&](int slot) {
          if (lane == 0) hopper::barrier_arrive(shared_address(empty_barriers + slot));
        };
        int pending = -1;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, advance()) {
          hopper::barrier_wait(shared_address(full_barriers + slot), turn);
          hopper::fence_async_proxy();
          multiply(slot);
          hopper::products_wait<1>();
          if (pending >= 0) release(pending);
          pending = slot;
          if (step + 1 == part_end) {
            finish();
            release(pending);
            pending = -1;
            add_part(step + 1 == steps);
          }
        }
        finish();  // nothing is under way; but the compiler would put a wait of its own here
      }
      ring_slot = (ring_slot + steps) % S::kStages;
      ring_phase = turn;
    } else {
      int slot = 0, next_slot = S::kAhead;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copy_wait<S::kAhead - 1>();
        if constexpr (kRaw) {
          __syncthreads();
          const int64_t k = first_k + int64_t{step} * kStep;
          const uint32_t stage = ring + slot * S::kStageBytes;
          S::RawX::template spread<kThreads>(stage, static_cast<const T*>(args.x) + tile.row * args.x_stride,
                                             args.x_stride, tile.rows, args.d_in - k, [&](int row, int chunk) {
                                               return shared + chunk / 8 * S::kAtomBytes + row * 128 +
                                                      (chunk % 8 ^ (row & 7)) * 16;
                                             });
          if constexpr (kInOut) {
            S::RawW::template spread<kThreads>(
                stage + S::RawX::kBytes, tile.w + column, args.d_out,
                static_cast<int>(min(args.d_in - k, int64_t{kStep})), columns, [&](int row, int chunk) {
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
        }
        hopper::fence_async_proxy();
        __syncthreads();
        multiply(slot);
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
    }
    copy_wait<0>();
    if (plan.cluster > 1) {
      if constexpr (!S::kSumsBeside) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    } else if constexpr (!S::kSumsBeside) {
      __syncthreads();
    }

    const uint32_t received = shared + (S::kSumsBeside ? S::kRingBytes + S::kTailBytes : 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = id / 32 * 16 + h * 8 + lane / 4;
      if (row < tile.rows) {
        const uint32_t owner = row / share;
        const uint32_t at = received + (rank * (kN / 16) * share * 4 + row % share * 4 + lane % 4) * 16;
        const uint32_t to = hopper::remote_address(at, owner),
                       to_barrier = hopper::remote_address(received_barrier, owner);
#pragma unroll
        for (int q = 0; q < kN / 16; ++q) {
          const float4 v = {sums[q * 8 + h * 2], sums[q * 8 + h * 2 + 1], sums[q * 8 + 4 + h * 2],
                            sums[q * 8 + 4 + h * 2 + 1]};
          if (owner == rank) {
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at + q * share * 64), "f"(v.x), "f"(v.y),
                         "f"(v.z), "f"(v.w)
                         : "memory");
          } else {
            hopper::store_async(to + q * share * 64, v, to_barrier);
          }
        }
      }
    }
    __syncthreads();
    if (plan.cluster > 1) hopper::barrier_wait(received_barrier, phase);

    const float4* const parts = reinterpret_cast<const float4*>(memory + (received - shared));
    const auto add_up = [&](auto count) {
#pragma unroll 1
      for (int first = id; first < items; first += kAtOnce * kThreads) {
        if (first != id) load_old(first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int item = first + i * kThreads;
          if (item >= items || row_of(item) >= owned) continue;
          const float4 sum = tree_sum<decltype(count)::value>(parts + item, items);
          T* const at = y + row_of(item) * args.y_stride + column_of(item);
          old[i][0].add_to(at, columns - column_of(item), sum.x, sum.y);
          old[i][1].add_to(at + 8, columns - column_of(item) - 8, sum.z, sum.w);
        }
      }
    };
    switch (plan.cluster) {
      case 1:
        add_up(std::integral_constant<int, 1>{});
        break;
      case 2:
        add_up(std::integral_constant<int, 2>{});
        break;
      case 4:
        add_up(std::integral_constant<int, 4>{});
        break;
      case 8:
        add_up(std::integral_constant<int, 8>{});
        break;
      default:
        add_up(std::integral_constant<int, 16>{});
    }
    const uint32_t next = item + gridDim.x / plan.cluster;
    if (next >= plan.items || next / columns_blocks >= tile.tiles) return;
    __syncthreads();  // before the ring and the sums are written again
  }
#endif
}

}  // namespace punica::cuda
