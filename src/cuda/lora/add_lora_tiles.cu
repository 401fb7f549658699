// add_lora of float16 and bfloat16 on sm_90 for many rows an adapter, ranks up to 64: x is read once, y read and
// written once, v in between on chip. The arithmetic is that of add_lora_ring.cuh, term by term.
//
// A cluster serves a tile of up to 64 rows of a segment. A block has eight warps that compute, and for each of them one
// that copies what it needs into a ring of units of 2 KiB in shared memory: first, for the chains of pieces of K that
// are the warp's, units of A and of x; then, strip by strip of 64 columns, units of B and of y. The copies do not wait
// for the sums, so that memory goes on while the chains' sums meet, first in a block, then in the cluster.
#include <algorithm>

#include "src/cuda/lora/add_lora_tiles.cuh"

namespace punica::cuda::fused_lora {
namespace {

using namespace tiles;
#ifndef TILES_BITS
#define TILES_BITS 1
#endif

// From here on the tiles of this kernel fill the device.
#ifdef TILES_FEWEST
constexpr int64_t kManyRows = TILES_FEWEST;
#else
constexpr int64_t kManyRows = 2048;
#endif
// Of a thread that copies, and of one that computes.
#ifndef TILES_CR
#define TILES_CR 64
#endif
constexpr int kCopyRegisters = TILES_CR, kComputeRegisters = (480 - TILES_CR) / 4;

// Grid: clusters, a tile each. Rows of x and y and what slices begin and end with are multiples of 16 bytes.
template <Arch kArch, class T, int kT, int kClusterBits>
__global__ void __launch_bounds__(kThreads, 1) add_lora_tiles_kernel(const __grid_constant__ Args args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kT, kClusterBits>;
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (args.early_reads) launch_dependents<kArch>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kWarps) {
    // Of the rings that the warp fills.
    const int of = warp - kWarps;
    if (lane < S::kRowStages) {
      hopper::barrier_init(shared_address(&shared.rows[of].full[lane]), 32);
      hopper::barrier_init(shared_address(&shared.rows[of].empty[lane]), 4);
    }
    if (lane < S::kWeightUnits) {
      hopper::barrier_init(shared_address(&shared.weights[of].full[lane]), 32);
      hopper::barrier_init(shared_address(&shared.weights[of].empty[lane]), 4);
    }
    if (of == kCopyWarps - 1 && lane == 0) {
      hopper::barrier_init(shared_address(&shared.received), 1);
      hopper::barrier_init(shared_address(&shared.drained), kGroups * (S::kBlocks - 1));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // waited for before the first send
#ifdef TILES_PREFETCH
  {
    // x of the tile, if the segments cover all rows in order, as they mostly do.
    constexpr int kLines = S::kBlockChains;  // of a row, of a round of chains
    const int64_t first = int64_t{blockIdx.x >> kClusterBits} * kRows;
    for (int i = threadIdx.x; i < TILES_PREFETCH * kLines * kRows; i += kThreads) {
      const int round = i / (kLines * kRows), row = i / kLines % kRows, line = i % kLines;
      const int k = (round * kChains + (blockIdx.x & (S::kBlocks - 1)) * kLines + line) * kPiece;
      if (first + row < args.rows && k < args.h_in) {
        prefetch_line(static_cast<const T*>(args.x) + (first + row) * args.x_stride + k);
      }
    }
  }
#endif
  if (!args.early_reads) grid_dependency_wait<kArch>();
  find_work<T>(args, &shared.scratch, &shared.work, [&](uint32_t) { return blockIdx.x >> kClusterBits; });
  if (args.early_reads) {
    grid_dependency_wait<kArch>();
  } else {
    launch_dependents<kArch>();
  }
  if (shared.work.count == 0) return;
  if (threadIdx.x < kRows) {
    const int64_t row = static_cast<int>(threadIdx.x) < shared.work.count ? shared.work.rows[threadIdx.x] : 0;
    shared.x_at[threadIdx.x] = row * args.x_stride * static_cast<int64_t>(sizeof(T));
    shared.y_at[threadIdx.x] = row * args.y_stride * static_cast<int64_t>(sizeof(T));
  }
  if (threadIdx.x == kThreads - 1) plan<kT>(&shared);
  __syncthreads();
  // What copies for a quad has the number of its first warp.
  const int of = warp < kWarps ? warp : 4 * (warp - kWarps), quad = of / 4;
  unsigned char* const parts = memory + kHeadBytes;
  const uint32_t weights = shared_address(parts + S::kPartBytes + S::kReceiveBytes);
  const Block b = {args,
                   shared,
                   reinterpret_cast<float4*>(parts),
                   reinterpret_cast<float4*>(parts + S::kPartBytes),
                   weights + quad * (S::kWeightUnits * S::kQuadTeams * kUnitBytes),
                   shared_address(&shared.weights[quad]),
                   weights + static_cast<uint32_t>(S::kWeightBytes) + quad * (S::kRowStages * 4 * kUnitBytes),
                   shared_address(&shared.rows[quad]),
                   static_cast<int>(blockIdx.x) & (S::kBlocks - 1),
                   of / S::kRowParts,
                   quad * S::kQuadTeams,
                   of % S::kRowParts,
                   of % 4,
                   lane,
                   static_cast<uint32_t>(args.num_slices) / (kMaxLoraSlices + 1)};
  if (warp >= kWarps) {
    hopper::lower_registers<kCopyRegisters>();
    Producer<T, S> producer = {b};
    producer.run();
  } else {
    hopper::raise_registers<kComputeRegisters>();
    Consumer<T, S, kT> consumer = {b};
    consumer.run();
  }
#endif
}

template <class T, int kT, int kClusterBits>
Status launch(const Launcher& launcher, const Args& args) {
  LaunchShape shape;
  shape.cluster = 1u << kClusterBits;
  shape.grid = static_cast<unsigned>(max_tiles(args, kRows) << kClusterBits);
  shape.block = kThreads;
  shape.shared_bytes = Shape<kT, kClusterBits>::kSharedBytes;
  return launcher.launch<add_lora_tiles_kernel<Arch::kSm90, T, kT, kClusterBits>>(shape, args);
}

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  // Ranks of all slices in one pass, if they may fit.
  return args.max_rank <= 16 && args.num_slices == 1 ? launch<T, 1, TILES_BITS>(launcher, args) : launch<T, 4, TILES_BITS>(launcher, args);
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
#ifndef TILES_BF16_ONLY
  if (dtype == DType::kFloat16) return launch<__half>(launcher, args);
#endif
  return launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
