// add_lora of float16 and bfloat16: shrink and expand of a tile of up to eight rows in one kernel, v on chip.
//
// A team of 1, 2, 4 or 8 blocks (neighbours in a cluster) serves a tile. Each takes a share of K of the shrink and a
// share of the outputs of the expand; between the two the blocks' parts of v meet through distributed shared memory.
// Each warp has a ring of units of 2 KiB of weights in shared memory, which it alone fills (cp.async) and reads: first
// its units of A, then those of B, slice after slice. So B is on its way while v is not there yet, and what the next
// slice needs while this one is computed; no barrier of the block stands between a copy and its use.
//
// Products are mma.m16n8k16 with weights as the first operand (rows: ranks, or outputs) and rows of the batch as
// columns of the second. The order of K within a product is free if both operands agree: of 32 neighbouring elements of
// K, two products, lane (g, t) = (lane / 4, lane % 4) takes the eight from 8t on, 16 bytes.
//
// The sums (the bits of a row follow from them, and they from h_in and the rank alone):
//   v: K comes in pieces of 64. Piece p belongs to chain p % 16, which adds its pieces in order in one accumulator. The
//   chains are added as a balanced tree of neighbours: first those of a block, then those of a team.
//   y: v as a pair of 16-bit numbers (add_lora.cuh), ranks in one product (up to 16) or in products of 16 in order, the
//   high numbers of each before the low ones.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora_find.cuh"
#include "src/cuda/lora/add_lora_general.cuh"
#include "src/cuda/lora/add_lora_plain.cuh"

namespace punica::cuda::fused_lora {

// ---- The kernel ----------------------------------------------------------------------------------------------------

// Grid: blocks in clusters of 1 << cluster_bits. kPlain: rows of x and y are whole, aligned pieces of 16 bytes, and so
// is each slice of y.
template <Arch kArch, class T, bool kPlain>
__global__ void __launch_bounds__(kRingThreads, kPlain && kArch == Arch::kSm90 ? 3 : 2)
    add_lora_ring_kernel(const __grid_constant__ Args args, const int cluster_bits, const int min_team_bits,
                         const int fragment_bytes) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(128) unsigned char memory[];
    RingShared& shared = *reinterpret_cast<RingShared*>(memory);
    if (args.early_reads) launch_dependents<kArch>();
    const int cluster_rank = static_cast<int>(blockIdx.x) & ((1 << cluster_bits) - 1);
    const int cluster = static_cast<int>(blockIdx.x) >> cluster_bits;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (kArch == Arch::kSm90) {
      if (cluster_bits > 0) {
        if (threadIdx.x == 32) {
          hopper::barrier_init(shared_address(&shared.received[0]), 1);
          hopper::barrier_init(shared_address(&shared.received[1]), 1);
          asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
        // Waited for before the first send. The fence above is all that it has to order.
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
      }
    }
#endif
    if (!args.early_reads) grid_dependency_wait<kArch>();
    // The largest team for which there are blocks enough.
    const unsigned blocks = gridDim.x;
    const auto team_bits_of = [=](uint32_t tiles) {
      int bits = cluster_bits;
      while (bits > min_team_bits && tiles > blocks >> bits) --bits;
      return bits;
    };
    const int row = find_tile<T>(
        args, &shared.scratch, &shared.work,
        [=](uint32_t tiles) {
          const int bits = team_bits_of(tiles);
          return static_cast<uint32_t>((cluster << (cluster_bits - bits)) + (cluster_rank >> bits));
        });
    __syncthreads();
    if (!args.early_reads) launch_dependents<kArch>();
    if (shared.work.num_slices == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const int team_bits = team_bits_of(shared.scratch.tiles), team_rank = cluster_rank & ((1 << team_bits) - 1);
    if (kPlain && shared.work.plain) {
      const int warp = threadIdx.x / 32;
      const uint32_t fragments = shared_address(memory + kHeadBytes);
      PlainBlock<kArch, T> block = {args,
                                    shared.work,
                                    shared.received,
                                    fragments,
                                    fragments + fragment_bytes + warp * (kUnitBytes * kPlainDepth),
                                    cluster_bits,
                                    team_bits,
                                    team_rank,
                                    warp,
                                    static_cast<int>(threadIdx.x % 32)};
      block.run([&] {
        if (row != kNotFound) publish_rows(args, row, &shared.work);
        if (args.early_reads) grid_dependency_wait<kArch>();
        __syncthreads();
      });
    } else {
      if (row != kNotFound) publish_rows(args, row, &shared.work);
      __syncthreads();
      if (shared.work.count == 0) {
        if (args.early_reads) grid_dependency_wait<kArch>();
        return;
      }
      general_block<kArch, T, kPlain>(args, shared, team_bits, team_rank);
    }
  }
}

}  // namespace punica::cuda::fused_lora
