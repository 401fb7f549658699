// sgmv on sm_90 for float16 and bfloat16 where d_in is more than 128 and sgmv_deep.cu does not serve: nothing is small.
//
// A block computes 64 or 128 rows x 64 to 256 columns, a warpgroup 64 rows x 128 or 64 of them: wgmma.m64nNk16 from
// shared memory, in the order of K. x and W go through a ring of stages of 64 of K, whose 16-byte chunks SharedTile
// turns as the swizzle of 128 bytes does: x [row][K], W [column][K], or [K][column] in groups of 64 columns. They are
// copied by cp.async, or element by element where they are not aligned.
//
// An element of a product is a function of its row and column alone, so that neither the shape of the tile nor how many
// of its rows there are enters the bits. A tile of 16 rows leaves the others of its products to what lies behind them
// in memory: no sum of another row has to do with that.
#include <algorithm>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/sgmv_wide.cuh"

namespace punica::cuda {
namespace sgmv_wgmma {

inline constexpr int kDepth = 64;  // of K, of a stage

// kBlocks of them fit into a multiprocessor. kBehind: products that may be under way while their stages are not filled
// again, in steps; at least the one just started.
template <int kRowsAtMost, int kTileWidth, int kGroupWidth, int kRing, int kBehind, int kResident>
struct Shape {
  static constexpr int kRows = kRowsAtMost;
  static constexpr int kWidth = kTileWidth;
  static constexpr int kN = kGroupWidth;  // columns of a warpgroup
  static constexpr int kStages = kRing;
  static constexpr int kLag = kBehind;
  static constexpr int kAhead = kStages - kLag;  // stages that are being filled
  static constexpr int kBlocks = kResident;
  static constexpr int kTallRows = kRows < 64 ? 64 : kRows;
  static constexpr int kAcross = kWidth / kN;
  static constexpr int kThreads = kTallRows / 64 * kAcross * 128;
  static constexpr int kBytesX = kRows * kDepth * 2;  // of the 64 rows of a product the rest are what follows
  static constexpr int kStageBytes = kBytesX + kWidth * kDepth * 2;
};

}  // namespace sgmv_wgmma

namespace {

using namespace sgmv_wgmma;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of an operand in rows of 128 bytes. `columns`: bytes to the next 64 columns, if rows are along K.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t columns) {
  return hopper::wgmma_descriptor(address, 1, columns, 1024);
}

#endif

// kSingly: rows of y start anywhere.
template <Arch kArch, class T, bool kInOut, class S, bool kSingly>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) sgmv_wide_wgmma(const SgmvArgs args) {
  static_assert(kArch == Arch::kSm90, "the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<S::kThreads> scratch;
  launch_dependents<kArch>();

  const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + S::kWidth - 1) / S::kWidth);
  const int64_t column = int64_t{blockIdx.x % blocks_n} * S::kWidth;
  const uint32_t number = blockIdx.x / blocks_n;
  if (!args.early_reads) {
    prefetch_tables(args);  // asks the L2 cache alone, where all writes of the kernel before end up
    grid_dependency_wait<kArch>();
  }
  SgmvTile<T> tile;
  if (!find_tile<S::kRows, S::kThreads>(args, number, scratch, &tile)) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }

  const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 8 == 0;
  const uint32_t shared = (shared_address(memory) + 1023) & ~1023u;
  const T* const x = static_cast<const T*>(args.x) + tile.row * args.x_stride;
  const auto fill_w = [&](int step, int stage) {
    const int64_t k = int64_t{step} * kDepth;
    const uint32_t to = shared + stage * S::kStageBytes + S::kBytesX;
    if constexpr (kInOut) {
      using Group = SharedTile<kDepth, 64, false, S::kThreads>;
      if (w_aligned && column + S::kWidth <= args.d_out) {
        // As below, with one address for all groups.
        constexpr int kStep = S::kThreads / 8;
        const int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
        const T* from = tile.w + (k + row) * args.d_out + column + chunk * 8;
        uint32_t at = to + Group::offset(row, chunk);
        const int64_t rest = args.d_in - k - row;
#pragma unroll
        for (int r = 0; r < kDepth; r += kStep) {
#pragma unroll
          for (int group = 0; group < S::kWidth / 64; ++group) {
            copy_async_16(at + group * Group::kBytes, from + group * 64, r < rest ? 16 : 0);
          }
          from += kStep * args.d_out;
          at += Group::row_step(kStep);
        }
        return;
      }
#pragma unroll
      for (int group = 0; group < S::kWidth / 64; ++group) {
        const int64_t c = column + group * 64;
        Group::fill(to + group * Group::kBytes, tile.w + k * args.d_out + min(c, args.d_out), args.d_out, args.d_in - k,
                    args.d_out - c, w_aligned);
      }
    } else {
      SharedTile<S::kWidth, kDepth, false, S::kThreads>::fill(to, tile.w + column * args.d_in + k, args.d_in,
                                                              args.d_out - column, args.d_in - k, w_aligned);
    }
  };
  const auto fill_x = [&](int step, int stage) {
    const int64_t k = int64_t{step} * kDepth;
    SharedTile<S::kRows, kDepth, false, S::kThreads>::fill(shared + stage * S::kStageBytes, x + k, args.x_stride,
                                                           tile.rows, args.d_in - k, args.x_aligned);
  };
  const int steps = static_cast<int>((args.d_in + kDepth - 1) / kDepth);
#pragma unroll 1
  for (int i = 0; i < S::kAhead; ++i) {
    if (i < steps) fill_w(i, i);
  }
  if (args.early_reads) grid_dependency_wait<kArch>();
#pragma unroll 1
  for (int i = 0; i < S::kAhead; ++i) {
    if (i < steps) fill_x(i, i);
    copy_commit();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int group_row = group / S::kAcross * 64, across = group % S::kAcross * S::kN;
  const int64_t group_column = column + across;
  const int warp_row = group_row + warp * 16;
  const bool idle = group_column >= args.d_out || group_row >= tile.rows;
#pragma unroll
  for (int q = 0; q < S::kN / 32; ++q) LaneOfY<T, 16>(args, tile, warp_row, group_column + q * 32, lane).prefetch();

  float sums[S::kN / 2];
#pragma unroll
  for (int i = 0; i < S::kN / 2; ++i) sums[i] = 0;
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::kAhead - 1>();
    hopper::fence_async_proxy();  // the tensor cores read what this thread has copied
    __syncthreads();
    const int next = step + S::kAhead;
    if (next < steps) {
      const int into = stage >= S::kLag ? stage - S::kLag : stage + S::kAhead;  // whose products have ended
      fill_w(next, into);
      fill_x(next, into);
    }
    copy_commit();
    if (!idle) {
      const uint32_t xs = shared + stage * S::kStageBytes + group_row * 128;
      const uint32_t ws = shared + stage * S::kStageBytes + S::kBytesX + across * 128;
      hopper::products_fence();
#pragma unroll
      for (int s = 0; s < kDepth / 16; ++s) {
        if constexpr (kInOut) {
          hopper::wgmma_m64k16<T, S::kN, true>(sums, descriptor(xs + s * 32, 16),
                                               descriptor(ws + s * 2048, kDepth * 128));
        } else {
          hopper::wgmma_m64k16<T, S::kN, false>(sums, descriptor(xs + s * 32, 16), descriptor(ws + s * 32, 16));
        }
      }
      hopper::products_commit();
      hopper::products_wait<S::kLag - 1>();
    }
    stage = stage == S::kStages - 1 ? 0 : stage + 1;
  }
  hopper::products_wait<0>();
#pragma unroll
  for (int i = 0; i < S::kN / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  if constexpr (kSingly) {
    __syncthreads();  // before the stages become what add_singly() needs
    if (idle) return;
    float* const staged = reinterpret_cast<float*>(memory) + threadIdx.x / 32 * kSinglyFloats;
#pragma unroll
    for (int q = 0; q < S::kN / 32; ++q) {
      float four[4][4];
#pragma unroll
      for (int i = 0; i < 16; ++i) four[i / 4][i % 4] = sums[q * 16 + i];
      gather_columns(four, lane);
      add_singly(args, tile, warp_row, group_column + q * 32, four, staged, lane);
    }
  } else {
    if (idle) return;
#pragma unroll
    for (int first = 0; first < S::kN / 32; first += 2) {
      LaneOfY<T, 16> mine[2] = {{args, tile, warp_row, group_column + first * 32, lane},
                                {args, tile, warp_row, group_column + first * 32 + 32, lane}};
      Vec<T, 8> old[2][2];
#pragma unroll
      for (int q = 0; q < 2; ++q) mine[q].read(old[q]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float four[4][4];
#pragma unroll
        for (int i = 0; i < 16; ++i) four[i / 4][i % 4] = sums[(first + q) * 16 + i];
        gather_columns(four, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) mine[q].add(old[q][half], four, half);
      }
    }
  }
#endif
}

template <class T, bool kInOut, class S>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, S::kRows) * ((args.d_out + S::kWidth - 1) / S::kWidth));
  shape.block = S::kThreads;
  shape.shared_bytes = S::kStages * S::kStageBytes + 1024;  // from a multiple of 1024 on
  return args.y_aligned ? launcher.launch<sgmv_wide_wgmma<Arch::kSm90, T, kInOut, S, false>>(shape, args)
                        : launcher.launch<sgmv_wide_wgmma<Arch::kSm90, T, kInOut, S, true>>(shape, args);
}

// A choice of tiles, not of arithmetic.
template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using Large = Shape<128, 256, 128, 4, 2, 1>;  // long segments
  using Medium = Shape<64, 256, 128, 5, 2, 1>;
  using Middle = Shape<64, 128, 128, 4, 2, 2>;
  using Short = Shape<16, 256, 128, 3, 1, 2>;  // segments of about 16 rows or less
  using Small = Shape<64, 64, 64, 7, 2, 2>;    // where larger ones were too few to fill the device
  constexpr int64_t kEnough = 100;             // blocks, to keep an H200 busy
  const auto blocks = [&](int rows, int width) { return max_tiles(args, rows) * ((args.d_out + width - 1) / width); };
  if (short_segments(args) && blocks(16, 256) >= kEnough) return launch<T, kInOut, Short>(launcher, args);
  if (args.rows >= 128 * args.num_segments && blocks(128, 256) >= kEnough) {
    return launch<T, kInOut, Large>(launcher, args);
  }
  if (blocks(64, 256) >= kEnough) return launch<T, kInOut, Medium>(launcher, args);
  return blocks(64, 128) >= kEnough ? launch<T, kInOut, Middle>(launcher, args)
                                    : launch<T, kInOut, Small>(launcher, args);
}

}  // namespace

Status launch_sgmv_wide_wgmma(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args) {
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
