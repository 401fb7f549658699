// sgmv for float32: fused multiply-adds, in the order of K.
//
// A block computes 64 rows x 64 columns, or x 16 columns where the sum is long and d_out small; then four groups of 64
// threads share each step of K, and on sm_90 a cluster of four blocks (two with more than 16 columns) shares d_in, as
// in sgmv_deep.cu. Each thread has 4 x 4 outputs. The sum of a step (32 of K, or 16 for each group) is finished before
// it is added to the total, which keeps the rounding error of long sums small.
#include "src/cuda/lora/sgmv_sum.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int64_t kDeepIn = 256;
constexpr int64_t kDeepOut = 64;

template <bool kDeep>
struct Float {
  static constexpr int kCols = kDeep ? 16 : 64;
  static constexpr int kGroups = kDeep ? 4 : 1;
  static constexpr int kStep = kDeep ? 64 : 32;
  static constexpr int kGroupStep = kStep / kGroups;
  static constexpr int kStages = kDeep ? 4 : 2;
  // x as [row][k], W as [k][column], rows padded so that they start at different banks.
  static constexpr int kPitchX = kStep + 4;
  static constexpr int kPitchW = kCols + 4;
  static constexpr int kFloatsX = kSgmvRows * kPitchX;
  static constexpr int kStageFloats = kFloatsX + kStep * kPitchW;
  static constexpr int kRingFloats = kStages * kStageFloats;
  static_assert(kGroups * kSgmvRows * kCols <= kRingFloats);
  static_assert(kSgmvThreads / kGroups == kSgmvRows / 4 * (kCols / 4));
};

// Copies kRows x kColumns floats, of which `rows` x `columns` (possibly more, or none) are there, and zeros elsewhere.
// kTranspose: element (row, column) goes to to[column * pitch + row].
template <int kRows, int kColumns, bool kTranspose>
__device__ __forceinline__ void fill(float* to, int pitch, const float* from, int64_t stride, int64_t rows,
                                     int64_t columns, bool aligned) {
  if (!kTranspose && aligned) {
    constexpr int kChunks = kColumns / 4;
#pragma unroll
    for (int id = threadIdx.x; id < kRows * kChunks; id += kSgmvThreads) {
      const int row = id / kChunks, column = id % kChunks * 4;
      const int count = row < rows ? static_cast<int>(min(max(columns - column, int64_t{0}), int64_t{4})) : 0;
      copy_async_16(shared_address(to + row * pitch + column), count > 0 ? from + row * stride + column : from,
                    count * 4);
    }
  } else {
#pragma unroll 4
    for (int id = threadIdx.x; id < kRows * kColumns; id += kSgmvThreads) {
      const int row = id / kColumns, column = id % kColumns;
      const bool there = row < rows && column < columns;
      copy_async_4(shared_address(to + (kTranspose ? column * pitch + row : row * pitch + column)),
                   there ? from + row * stride + column : from, there ? 4 : 0);
    }
  }
}

template <Arch kArch, bool kInOut, bool kDeep, int kCluster>
__global__ void __launch_bounds__(kSgmvThreads, 2) sgmv_float(const SgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using F = Float<kDeep>;
    extern __shared__ __align__(16) float floats[];
    __shared__ SgmvScratch<kSgmvThreads> scratch;
    launch_dependents<kArch>();

    const uint32_t rank = blockIdx.x % kCluster;
    const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + F::kCols - 1) / F::kCols);
    const int64_t column = int64_t{blockIdx.x / kCluster % blocks_n} * F::kCols;
    const uint32_t number = blockIdx.x / kCluster / blocks_n;
    const int steps = static_cast<int>((args.d_in + F::kStep - 1) / F::kStep);
    const int begin = static_cast<int>(int64_t{steps} * rank / kCluster);
    const int end = static_cast<int>(int64_t{steps} * (rank + 1) / kCluster);

    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      prefetch_rows<float>(args.x, args.x_stride, args, number, int64_t{begin} * F::kStep,
                           min(int64_t{end} * F::kStep, args.d_in));
    }
    SgmvTile<float> tile;
    if (!find_tile(args, number, scratch, &tile)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;  // the other blocks of the cluster find the same
    }
    if constexpr (kCluster > 1) cluster_arrive_begun();  // waited for before the first write to another block

    const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 4 == 0;
    const auto fill_w = [&](int step, int stage) {
      const int64_t k = int64_t{step} * F::kStep;
      float* to = floats + stage * F::kStageFloats + F::kFloatsX;
      if constexpr (kInOut) {
        fill<F::kStep, F::kCols, false>(to, F::kPitchW, tile.w + k * args.d_out + column, args.d_out, args.d_in - k,
                                        args.d_out - column, w_aligned);
      } else {
        fill<F::kCols, F::kStep, true>(to, F::kPitchW, tile.w + column * args.d_in + k, args.d_in, args.d_out - column,
                                       args.d_in - k, w_aligned);
      }
    };
    const float* x = static_cast<const float*>(args.x) + tile.row * args.x_stride;
    const auto fill_x = [&](int step, int stage) {
      const int64_t k = int64_t{step} * F::kStep;
      fill<kSgmvRows, F::kStep, false>(floats + stage * F::kStageFloats, F::kPitchX, x + k, args.x_stride, tile.rows,
                                       args.d_in - k, args.x_aligned);
    };
#pragma unroll 1
    for (int i = 0; i < F::kStages - 1; ++i) {
      if (begin + i < end) fill_w(begin + i, i);
    }
    if (args.early_reads) grid_dependency_wait<kArch>();
#pragma unroll 1
    for (int i = 0; i < F::kStages - 1; ++i) {
      if (begin + i < end) fill_x(begin + i, i);
      copy_commit();
    }
    TileOfY<float, F::kCols, kCluster> y(static_cast<float*>(args.y) + tile.row * args.y_stride + column, args.y_stride,
                                         tile.rows, args.d_out - column, rank);

    // Rows of the thread: first_row + 16 i; columns: first_column + j.
    constexpr int kGroupThreads = kSgmvThreads / F::kGroups;
    const int group = threadIdx.x / kGroupThreads;
    const int first_row = threadIdx.x % kGroupThreads / (F::kCols / 4);
    const int first_column = threadIdx.x % (F::kCols / 4) * 4;
    float total[4][4] = {};
    int stage = 0;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      copy_wait<F::kStages - 2>();
      __syncthreads();
      const int next = step + F::kStages - 1;
      if (next < end) {
        const int into = stage == 0 ? F::kStages - 1 : stage - 1;
        fill_w(next, into);
        fill_x(next, into);
      }
      copy_commit();
      const float* xs = floats + stage * F::kStageFloats + first_row * F::kPitchX + group * F::kGroupStep;
      const float* ws =
          floats + stage * F::kStageFloats + F::kFloatsX + group * F::kGroupStep * F::kPitchW + first_column;
      float sums[4][4] = {};
#pragma unroll 4
      for (int k = 0; k < F::kGroupStep; k += 4) {
        Vec<float, 4> a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = load<float, 4>(xs + i * 16 * F::kPitchX + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = load<float, 4>(ws + (k + i) * F::kPitchW);
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(a[i].values[kk], b[kk].values[j], sums[i][j]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[i][j] += sums[i][j];
      }
      stage = stage == F::kStages - 1 ? 0 : stage + 1;
    }

    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = floats + (group * kSgmvRows + first_row + i * 16) * F::kCols + first_column;
      *reinterpret_cast<float4*>(to) = {total[i][0], total[i][1], total[i][2], total[i][3]};
    }
    __syncthreads();
    y.template add<F::kGroups>(floats, floats + F::kRingFloats);
  }
}

template <Arch kArch, bool kInOut, bool kDeep, int kCluster>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using F = Float<kDeep>;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kSgmvRows) * ((args.d_out + F::kCols - 1) / F::kCols) * kCluster);
  shape.block = kSgmvThreads;
  shape.shared_bytes = (F::kRingFloats + (kCluster > 1 ? kSgmvRows * F::kCols : 0)) * sizeof(float);
  shape.cluster = kCluster;
  return launcher.launch<sgmv_float<kArch, kInOut, kDeep, kCluster>>(shape, args);
}

template <bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  const bool deep = args.d_in >= kDeepIn && args.d_out <= kDeepOut && args.d_in > args.d_out;
  if (launcher.arch == Arch::kSm80) {
    return deep ? launch<Arch::kSm80, kInOut, true, 1>(launcher, args)
                : launch<Arch::kSm80, kInOut, false, 1>(launcher, args);
  }
  if (!deep) return launch<Arch::kSm90, kInOut, false, 1>(launcher, args);
  return args.d_out <= 16 ? launch<Arch::kSm90, kInOut, true, 4>(launcher, args)
                          : launch<Arch::kSm90, kInOut, true, 2>(launcher, args);
}

}  // namespace

Status launch_sgmv_float(const Launcher& launcher, SgmvWeights weights, const SgmvArgs& args) {
  return weights == SgmvWeights::kInOut ? launch<true>(launcher, args) : launch<false>(launcher, args);
}

}  // namespace punica::cuda
