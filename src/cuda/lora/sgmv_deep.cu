// sgmv for float16 and bfloat16 where d_in is large and d_out small (shrinks), on the sm_80 path; on the sm_90 path for
// W [d_in, d_out] with d_out at most 16.
//
// x is read once from memory, and its rows are long: a tile of 64 rows alone would leave most of the device idle. So
// the sum is cut in three ways, all of them functions of d_in and d_out: a cluster of two blocks shares d_in in
// contiguous parts (sm_90; one block does all on the sm_80 path), a block walks over its part in steps of 128
// through a ring of shared memory that cp.async fills, and in each step every warp (or pair of warps) takes some of the
// eight K slices of 16. The warps' sums are added in order of the warps, the blocks' sums, which travel through
// distributed shared memory, in order of the blocks.
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_sum.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kStep = 128;
constexpr int kSlices = kStep / 16;
constexpr int64_t kClusterIn = 1024;

template <int kCluster, bool kInOut, int kCols>
struct Deep {
  // Warps along the rows; the others share the slices of a step.
  static constexpr int kWarpsM = kCols == 16 ? 1 : 2;
  static constexpr int kWarpsK = kSgmvThreads / 32 / kWarpsM;
  [[maybe_unused]] static constexpr int kTilesM = kSgmvRows / 16 / kWarpsM;
  [[maybe_unused]] static constexpr int kTilesN = kCols / 8;
  static constexpr int kStages = kCluster == 2 ? (kCols == 16 ? 10 : 6) : kCols == 16 ? 4 : 3;
  using X = SharedTile<kSgmvRows, kStep>;
  using W = SharedTile<kInOut ? kStep : kCols, kInOut ? kCols : kStep>;
  static constexpr int kStageBytes = X::kBytes + W::kBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kSgmvRows * kCols * 4;  // of one warp or block
  static_assert(kWarpsK * kSumBytes <= kRingBytes);
  static_assert(kSlices % kWarpsK == 0);
};

template <Arch kArch, class T, bool kInOut, int kCols, int kCluster>
__global__ void __launch_bounds__(kSgmvThreads, kCluster == 2 ? 1 : 2) sgmv_deep(const SgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using D = Deep<kCluster, kInOut, kCols>;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ SgmvScratch<kSgmvThreads> scratch;
    launch_dependents<kArch>();

    const uint32_t rank = blockIdx.x % kCluster;
    const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + kCols - 1) / kCols);
    const int64_t column = int64_t{blockIdx.x / kCluster % blocks_n} * kCols;
    const uint32_t number = blockIdx.x / kCluster / blocks_n;
    const int steps = static_cast<int>((args.d_in + kStep - 1) / kStep);
    const int begin = static_cast<int>(int64_t{steps} * rank / kCluster);
    const int end = static_cast<int>(int64_t{steps} * (rank + 1) / kCluster);

    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      prefetch_rows<T>(args.x, args.x_stride, args, number, int64_t{begin} * kStep,
                       min(int64_t{end} * kStep, args.d_in));
    }
    SgmvTile<T> tile;
    if (!find_tile(args, number, scratch, &tile)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;  // the other blocks of the cluster find the same
    }
    if constexpr (kCluster > 1) cluster_arrive_begun();  // waited for before the first write to another block

    const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 8 == 0;
    const uint32_t ring = shared_address(memory);
    const auto fill_w = [&](int step, int stage) {
      const int64_t k = int64_t{step} * kStep;
      const uint32_t to = ring + stage * D::kStageBytes + D::X::kBytes;
      if constexpr (kInOut) {
        D::W::fill(to, tile.w + k * args.d_out + column, args.d_out, args.d_in - k, args.d_out - column, w_aligned);
      } else {
        D::W::fill(to, tile.w + column * args.d_in + k, args.d_in, args.d_out - column, args.d_in - k, w_aligned);
      }
    };
    const T* x = static_cast<const T*>(args.x) + tile.row * args.x_stride;
    const auto fill_x = [&](int step, int stage) {
      const int64_t k = int64_t{step} * kStep;
      D::X::fill(ring + stage * D::kStageBytes, x + k, args.x_stride, tile.rows, args.d_in - k, args.x_aligned);
    };

#pragma unroll
    for (int i = 0; i < D::kStages - 1; ++i) {
      if (begin + i < end) fill_w(begin + i, i);
    }
    if (args.early_reads) grid_dependency_wait<kArch>();
#pragma unroll
    for (int i = 0; i < D::kStages - 1; ++i) {
      if (begin + i < end) fill_x(begin + i, i);
      copy_commit();
    }

    TileOfY<T, kCols, kCluster> y(static_cast<T*>(args.y) + tile.row * args.y_stride + column, args.y_stride, tile.rows,
                                  args.d_out - column, rank);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_k = warp / D::kWarpsM;
    const int row0 = warp % D::kWarpsM * D::kTilesM * 16;
    // Where the lane's first rows of ldmatrix are, of the warp's first slice.
    constexpr int kWarpSlices = kSlices / D::kWarpsK;
    const uint32_t x_offset = D::X::offset(row0 + lane % 16, warp_k * kWarpSlices * 2 + lane / 16);
    const uint32_t w_offset = kInOut ? D::W::offset(warp_k * kWarpSlices * 16 + lane % 16, lane / 16)
                                     : D::W::offset(lane / 16 * 8 + lane % 8, warp_k * kWarpSlices * 2 + lane / 8 % 2);
    float sums[D::kTilesM][D::kTilesN][4] = {};
    int stage = 0;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      copy_wait<D::kStages - 2>();
      __syncthreads();
      {
        const int next = step + D::kStages - 1;
        const int into = stage == 0 ? D::kStages - 1 : stage - 1;
        if (next < end) {
          fill_w(next, into);
          fill_x(next, into);
        }
        copy_commit();
      }
      const uint32_t xs = ring + stage * D::kStageBytes, ws = xs + D::X::kBytes;
#pragma unroll
      for (int s = 0; s < kWarpSlices; ++s) {
        uint32_t b[D::kTilesN][2];
#pragma unroll
        for (int n = 0; n < D::kTilesN; n += 2) {
          uint32_t r[4];
          if constexpr (kInOut) {
            load_matrices_transposed(r, ws + (w_offset ^ D::W::chunk_turn(n)) + D::W::row_step(s * 16));
          } else {
            load_matrices(r, ws + (w_offset ^ D::W::chunk_turn(s * 2)) + D::W::row_step(n * 8));
          }
          b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
        }
#pragma unroll
        for (int m = 0; m < D::kTilesM; ++m) {
          if (row0 + m * 16 < tile.rows) {
            uint32_t a[4];
            load_matrices(a, xs + (x_offset ^ D::X::chunk_turn(s * 2)) + D::X::row_step(m * 16));
#pragma unroll
            for (int n = 0; n < D::kTilesN; ++n) mma_m16n8k16<T>(sums[m][n], a, b[n]);
          }
        }
      }
      stage = stage == D::kStages - 1 ? 0 : stage + 1;
    }

    // The warps' sums: [warp_k][row][column] over the ring.
    copy_wait<0>();
    __syncthreads();
    float* parts = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int m = 0; m < D::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < D::kTilesN; ++n) {
        float* to = parts + (warp_k * kSgmvRows + row0 + m * 16 + lane / 4) * kCols + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {sums[m][n][0], sums[m][n][1]};
        *reinterpret_cast<float2*>(to + 8 * kCols) = {sums[m][n][2], sums[m][n][3]};
      }
    }
    __syncthreads();
    y.template add<D::kWarpsK>(parts, reinterpret_cast<float*>(memory + D::kRingBytes));
  }
}

template <Arch kArch, class T, bool kInOut, int kCols, int kCluster>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using D = Deep<kCluster, kInOut, kCols>;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kSgmvRows) * ((args.d_out + kCols - 1) / kCols) * kCluster);
  shape.block = kSgmvThreads;
  shape.shared_bytes = D::kRingBytes + (kCluster > 1 ? D::kSumBytes : 0);
  shape.cluster = kCluster;
  return launcher.launch<sgmv_deep<kArch, T, kInOut, kCols, kCluster>>(shape, args);
}

template <class T, bool kInOut, int kCols>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if constexpr (kInOut && kCols == 16) {
    if (launcher.arch == Arch::kSm90) {
      return args.d_in < kClusterIn ? launch<Arch::kSm90, T, kInOut, kCols, 1>(launcher, args)
                                    : launch<Arch::kSm90, T, kInOut, kCols, 2>(launcher, args);
    }
  }
  return launch<Arch::kSm80, T, kInOut, kCols, 1>(launcher, args);
}

template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  return args.d_out <= 16 ? launch<T, kInOut, 16>(launcher, args) : launch<T, kInOut, 64>(launcher, args);
}

}  // namespace

Status launch_sgmv_deep(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args) {
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
