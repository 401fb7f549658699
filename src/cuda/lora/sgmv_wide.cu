// sgmv for float16 and bfloat16 where neither sgmv_stream.cu, sgmv_deep.cu nor sgmv_expand.cu serves: nothing is small.
//
// A block computes 64 rows x 256 columns, a warp 32 of the columns. The sum goes through two buffers of 64 of K in
// shared memory, and y is read at its end.
//
// A lane of mma.m16n8k16 gets two adjacent columns of each 8 of a product. Four products give it eight adjacent columns
// if product j has as its column c the column 8 (c / 2) + 2 j + c % 2 of the 32: then lane t of a row's four holds
// columns 8 t .. 8 t + 7. For W [d_out, d_in] that is a choice of ldmatrix's rows. For W [d_in, d_out] the fragments
// that ldmatrix.trans makes of columns 8 i .. 8 i + 7 are exchanged between lanes (spread_columns).
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kDepth = 64;  // of K, of a step
constexpr int kWidth = 256;
constexpr int kWarpWidth = 32;

template <bool kInOut>
struct Wide {
  static constexpr int kSlices = kDepth / 16;
  static constexpr int kStages = 2;
  using X = SharedTile<kSgmvRows, kDepth>;
  using W = SharedTile<kInOut ? kDepth : kWidth, kInOut ? kWidth : kDepth, !kInOut>;
  static constexpr int kStageBytes = X::kBytes + W::kBytes;
};

// r[i] at lane 8 q + o becomes what r[q] is at lane 8 i + o: the column 2 j + b of columns 8 q .. 8 q + 7, in r[q] of
// lanes 4 (2 j + b) + t, goes to r[j] of lanes 4 (2 q + b) + t, which is column 2 q + b of product j.
__device__ __forceinline__ void spread_columns(uint32_t (&r)[4], int lane) {
  const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? r[i] : r[i + 2], 16);
    if (high) {
      r[i] = other;
    } else {
      r[i + 2] = other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 8);
    if (odd) {
      r[i] = other;
    } else {
      r[i + 1] = other;
    }
  }
}

// Where the lane's first row of ldmatrix is in W's tile, for the warp's columns and slice 0.
template <bool kInOut, class Tile>
__device__ __forceinline__ uint32_t weights_offset(int warp, int lane) {
  if constexpr (kInOut) return Tile::offset(lane % 8, warp * 4 + lane / 8);
  const int c = lane % 8;
  return Tile::offset(warp * kWarpWidth + c / 2 * 8 + lane / 16 * 2 + c % 2, lane / 8 % 2);
}

// The warp's part of one slice of W: b[j] for product j.
template <bool kInOut, class Tile>
__device__ __forceinline__ void load_weights(uint32_t (&b)[4][2], uint32_t ws, uint32_t offset, int slice, int lane) {
  if constexpr (kInOut) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t r[4];
      load_matrices_transposed(r, ws + offset + Tile::row_step(slice * 16 + half * 8));
      spread_columns(r, lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j][half] = r[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t r[4];
      load_matrices(r, ws + (offset ^ Tile::chunk_turn(slice * 2)) + Tile::row_step(j * 2));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  }
}

// What a lane has of a tile of y: rows g, g + 8, g + 16 ..., eight columns of each, or fewer at the right edge.
template <class T>
struct LaneOfY {
  T* y;
  int64_t step;  // to the next of its rows
  int rows;      // of the tile, from this lane's next one on
  int columns;
  bool is_vector;

  __device__ __forceinline__ LaneOfY(const SgmvArgs& args, const SgmvTile<T>& tile, int64_t warp_column, int lane) {
    const int64_t first = warp_column + lane % 4 * 8;
    y = static_cast<T*>(args.y) + (tile.row + lane / 4) * args.y_stride + first;
    step = 8 * args.y_stride;
    rows = tile.rows - lane / 4;
    columns = static_cast<int>(max(min(args.d_out - first, int64_t{8}), int64_t{0}));
    is_vector = args.y_aligned && columns == 8;
  }

  // The next kCount of its rows, where they are vectors: all at once, so that the reads do not wait for each other.
  template <int kCount>
  __device__ __forceinline__ void read(Vec<T, 8> (&old)[kCount]) const {
    if (!is_vector) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i * 8 < rows) old[i] = load<T, 8>(y + i * step);
    }
  }

  // Adds row g (half 0) or g + 8 (half 1) of four products to the next of its rows, and leaves that behind.
  __device__ __forceinline__ void add(const Vec<T, 8>& old, const float (&sums)[4][4], int half) {
    T* to = y;
    const bool is_there = rows > 0;
    y += step;
    rows -= 8;
    if (!is_there) return;
    if (is_vector) {
      Vec<T, 8> result;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        result.values[c] = from_float<T>(to_float(old.values[c]) + sums[c / 2][half * 2 + c % 2]);
      }
      store(to, result);
    } else {
      T values[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c < columns) values[c] = to[c];
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c < columns) to[c] = from_float<T>(to_float(values[c]) + sums[c / 2][half * 2 + c % 2]);
      }
    }
  }
};

template <Arch kArch, class T, bool kInOut>
__global__ void __launch_bounds__(kSgmvThreads, 2) sgmv_wide(const SgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using W = Wide<kInOut>;
    constexpr int kTilesM = kSgmvRows / 16;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ SgmvScratch<kSgmvThreads> scratch;
    launch_dependents<kArch>();

    const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + kWidth - 1) / kWidth);
    const int64_t column = int64_t{blockIdx.x % blocks_n} * kWidth;
    const uint32_t number = blockIdx.x / blocks_n;
    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      prefetch_rows<T>(args.y, args.y_stride, args, number, column, min(column + kWidth, args.d_out));
    }
    SgmvTile<T> tile;
    if (!find_tile(args, number, scratch, &tile)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }

    const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 8 == 0;
    const uint32_t shared = shared_address(memory);
    const T* x = static_cast<const T*>(args.x) + tile.row * args.x_stride;
    const auto fill_w = [&](int step, int stage) {
      const int64_t k = int64_t{step} * kDepth;
      const uint32_t to = shared + stage * W::kStageBytes + W::X::kBytes;
      if constexpr (kInOut) {
        W::W::fill(to, tile.w + k * args.d_out + column, args.d_out, args.d_in - k, args.d_out - column, w_aligned);
      } else {
        W::W::fill(to, tile.w + column * args.d_in + k, args.d_in, args.d_out - column, args.d_in - k, w_aligned);
      }
    };
    const auto fill_x = [&](int step, int stage) {
      const int64_t k = int64_t{step} * kDepth;
      W::X::fill(shared + stage * W::kStageBytes, x + k, args.x_stride, tile.rows, args.d_in - k, args.x_aligned);
    };
    fill_w(0, 0);
    if (args.early_reads) grid_dependency_wait<kArch>();
    fill_x(0, 0);
    copy_commit();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t x_offset = W::X::offset(lane % 16, lane / 16);
    const uint32_t w_offset = weights_offset<kInOut, typename W::W>(warp, lane);
    const int64_t warp_column = column + warp * kWarpWidth;
    const bool idle = warp_column >= args.d_out;

    const int steps = static_cast<int>((args.d_in + kDepth - 1) / kDepth);
    float sums[kTilesM][4][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_wait<0>();
      __syncthreads();
      if (step + 1 < steps) {
        fill_w(step + 1, (step + 1) % 2);
        fill_x(step + 1, (step + 1) % 2);
        copy_commit();
      }
      if (idle) continue;
      const uint32_t xs = shared + step % 2 * W::kStageBytes;
#pragma unroll
      for (int s = 0; s < W::kSlices; ++s) {
        uint32_t b[4][2];
        load_weights<kInOut, typename W::W>(b, xs + W::X::kBytes, w_offset, s, lane);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          if (m * 16 < tile.rows) {
            uint32_t a[4];
            load_matrices(a, xs + (x_offset ^ W::X::chunk_turn(s * 2)) + W::X::row_step(m * 16));
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[m][j], a, b[j]);
          }
        }
      }
    }
    LaneOfY<T> mine(args, tile, warp_column, lane);
#pragma unroll
    for (int first = 0; first < 2 * kTilesM; first += kTilesM) {
      Vec<T, 8> old[kTilesM];
      mine.read(old);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) mine.add(old[i], sums[(first + i) / 2], i % 2);
    }
  }
}

template <Arch kArch, class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using W = Wide<kInOut>;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kSgmvRows) * ((args.d_out + kWidth - 1) / kWidth));
  shape.block = kSgmvThreads;
  shape.shared_bytes = W::kStages * W::kStageBytes;
  return launcher.launch<sgmv_wide<kArch, T, kInOut>>(shape, args);
}

template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if (launcher.arch == Arch::kSm80) return launch<Arch::kSm80, T, kInOut>(launcher, args);
  return launch<Arch::kSm90, T, kInOut>(launcher, args);
}

}  // namespace

Status launch_sgmv_wide(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args) {
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
