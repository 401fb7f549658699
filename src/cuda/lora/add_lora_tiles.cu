// add_lora of float16 and bfloat16 on sm_90 for many rows an adapter, ranks up to 64: x is read once, y read and
// written once, v in between on chip. The arithmetic is that of add_lora_ring.cuh, term by term.
//
// Clusters of two blocks, one block to a multiprocessor, take tiles of up to 64 rows of a segment, one after the other.
// Eight warps of a block compute, in teams of two that take half of the rows each; four copy, each for a team, into a
// ring in shared memory: for each piece of K of the chains of the team a stage of x (64 rows x 128 bytes) and A; then
// for each strip of 64 columns a stage of y and B. The copies do not wait for the sums, so that y, and x of the next
// tile, are on their way while the chains' sums meet, first in a block, then in the cluster. As little as can be is in
// local memory, which answers late while the rings are filled.
#include <algorithm>

#include "src/cuda/lora/add_lora_tiles_compute.cuh"
#include "src/cuda/lora/add_lora_tiles_copy.cuh"

namespace punica::cuda::fused_lora {
namespace {

using namespace tiles;

// From here on this is faster than add_lora_ring.cuh, which takes less than this with 1024 rows.
constexpr int64_t kManyRows = 2048;
// And from here on memory is what bounds it, so that asking early for x helps. Where half of the multiprocessors have a
// tile it costs 0.3 to 0.9 us instead.
[[maybe_unused]] constexpr int64_t kPrefetchRows = 3072;
constexpr int kClusterBits = 1;
// Of a thread that copies, and of one that computes, where they are not equal: together what the block has.
[[maybe_unused]] constexpr int kCopyRegisters = 104;
[[maybe_unused]] constexpr int kComputeRegisters = 200;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What is looked for first is in L2 then, where the calls before may have left no room for it: the first lines of the
// tables, and of `order` what the tile has if segments are in order and have whole tiles.
__device__ __forceinline__ void prefetch_tables(const Args& args, int warp, int lane) {
  const auto prefetch = [&](const void* table, int64_t first, int64_t bytes) {
    first += lane * kLineBytes;
    if (first < bytes) prefetch_line(static_cast<const char*>(table) + first);
  };
  const int64_t adapters = args.num_adapters, slices = args.num_slices;
  if (warp == 0) prefetch(args.segment_start, 0, 4 * (int64_t{args.max_segments} + 1));
  if (warp == 1) prefetch(args.segment_adapter, 0, 4 * int64_t{args.max_segments});
  if (warp == 2) prefetch(args.a_ptr, 0, 8 * slices * adapters);
  if (warp == 3) prefetch(args.b_ptr, 0, 8 * slices * adapters);
  if (warp == 4) prefetch(args.ranks, 0, 4 * ((slices - 1) * args.rank_stride + adapters));
  if (warp == 5) prefetch(args.scales, 0, 4 * ((slices - 1) * args.scale_stride + adapters));
  if (warp == 6 && lane < 3) {
    prefetch(args.order, int64_t{blockIdx.x >> kClusterBits} * (4 * kRows), 4 * int64_t{args.capacity});
  }
}

// Of x the pieces of K that the block asks for first, into L2: while the kernels ahead end and this one looks for its
// tile, memory has nothing else to do. row_of(i): row i of the tile, or what may be that; -1: none.
template <class S, class RowOf>
__device__ __forceinline__ void prefetch_x(const Args& args, int rank, RowOf row_of) {
  if (args.rows < kPrefetchRows) return;
  constexpr int kPieces = kTeams * S::kPrefetchStages;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int team = i % kTeams, stage = i % kPieces / kTeams;
    const int leaf = (rank * kTeams + team) * S::kTeamChains + stage / args.leaf_pieces * kChains;
    const int piece = leaf + stage % args.leaf_pieces * kLeaves;
    const int64_t row = row_of(i / kPieces);
    if (row >= 0 && row < args.rows && piece * kPiece < args.h_in) {
      prefetch_line(static_cast<const char*>(args.x) + 2 * (row * args.x_stride + piece * kPiece));
    }
  }
}
#endif

// Grid: clusters, a tile each. Rows of x and y and what slices begin and end with are multiples of 16 bytes.
// kT: tiles of 16 ranks of a pass, at most. kAnyLength: otherwise h_in is at most kLeaves pieces.
template <Arch kArch, class T, int kT, bool kAnyLength>
__global__ void __launch_bounds__(kThreads, 1) add_lora_tiles_kernel(const __grid_constant__ Args args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kT, kClusterBits, kAnyLength>;
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (args.early_reads) launch_dependents<kArch>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kWarps) {
    // Of the ring that the warp fills.
    const int of = warp - kWarps;
    if (lane < S::kStages) {
      hopper::barrier_init(shared_address(&shared.rings[of].full[lane]), 32);
      hopper::barrier_init(shared_address(&shared.rings[of].empty[lane]), 64);
    }
    if (of == kCopyWarps - 1 && lane == 0) {
      hopper::barrier_init(shared_address(&shared.received), 1);
      hopper::barrier_init(shared_address(&shared.drained), kGroups * (S::kBlocks - 1));
      for (int i = 0; i < 2; ++i) {
        hopper::barrier_init(shared_address(&shared.ready[i]), 32);
        hopper::barrier_init(shared_address(&shared.done[i]), 32 * (kWarps + kCopyWarps));
      }
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  // Waited for below. What it is there for is released by the fence; to release more is to wait for all memory.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  if (!args.early_reads) {
    prefetch_tables(args, warp, lane);
    // Where every row has an adapter, some block takes these rows and pieces, whatever their order.
    const int64_t first = int64_t{blockIdx.x >> kClusterBits} * kRows;
    prefetch_x<S>(args, blockIdx.x & (S::kBlocks - 1), [&](int i) { return first + i; });
    grid_dependency_wait<kArch>();
  }
  const auto choose = [&](uint32_t) { return blockIdx.x >> kClusterBits; };
  if (AtOnce::can(args)) {
    if (warp == 0) {
      const AtOnce tables(args, (blockIdx.x >> kClusterBits) * kRows);
      find_work_in<T, kRows, AtOnce::kMostSegments / 32>(args, &shared.scratch.tiles, &shared.jobs[0].work, choose,
                                                         tables);
    }
    __syncthreads();
  } else {
    find_work<T>(args, &shared.scratch, &shared.jobs[0].work, choose);
  }
  if (args.early_reads) {
    const Work<kRows>& work = shared.jobs[0].work;
    prefetch_x<S>(args, blockIdx.x & (S::kBlocks - 1), [&](int i) { return i < work.count ? work.rows[i] : -1; });
    grid_dependency_wait<kArch>();
  } else {
    launch_dependents<kArch>();
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const uint32_t tiles = shared.scratch.tiles, tile = blockIdx.x >> kClusterBits, clusters = gridDim.x >> kClusterBits;
  if (tile >= tiles) return;
  if (threadIdx.x < kRows) place_rows<T>(args, &shared.jobs[0], static_cast<int>(threadIdx.x));
  if (threadIdx.x == kThreads - 1) plan<kT>(&shared.jobs[0]);
  __syncthreads();
  // Made anew on either side, from a number of the thread that the compiler does not know to be the same: otherwise it
  // would keep what follows from it in registers, and then in local memory, from here on.
  const auto block = [&] {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    const int number = thread / 32, team = number < kWarps ? number / 2 : number - kWarps;
    unsigned char* const parts = memory + kHeadBytes;
    return Block{args,
                 shared,
                 reinterpret_cast<float4*>(parts),
                 reinterpret_cast<float4*>(parts + S::kPartBytes),
                 shared_address(parts + S::kPartBytes + S::kReceiveBytes) + team * (S::kStageBytes * S::kStages),
                 shared_address(&shared.rings[team]),
                 static_cast<int>(blockIdx.x) & (S::kBlocks - 1),
                 tile,
                 clusters,
                 tiles,
                 team,
                 number % 2,
                 thread % 32,
                 static_cast<uint32_t>(args.num_slices) / (kMaxLoraSlices + 1)};
  };
  if (warp >= kWarps) {
    if constexpr (kT > 1) hopper::lower_registers<kCopyRegisters>();
    const Block b = block();
    Producer<T, S> producer = {b};
    producer.template run<kT>();
  } else {
    if constexpr (kT > 1) hopper::raise_registers<kComputeRegisters>();
    const Block b = block();
    Consumer<T, S, kT> consumer = {b};
    consumer.run();
  }
  if (tiles > clusters) {
    // What one of the cluster has read of the last tile may still be on its way to the other.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

template <class T, int kT, bool kAnyLength>
Status launch(const Launcher& launcher, const Args& args) {
  LaunchShape shape;
  shape.cluster = 1u << kClusterBits;
  const int64_t clusters = std::max(launcher.num_multiprocessors() >> kClusterBits, 1);
  shape.grid = static_cast<unsigned>(std::min(max_tiles(args, kRows), clusters) << kClusterBits);
  shape.block = kThreads;
  shape.shared_bytes = Shape<kT, kClusterBits, kAnyLength>::kSharedBytes;
  return launcher.launch<add_lora_tiles_kernel<Arch::kSm90, T, kT, kAnyLength>>(shape, args);
}

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  // Ranks of all slices in one pass, if they may fit.
  const int tiles = args.num_slices * (args.max_rank <= 16 ? 1 : (args.max_rank + 31) / 32 * 2);
  if (tiles == 1) return launch<T, 1, true>(launcher, args);
  if (tiles == 2) return launch<T, 2, true>(launcher, args);
  return args.h_in <= kLeaves * kPiece ? launch<T, 4, false>(launcher, args) : launch<T, 4, true>(launcher, args);
}

}  // namespace

bool is_tiles(const Launcher& launcher, const Args& args) {
  bool aligned = args.x_vectors && args.y_vectors && args.h_in % 8 == 0;
  for (int s = 0; s <= args.num_slices; ++s) aligned = aligned && args.slice_begin[s] % 8 == 0;
  const int64_t segments = std::min<int64_t>(args.max_segments, args.num_adapters + 1);
  return launcher.arch == Arch::kSm90 && aligned && args.max_rank <= kRanks && args.rows >= kManyRows &&
         args.rows >= 8 * segments;
}

Status launch_tiles(const Launcher& launcher, DType dtype, const Args& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
