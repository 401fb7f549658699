// sgmv for float16 and bfloat16 on the sm_90 path where d_in is large, d_out from 17 to 512, and there are many rows at
// multiples of 16 bytes: as sgmv_shrink.cuh, with the same sums, but tiles of 64 to 192 rows and up to 128 columns. The
// larger a tile is, the less often x and W are read from the second-level cache, which bounds the time.
//
// A block has one tile; three warpgroups or fewer multiply 64 rows each, one more fills the ring.
#pragma once

#include "src/cuda/lora/sgmv_shrink.cuh"

namespace punica::cuda {

// kWarpgroups: of 64 rows each. kWide: products along the columns. kLevels: of the tree of parts within a block.
template <int kN, int kWide, int kWarpgroups, int kLevels>
struct Tall {
  static constexpr int kColumns = kN * kWide, kRows = 64 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups, kFillThreads = 128, kThreads = kConsumers + kFillThreads;
  // Registers of a thread that fills and of one that multiplies, where they do not get the same.
  static constexpr int kFillRegisters = 56, kMultiplyRegisters = kWarpgroups == 3 ? 152 : 224;
  // A step is of 64 of d_in, 128 bytes.
  static constexpr int kXBytes = kRows * 128, kWBytes = kColumns * 128, kStageBytes = kXBytes + kWBytes;
  static constexpr int kMostStages = (225 << 10) / kStageBytes, kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSaved = kLevels > 0 ? kLevels : 1;
  static_assert(kRows * kColumns * 4 <= kRingBytes);
};

template <Arch kArch, class T, bool kInOut, int kN, int kWide, int kWarpgroups, int kLevels>
__global__ void __launch_bounds__(Tall<kN, kWide, kWarpgroups, kLevels>::kThreads, 1)
    sgmv_tall(const SgmvArgs args, const ShrinkPlan plan) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Tall<kN, kWide, kWarpgroups, kLevels>;
  constexpr int kRows = S::kRows, kColumns = S::kColumns, kStages = S::kStages;
  constexpr int kThreads = S::kThreads, kConsumers = S::kConsumers;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier, full_barriers[kStages], empty_barriers[kStages];
  launch_dependents<kArch>();

  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const uint32_t rank = blockIdx.x % plan.cluster, item = blockIdx.x / plan.cluster;
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kColumns - 1) / kColumns);
  // Parts of d_in begin where those of sgmv_shrink do, at multiples of 128.
  const int64_t all_pairs = (args.d_in + 127) / 128;
  const int own_parts = plan.parts / plan.cluster, first_part = rank * own_parts;
  const auto part_begin = [&](int part) { return all_pairs * (first_part + part) / plan.parts * 2; };
  const int64_t begin = part_begin(0);
  const int steps = static_cast<int>(part_begin(own_parts) - begin);
  const int64_t first_k = begin * 64;
  const uint32_t shared = shared_address(memory);
  const int group = static_cast<int>(__shfl_sync(0xffffffffu, id / 128, 0));
  const bool fills = group == kWarpgroups;

  const int fill_id = id % 128, fill_row = fill_id / 8, fill_chunk = fill_id % 8;
  constexpr int kRowStep = 16;
  constexpr int kPrefetched = 4;  // lines of a row
  const uint32_t fill_to = fill_row * 128 + ((fill_chunk ^ (fill_row & 7)) * 16);
  const auto fill_x = [&](int64_t first_row, int rows, int step, int slot) {
    const int64_t k = first_k + int64_t{step} * 64 + fill_chunk * 8;
    const T* const from = static_cast<const T*>(args.x) + (first_row + fill_row) * args.x_stride + k;
    const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
    fill_vectors<kRows / kRowStep, kRowStep, false>(shared + slot * S::kStageBytes + fill_to, kRowStep * 128, from,
                                                    kRowStep * args.x_stride, count, rows - fill_row);
  };
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(min(max(args.rows - row, int64_t{0}), int64_t{kRows}));
  };
  const uint32_t received_barrier = shared_address(&barrier);
  if (id == 0) {
    hopper::barrier_init(received_barrier, 1);
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(shared_address(full_barriers + i), 128);
      hopper::barrier_init(shared_address(empty_barriers + i), kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const int64_t guess = int64_t{item / columns_blocks} * kRows;
  // Before the wait the second-level cache is asked for the first columns of x where the tile is if the segments cover
  // all rows in order, in the time in which the last blocks of the kernel before end. That is no read: all writes end
  // up there.
#pragma unroll
  for (int i = 0; i < (kRows * kPrefetched + kThreads - 1) / kThreads; ++i) {
    const int line = id + i * kThreads, row = line / kPrefetched, k = line % kPrefetched * 64;
    if (row < rows_from(guess) && first_k + k < args.d_in && k < steps * 64) {
      prefetch_line(static_cast<const T*>(args.x) + (guess + row) * args.x_stride + first_k + k);
    }
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  __syncthreads();

  SgmvTile<T> tile;
  const int guessed_steps = !args.early_reads ? min(1, steps) : 0;
  const bool found = find_tile<kRows, kThreads>(args, item / columns_blocks, scratch, &tile, [&] {
#pragma unroll 1
    for (int i = 0; i < guessed_steps && fills; ++i) fill_x(guess, rows_from(guess), i, i);
  });
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    copy_commit();
    copy_wait<0>();
    return;
  }
  const bool guessed = guessed_steps > 0 && tile.row == guess && tile.rows <= rows_from(guess);
  const int64_t column = int64_t{item % columns_blocks} * kColumns;
  const int columns = static_cast<int>(min(args.d_out - column, int64_t{kColumns}));
  const int share = kRows / plan.cluster;
  const int owned = min(max(tile.rows - static_cast<int>(rank) * share, 0), share);

  if (fills) {
    if constexpr (kWarpgroups > 1) hopper::lower_registers<S::kFillRegisters>();
    const bool w_vectors = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0;
    const auto fill_w = [&](int step, int slot) {
      const int64_t k0 = first_k + int64_t{step} * 64;
      const uint32_t stage = shared + slot * S::kStageBytes + S::kXBytes;
      if constexpr (!kInOut) {
        constexpr int kEach = kColumns / kRowStep;
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
        constexpr int kChunks = kColumns / 8, kWStep = 128 / kChunks;
        constexpr int kUnitChunks = kChunks < 8 ? kChunks : 8;
        constexpr int kEach = 64 / kWStep;
        static_assert(kWStep % 8 == 0 && kWStep <= 64);
        const int row = fill_id / kChunks, chunk = fill_id % kChunks;
        const int turn = kUnitChunks == 8 ? row & 7 : kUnitChunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
        const uint32_t to =
            stage + chunk / kUnitChunks * (64 * 128) + (row * kUnitChunks + (chunk % kUnitChunks ^ turn)) * 16;
        const int count = min(max(columns - chunk * 8, 0), 8);
        if (count == 0) return;
        const int rows = static_cast<int>(min(max(args.d_in - k0, int64_t{0}), int64_t{64})) - row;
        const T* from = tile.w + (k0 + row) * args.d_out + column + chunk * 8;
        if (w_vectors) {
          fill_vectors<kEach, kWStep, true>(to, kWStep * kUnitChunks * 16, from, kWStep * args.d_out, count, rows);
        } else {
          fill_words<kEach, kWStep>(to, kWStep * kUnitChunks * 16, reinterpret_cast<const uint16_t*>(from),
                                    kWStep * args.d_out, count, rows);
        }
      }
    };
    if (args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < min(kStages, steps); ++i) fill_w(i, i);
      grid_dependency_wait<kArch>();
    } else if (!guessed && guessed_steps > 0) {
      copy_commit();
      copy_wait<0>();
      hopper::named_barrier_sync(1, 128);
    }
    int slot = 0, turn = 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      hopper::barrier_wait(shared_address(empty_barriers + slot), turn);
      if (!args.early_reads || step >= kStages) fill_w(step, slot);
      if (!guessed || step >= guessed_steps) fill_x(tile.row, tile.rows, step, slot);
      hopper::barrier_arrive_copies(shared_address(full_barriers + slot));
      if (++slot == kStages) slot = 0, turn ^= 1;
    }
    copy_commit();
    copy_wait<0>();
    if (plan.cluster > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    }
    return;
  }
  if constexpr (kWarpgroups > 1) hopper::raise_registers<S::kMultiplyRegisters>();
  if (args.early_reads) grid_dependency_wait<kArch>();
  if (id == 0 && plan.cluster > 1) hopper::barrier_expect(received_barrier, owned * (plan.cluster - 1) * kColumns * 4);

  // As in sgmv_shrink: [block of the cluster][16 columns][row][t].
  const int items = share * (kColumns / 4);
  T* const y = static_cast<T*>(args.y) + (tile.row + rank * share) * args.y_stride + column;
  const auto row_of = [&](int item) { return item / 4 % share; };
  const auto column_of = [&](int item) { return item / 4 / share * 16 + item % 4 * 2; };
  for (int at = id; at < items; at += kConsumers) {
    if (row_of(at) < owned && column_of(at) < columns) prefetch_line(y + row_of(at) * args.y_stride + column_of(at));
  }

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
    if (lane == 0) hopper::barrier_arrive(shared_address(empty_barriers + slot));
  };
  const auto pin_sums = [&] {
#pragma unroll
    for (int m = 0; m < kWide; ++m) hopper::pin(sums[m]);
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    hopper::barrier_wait(shared_address(full_barriers + slot), turn);
    hopper::fence_async_proxy();
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
  if (plan.cluster > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    hopper::named_barrier_sync(2, kConsumers);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = id / 32 * 16 + h * 8 + lane / 4;
    if (row < tile.rows) {
      const uint32_t owner = row / share;
      const uint32_t at = shared + (rank * (kColumns / 16) * share * 4 + row % share * 4 + lane % 4) * 16;
      const uint32_t to = hopper::remote_address(at, owner),
                     to_barrier = hopper::remote_address(received_barrier, owner);
#pragma unroll
      for (int q = 0; q < kColumns / 16; ++q) {
        const float (&sum)[kN / 2] = sums[q / (kN / 16)];
        const int i = q % (kN / 16) * 8 + h * 2;
        const float4 v = {sum[i], sum[i + 1], sum[i + 4], sum[i + 5]};
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
  hopper::named_barrier_sync(2, kConsumers);
  if (plan.cluster > 1) hopper::barrier_wait(received_barrier, 0);
  const float4* const parts = reinterpret_cast<const float4*>(memory);
  const auto add_up = [&](auto count) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = id; first < items; first += kAtOnce * kConsumers) {
      Pair<T> old[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * kConsumers;
        if (item >= items || row_of(item) >= owned) continue;
        const T* const at = y + row_of(item) * args.y_stride + column_of(item);
        old[i][0].load(at, columns - column_of(item));
        old[i][1].load(at + 8, columns - column_of(item) - 8);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * kConsumers;
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
    default:
      add_up(std::integral_constant<int, 8>{});
  }
#endif
}

}  // namespace punica::cuda
