// add_lora of float16 and bfloat16: shrink and expand of a tile of up to eight rows in one kernel, v on chip.
//
// A team of 1, 2, 4 or 8 blocks (a cluster) serves a slice of a tile. Each takes a share of K of the shrink and a share
// of the outputs of the expand; between the two the blocks' parts of v meet through distributed shared memory. Each
// warp has units of 2 KiB of weights in shared memory, which it alone fills (cp.async) and reads: first its units of A,
// then those of B. No barrier of the block stands between a copy and its use.
//
// Products are mma.m16n8k16 with weights as the first operand (rows: ranks, or outputs) and rows of the batch as
// columns of the second. The order of K within a product is free if both operands agree: of 32 neighbouring elements of
// K, two products, lane (g, t) = (lane / 4, lane % 4) takes the eight from 8t on, 16 bytes.
//
// The sums (the bits of a row follow from them, and they from h_in and the rank alone):
//   v: K comes in pieces of 64, in 64 leaves. Piece p belongs to leaf p % 64, which adds its pieces in order in one
//   accumulator of the products, from zero. Leaves j, j + 16, j + 32 and j + 48 are added in this order: group j. The
//   16 groups are added as a balanced tree of neighbours: first those of a warp, then those of a block, then those of a
//   team.
//   y: v as a pair of 16-bit numbers (add_lora.cuh), ranks in one product (up to 16) or in products of 16 in order, the
//   high numbers of each before the low ones.
// Up to h_in = 4096 a leaf is one piece. So even one row of rank 16 has work for 64 warps, and no product waits for
// more than three others.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora_find.cuh"
#include "src/cuda/lora/add_lora_general.cuh"
#include "src/cuda/lora/add_lora_plain.cuh"

namespace punica::cuda::fused_lora {

// Lines of x and y, by the last warp: before the wait nothing is known of the block's own rows, so the teams take rows
// in turn.
template <class T>
__device__ __forceinline__ void prefetch_rows(const Args& args) {
  if (threadIdx.x < kRingThreads - 32 || block_slice(args) > 0) return;
  constexpr int kLine = kLineBytes / sizeof(T);
  const int lane = threadIdx.x % 32, team_bits = args.team_bits;
  const bool of_y = lane >= 16;
  const char* const first = static_cast<const char*>(of_y ? args.y : args.x);
  const int64_t row_bytes = of_y ? args.y_row_bytes : args.x_row_bytes;
  const int length = of_y ? args.width : args.h_in;
  const uint32_t block = block_of_slice(args);
  const int begin = ((block & ((1 << team_bits) - 1)) * 16 + lane % 16) * kLine;
  for (int row = block >> team_bits; row < args.rows_32; row += args.slice_blocks >> team_bits) {
    for (int i = begin; i < length; i += 16 * kLine << team_bits)
      prefetch_line(first + row * row_bytes + i * sizeof(T));
  }
}

// ---- The kernel ----------------------------------------------------------------------------------------------------

// Finds what the block serves; false: nothing. On return num_slices and the slices are in shared.work, and one warp has
// rows for publish_rows(). A cluster has one team or several.
template <Arch kArch, class T, int kEach>
__device__ __forceinline__ bool begin_block(const Args& args, RingShared& shared, int* row) {
  if (args.early_reads) launch_dependents<kArch>();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kArch == Arch::kSm90) {
    if (threadIdx.x == 32) {
      hopper::barrier_init(shared_address(&shared.received[0]), 1);
      hopper::barrier_init(shared_address(&shared.received[1]), 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
  }
#endif
  prefetch_rows<T>(args);
  if (!args.early_reads) grid_dependency_wait<kArch>();
  *row = find_tile<T, kEach>(args, block_slice(args), &shared.scratch, &shared.work);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kArch == Arch::kSm90) {
    // Waited for before the first send. The fence above is all that it has to order.
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
#endif
  __syncthreads();
  // Where each multiprocessor has several blocks, the next kernel's first ones would take places beside them, and its
  // others those that are left, so that some multiprocessors get more to do than others.
  if (!args.early_reads && !shared.work.many) launch_dependents<kArch>();
  if (shared.work.num_slices > 0) return true;
  if (args.early_reads) grid_dependency_wait<kArch>();
  return false;
}

template <Arch kArch, class T, bool kVectors>
__device__ __forceinline__ void general_way(const Args& args, RingShared& shared, int row) {
  if (row != kNotFound) publish_rows(args, row, &shared.work);
  __syncthreads();
  if (shared.work.count == 0) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }
  const int team_bits = shared.work.team_bits;
  general_block<kArch, T, kVectors>(args, shared, team_bits, static_cast<int>(blockIdx.x) & ((1 << team_bits) - 1));
}

// Rows of x and y are whole, aligned pieces of 16 bytes, and so is each slice of y. kLong: h_in is more than 4096.
// kFewRanks: max_rank is 16 or less.
template <Arch kArch, class T, bool kLong, bool kFewRanks>
__global__ void __launch_bounds__(kRingThreads, kArch == Arch::kSm90 ? 3 : 2)
    add_lora_plain_kernel(const __grid_constant__ Args args, const int fragment_bytes) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(128) unsigned char memory[];
    RingShared& shared = *reinterpret_cast<RingShared*>(memory);
    int row;
    if (!begin_block<kArch, T, 2>(args, shared, &row)) return;
    if (!shared.work.plain) [[unlikely]] {
      general_way<kArch, T, true>(args, shared, row);
      return;
    }
    const int warp = threadIdx.x / 32, rank = shared.work.slices[0].rank;
    const uint32_t receive = shared_address(memory + kHeadBytes);
    const auto run = [&]<int kTeamBits, int kTileBits>(std::integral_constant<int, kTeamBits>,
                                                       std::integral_constant<int, kTileBits>) {
      PlainBlock<kArch, T, kTeamBits, kTileBits, kLong> block = {
          args,
          shared.work,
          shared.received,
          receive,
          receive + fragment_bytes + warp * (kUnitBytes * plain_depth(args.max_team_bits)),
          static_cast<int>(blockIdx.x) & ((1 << kTeamBits) - 1),
          warp,
          static_cast<int>(threadIdx.x % 32)};
      block.run([&] {
        if (row != kNotFound) publish_rows(args, row, &shared.work);
        if (args.early_reads) grid_dependency_wait<kArch>();
        __syncthreads();
      });
    };
    const auto run_team = [&]<int kTeamBits>(std::integral_constant<int, kTeamBits> team) {
      if (kFewRanks || rank <= 16) {
        run(team, std::integral_constant<int, 0>{});
      } else if constexpr (!kFewRanks) {
        if (rank <= 32) {
          run(team, std::integral_constant<int, 1>{});
        } else {
          run(team, std::integral_constant<int, 2>{});
        }
      }
    };
    if constexpr (kArch == Arch::kSm80) {
      run_team(std::integral_constant<int, 0>{});
    } else if (shared.work.team_bits == 3) {
      run_team(std::integral_constant<int, 3>{});
    } else if (shared.work.team_bits == 2) {
      run_team(std::integral_constant<int, 2>{});
    } else if constexpr (kFewRanks) {
      run_team(std::integral_constant<int, 1>{});
    }
  }
}

template <Arch kArch, class T>
__global__ void __launch_bounds__(kRingThreads, 2) add_lora_general_kernel(const __grid_constant__ Args args) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(128) unsigned char memory[];
    RingShared& shared = *reinterpret_cast<RingShared*>(memory);
    int row;
    if (begin_block<kArch, T, 1>(args, shared, &row)) general_way<kArch, T, false>(args, shared, row);
  }
}

}  // namespace punica::cuda::fused_lora
