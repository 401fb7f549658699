// sgmv for float16 and bfloat16 where d_out is not small and no other kernel serves: on sm_90 up to d_in 128, on sm_80
// from 17 on.
//
// A block computes 64 or 16 rows x 64 to 256 columns, a warp 32 of the columns. The sum goes through stages of 64 of K
// in shared memory. With early y, y is copied to shared memory first of all, each lane's part for itself; otherwise the
// L2 cache is asked for it, and it is read at the end.
//
// A lane of mma.m16n8k16 gets two adjacent columns of each 8 of a product. Four products give it eight adjacent columns
// if product j has as its column c the column 8 (c / 2) + 2 j + c % 2 of the 32: then lane t of a row's four holds
// columns 8 t .. 8 t + 7. For W [d_out, d_in] that is a choice of ldmatrix's rows. For W [d_in, d_out] product j has
// columns 8 j .. 8 j + 7, as ldmatrix.trans makes them, and the sums are exchanged between lanes (gather_columns).
#include <algorithm>

#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_wide.cuh"

namespace punica::cuda {
namespace {

constexpr int kDepth = 64;  // of K, of a step
constexpr int kWarpWidth = 32;

// kTileRows x kWidth of y a block; a warp has kWarpRows x 32 of them. kBlocks of them fit into a multiprocessor.
// kMany: a block may have several strips of columns.
template <int kTileRows, int kTileWidth, int kRowsOfWarp, int kSteps, int kResident, bool kEarly = false,
          bool kMany = false>
struct Shape {
  static constexpr bool kStrips = kMany;
  static constexpr bool kEarlyY = kEarly;  // y is copied to shared memory first of all
  static constexpr int kRows = kTileRows;
  static constexpr int kWidth = kTileWidth;
  static constexpr int kWarpRows = kRowsOfWarp;
  static constexpr int kStages = kSteps;
  static constexpr int kBlocks = kResident;
  static constexpr int kWarpsAcross = kWidth / kWarpWidth;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * 32;
  static constexpr int kBytesY = kEarlyY ? kRows * kWidth * 2 : 0;
  static constexpr int kWarps = kThreads / 32;
};
template <Arch kArch>
struct Shapes {  // d_in is at most 128, two steps; up to 227 KiB of shared memory for all blocks
  using Long = Shape<64, 128, 32, 3, 2, true>;
  using Short = Shape<16, 256, 16, 3, 2, false, true>;  // segments of about 16 rows or less
};
template <>
struct Shapes<Arch::kSm80> {  // up to 99 KiB for a block
  using Long = Shape<64, 128, 32, 2, 2>;
  using Short = Shape<16, 256, 16, 2, 2, false, true>;
};
using Small = Shape<64, 64, 16, 6, 2>;  // where larger ones were too few to fill the device; 96 KiB

template <class S, bool kInOut>
struct Wide {
  using X = SharedTile<S::kRows, kDepth, false, S::kThreads>;
  using W = SharedTile<kInOut ? kDepth : S::kWidth, kInOut ? S::kWidth : kDepth, !kInOut, S::kThreads>;
  static constexpr int kStageBytes = X::kBytes + W::kBytes;
};

// Where the lane's first row of ldmatrix is in W's tile, for the warp's columns and slice 0.
template <bool kInOut, class Tile>
__device__ __forceinline__ uint32_t weights_offset(int warp, int lane) {
  if constexpr (kInOut) return Tile::offset(lane % 8, warp * 4 + lane / 8);
  const int c = lane % 8;
  return Tile::offset(warp * kWarpWidth + c / 2 * 8 + lane / 16 * 2 + c % 2, lane / 8 % 2);
}

// The warp's part of one slice of W: b[j] for product j.
template <bool kInOut, class Tile>
__device__ __forceinline__ void load_weights(uint32_t (&b)[4][2], uint32_t ws, uint32_t offset, int slice) {
  if constexpr (kInOut) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t r[4];
      load_matrices_transposed(r, ws + offset + Tile::row_step(slice * 16 + half * 8));
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

// A block goes over `strips` strips of kWidth columns: the ring of stages goes on from one to the next, so that what it
// takes to find the tile is paid once. kSingly: rows of y start anywhere; `staged_at` says where in shared memory their
// sums go.
template <Arch kArch, class T, bool kInOut, class S, bool kSingly>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    sgmv_wide(const SgmvArgs args, const int strips, const int staged_at) {
  if constexpr (kCompiled<kArch>) {
    using W = Wide<S, kInOut>;
    constexpr int kTilesM = S::kWarpRows / 16;
    // y is read into registers before the last step's wait.
    constexpr bool kHeldY = S::kStrips;
    static_assert(!kHeldY || (kTilesM == 1 && !S::kEarlyY));
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ SgmvScratch<S::kThreads> scratch;
    launch_dependents<kArch>();

    const int64_t across = int64_t{S::kWidth} * (S::kStrips ? strips : 1);
    const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + across - 1) / across);
    const int64_t column = int64_t{blockIdx.x % blocks_n} * across;
    const uint32_t number = blockIdx.x / blocks_n;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / S::kWarpsAcross * S::kWarpRows, warp_across = warp % S::kWarpsAcross;
    int64_t warp_column = column + warp_across * kWarpWidth;

    // Without early reads y is read, in the time that the tables take, where the tile is if the segments cover all rows
    // in order, as they mostly do.
    const uint32_t mine_at = shared_address(memory) + threadIdx.x * 16;
    SgmvTile<T> tile = {int64_t{number} * S::kRows, 0, nullptr};
    const int64_t guess = tile.row;
    if (!args.early_reads) {
      prefetch_tables(args);  // asks the L2 cache alone, where all writes of the kernel before end up
      grid_dependency_wait<kArch>();
      if constexpr (S::kEarlyY) {
        tile.rows = static_cast<int>(max(min(args.rows - guess, int64_t{S::kRows}), int64_t{0}));
        LaneOfY<T, S::kWarpRows>(args, tile, warp_row, warp_column, lane).template copy<S::kThreads>(mine_at);
      } else if constexpr (kHeldY) {
        tile.rows = static_cast<int>(max(min(args.rows - guess, int64_t{S::kRows}), int64_t{0}));
        LaneOfY<T, S::kWarpRows>(args, tile, warp_row, warp_column, lane).prefetch();
      }
    }
    if (!find_tile<S::kRows, S::kThreads>(args, number, scratch, &tile)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      copy_commit();
      copy_wait<0>();
      return;
    }

    const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && (kInOut ? args.d_out : args.d_in) % 8 == 0;
    const uint32_t shared = shared_address(memory) + S::kBytesY;
    const T* x = static_cast<const T*>(args.x) + tile.row * args.x_stride;
    const auto fill_w = [&](int step, int64_t column, int stage) {
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
    const int steps = static_cast<int>((args.d_in + kDepth - 1) / kDepth);
    const int64_t end = min(column + across, args.d_out);
    // The step and strip that are filled next.
    int fill_step = 0;
    int64_t fill_column = column;
    const auto is_more = [&] { return S::kStrips ? fill_column < end : fill_step < steps; };
    const auto advance = [&] {
      if (++fill_step == steps && S::kStrips) {
        fill_step = 0;
        fill_column += S::kWidth;
      }
    };
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (is_more()) fill_w(fill_step, fill_column, i);
      advance();
    }
    if (args.early_reads) grid_dependency_wait<kArch>();
    const auto prefetch_y = [&](int64_t column) {
      LaneOfY<T, S::kWarpRows>(args, tile, warp_row, column + warp_across * kWarpWidth, lane).prefetch();
    };
    if constexpr (!S::kEarlyY) {
      prefetch_y(column);
    } else if (args.early_reads || tile.row != guess) {
      copy_commit();
      copy_wait<0>();  // the copies of the wrong rows
      LaneOfY<T, S::kWarpRows>(args, tile, warp_row, warp_column, lane).template copy<S::kThreads>(mine_at);
    }
    fill_step = 0;
    fill_column = column;
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (is_more()) {
        fill_x(fill_step, i);
        if (kHeldY && fill_step == 0 && fill_column > column) prefetch_y(fill_column);
      }
      advance();
      copy_commit();
    }

    const uint32_t x_offset = W::X::offset(warp_row + lane % 16, lane / 16);
    const uint32_t w_offset = W::X::kBytes + weights_offset<kInOut, typename W::W>(warp_across, lane);
    float sums[kTilesM][4][4] = {};
    int stage = 0, step = 0;
#pragma unroll 1
    while (true) {
      const bool idle = warp_column >= args.d_out || warp_row >= tile.rows, is_last = step == steps - 1;
      LaneOfY<T, S::kWarpRows> mine(args, tile, warp_row, warp_column, lane);
      Vec<T, 8> held[kHeldY ? 2 : 1];
      if constexpr (kHeldY && !kSingly) mine.read_if(is_last, held);
      copy_wait<S::kStages - 2>();
      __syncthreads();
      if (is_more()) {
        const int into = stage == 0 ? S::kStages - 1 : stage - 1;
        fill_w(fill_step, fill_column, into);
        fill_x(fill_step, into);
        if (kHeldY && fill_step == 0) prefetch_y(fill_column);
        advance();
      }
      copy_commit();
      const uint32_t xs = shared + stage * W::kStageBytes;
      stage = stage == S::kStages - 1 ? 0 : stage + 1;
      if (!idle) {
#pragma unroll
        for (int s = 0; s < kDepth / 16; ++s) {
          if (S::kStrips && s > 0 && step * kDepth + s * 16 >= args.d_in) break;  // zeros
          uint32_t b[4][2];
          load_weights<kInOut, typename W::W>(b, xs, w_offset, s);
#pragma unroll
          for (int m = 0; m < kTilesM; ++m) {
            if (warp_row + m * 16 < tile.rows) {
              uint32_t a[4];
              load_matrices(a, xs + (x_offset ^ W::X::chunk_turn(s * 2)) + W::X::row_step(m * 16));
#pragma unroll
              for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[m][j], a, b[j]);
            }
          }
        }
      }
      if (!is_last) {
        ++step;
        continue;
      }
      step = 0;
      warp_column += S::kWidth;
      const bool is_end = !S::kStrips || warp_column - warp_across * kWarpWidth >= end;
      if (idle) {
        if (is_end) return;
        continue;
      }
      if constexpr (kInOut) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) gather_columns(sums[m], lane);
      }
      if constexpr (kSingly) {
        float* const staged = reinterpret_cast<float*>(memory + staged_at) + warp * kSinglyFloats;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          add_singly(args, tile, warp_row + m * 16, warp_column - S::kWidth, sums[m], staged, lane);
        }
      } else if constexpr (S::kEarlyY) {
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          Vec<T, 8> old;
          *reinterpret_cast<uint4*>(&old) =
              *reinterpret_cast<const uint4*>(memory + (i * S::kThreads + threadIdx.x) * 16);
          mine.add(old, sums[i / 2], i % 2);
        }
      } else if constexpr (kHeldY) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mine.add(held[i], sums[0], i);
      } else {
        constexpr int kAtOnce = kTilesM == 1 ? 2 : 4;
#pragma unroll
        for (int first = 0; first < 2 * kTilesM; first += kAtOnce) {
          Vec<T, 8> some[kAtOnce];
          mine.read(some);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) mine.add(some[i], sums[(first + i) / 2], i % 2);
        }
      }
      if (is_end) return;
      if constexpr (S::kStrips) {
#pragma unroll
        for (int i = 0; i < kTilesM * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
      }
    }
  }
}

template <Arch kArch, class T, bool kInOut, class S>
Status launch(const Launcher& launcher, const SgmvArgs& args, int64_t strips = 1) {
  LaunchShape shape;
  const int64_t across = S::kWidth * (S::kStrips ? strips : 1);
  shape.grid = static_cast<unsigned>(max_tiles(args, S::kRows) * ((args.d_out + across - 1) / across));
  shape.block = S::kThreads;
  const int64_t steps = (args.d_in + kDepth - 1) / kDepth;
  const int64_t stages = std::min<int64_t>(steps * strips, S::kStages) * Wide<S, kInOut>::kStageBytes;
  shape.shared_bytes = static_cast<size_t>(S::kBytesY + stages);
  const int staged_at = static_cast<int>(shape.shared_bytes);
  if (args.y_aligned) {
    return launcher.launch<sgmv_wide<kArch, T, kInOut, S, false>>(shape, args, static_cast<int>(strips), staged_at);
  }
  shape.shared_bytes += S::kWarps * kSinglyFloats * sizeof(float);
  return launcher.launch<sgmv_wide<kArch, T, kInOut, S, true>>(shape, args, static_cast<int>(strips), staged_at);
}

// A choice of tiles, not of arithmetic.
template <Arch kArch, class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  // Enough to keep an H200 busy; of large tiles, so many that small ones are not faster.
  constexpr int64_t kEnough = 100, kEnoughLong = kArch == Arch::kSm90 ? 200 : 100;
  const auto blocks = [&](int rows, int width) { return max_tiles(args, rows) * ((args.d_out + width - 1) / width); };
  using Short = typename Shapes<kArch>::Short;
  using Long = typename Shapes<kArch>::Long;
  if (short_segments(args) && blocks(Short::kRows, Short::kWidth) >= kEnough) {
    // As many strips a block as leave two blocks for each multiprocessor of an H200, if no segment is empty and none
    // needs more tiles than others.
    const int64_t most = max_tiles(args, Short::kRows), all = (args.d_out + Short::kWidth - 1) / Short::kWidth;
    const int64_t tiles = std::min(most, std::max(args.num_segments, (args.rows + Short::kRows - 1) / Short::kRows));
    const int64_t parts = std::clamp(264 / tiles, int64_t{1}, all);
    return launch<kArch, T, kInOut, Short>(launcher, args, (all + parts - 1) / parts);
  }
  return blocks(Long::kRows, Long::kWidth) >= kEnoughLong ? launch<kArch, T, kInOut, Long>(launcher, args)
                                                          : launch<kArch, T, kInOut, Small>(launcher, args);
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
