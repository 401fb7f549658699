// sgmv for float16 and bfloat16 on the sm_90 path where sgmv_wide_wgmma.cu serves, all is aligned and segments are not
// short: y is what moves, and the products are many. The same bits: all of d_in in the order of K, by products of a
// warpgroup.
//
// A block computes 64 or 128 rows x 64 to 256 columns, a warpgroup 64 rows x all columns. Tensor copies fill a ring of
// steps of 64 of d_in of x and W. Where there are up to 32 segments, blocks stay: the copies of the next tile are under
// way while a warpgroup adds its sums to y, of which it has loaded what it needs before the first product.
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/common/tensor_map.h"
#include "src/cuda/lora/sgmv_shrink_tile.cuh"
#include "src/cuda/lora/sgmv_wide.cuh"

namespace punica::cuda {
namespace broad {

// kWarpgroups: of 64 rows each. kResident: blocks of a multiprocessor.
template <int kWarpgroups, int kTileColumns, int kResident>
struct Broad {
  static constexpr int kRows = kWarpgroups * 64, kColumns = kTileColumns, kBlocks = kResident;
  // Products along the columns.
  static constexpr int kN = kColumns < 128 ? kColumns : 128;
  static constexpr int kWide = kColumns / kN;
  static constexpr int kConsumers = 128 * kWarpgroups, kFillThreads = 128, kThreads = kConsumers + kFillThreads;
  static constexpr int kXBytes = kRows * 128, kWBytes = kColumns * 128, kStageBytes = kXBytes + kWBytes;
  static constexpr int kMostStages = (kBlocks == 1 ? 225 << 10 : 111 << 10) / kStageBytes;
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static_assert(kStages >= 4);
};

// Registers of a thread that fills and of one that multiplies, where they do not get the same.
inline constexpr int kFillRegisters = 56, kMultiplyRegisters = 224;

}  // namespace broad

namespace {

using namespace broad;

template <Arch kArch, class T, bool kInOut, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    sgmv_broad(const SgmvArgs args, const __grid_constant__ CUtensorMap x_map,
               const __grid_constant__ CUtensorMap w_map) {
  static_assert(kArch == Arch::kSm90, "made for wgmma; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = S::kStages, kConsumers = S::kConsumers, kColumns = S::kColumns;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ SgmvScratch<S::kThreads> scratch;
  __shared__ __align__(8) uint64_t full_barriers[kStages], empty_barriers[kStages];
  launch_dependents<kArch>();

  const int id = static_cast<int>(threadIdx.x), lane = id % 32;
  const int group = __shfl_sync(0xffffffffu, id / 128, 0);
  const uint32_t shared = shared_address(memory);
  const uint32_t full_at = shared_address(full_barriers), empty_at = shared_address(empty_barriers);
  const uint32_t columns_blocks = static_cast<uint32_t>((args.d_out + kColumns - 1) / kColumns);
  if (id == 0) {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full_at + i * 8, 1);
      hopper::barrier_init(empty_at + i * 8, kConsumers / 32);
    }
    hopper::barrier_init_fence();
  }
  if (id == kConsumers) {
    hopper::prefetch_map(&x_map);
    hopper::prefetch_map(&w_map);
  }
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  __syncthreads();

  using Tiles = WarpTiles<T, S::kRows>;
  const bool stays = args.num_segments <= Tiles::kSegments;
  SgmvTile<T> tile;
  uint32_t units = blockIdx.x + 1;
  const Tiles tiles(args);
  if (stays) {
    units = tiles.all * columns_blocks;
    if (blockIdx.x < units) tile = tiles.at(args, blockIdx.x / columns_blocks);
  } else if (!find_tile<S::kRows, S::kThreads>(args, blockIdx.x / columns_blocks, scratch, &tile)) {
    units = 0;
  }
  if (blockIdx.x >= units) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }
  const int steps = static_cast<int>((args.d_in + 63) / 64);
  const auto column_of = [&](uint32_t unit) { return int64_t{unit % columns_blocks} * kColumns; };
  int slot = 0, turn = 0;

  if (group == kConsumers / 128) {
    if constexpr (S::kConsumers > 128) hopper::lower_registers<kFillRegisters>();
    const int fill_id = id % 128, fill_warp = fill_id / 32;
    bool waited = !args.early_reads;
    turn = 1;
#pragma unroll 1
    for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
      if (unit != blockIdx.x) tile = tiles.at(args, unit / columns_blocks);
      const int64_t column = column_of(unit);
      const int columns = static_cast<int>(min(args.d_out - column, int64_t{kColumns}));
      const bool w_boxes = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0;
      const uint64_t w_at = reinterpret_cast<uint64_t>(tile.w) >> 4;
      const int low = static_cast<int>(w_at & ((uint64_t{1} << kTensorAddressBits) - 1));
      const int high = static_cast<int>(w_at >> kTensorAddressBits);
      // A box has something of W in it: the map begins at address 0.
      const int w_bytes = kInOut ? (columns + 63) / 64 * (64 * 128) : S::kWBytes;
      const auto copy_w = [&](int step, int at) {
        const uint32_t to = shared + at * S::kStageBytes + S::kXBytes, full = full_at + at * 8;
        if constexpr (!kInOut) {
          hopper::copy_box(to, &w_map, step * 64, static_cast<int>(column), low, high, full);
        } else {
#pragma unroll
          for (int i = 0; i < kColumns; i += 64) {
            if (i < columns) {
              hopper::copy_box(to + i * 128, &w_map, static_cast<int>(column) + i, step * 64, low, high, full);
            }
          }
        }
      };
      const auto fill_w = [&](int step, int at) {
#pragma unroll 1
        for (int i = 0; i < kColumns; i += 64) {
          fill_weights<kInOut, 64>(shared + at * S::kStageBytes + S::kXBytes + i * 128, tile.w, int64_t{step} * 64,
                                   column + i, columns - i, args, fill_id);
        }
      };
      const int early_steps = waited ? 0 : min(kStages, steps);  // of W, before the wait
      if (!waited) {
#pragma unroll 1
        for (int i = 0; i < early_steps; ++i) {
          if (!w_boxes) {
            fill_w(i, i);
          } else if (lane == 0 && i % 4 == fill_warp) {
            copy_w(i, i);
          }
        }
        grid_dependency_wait<kArch>();
        waited = true;
      }
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t full = full_at + slot * 8;
        const auto copy_x = [&] {
          hopper::copy_box(shared + slot * S::kStageBytes, &x_map, step * 64, static_cast<int>(tile.row), full);
        };
        if (w_boxes) {
          // To ask for the boxes of a step takes a thread as long as the products do: four take turns.
          if (lane == 0 && slot % 4 == fill_warp) {
            hopper::barrier_wait(empty_at + slot * 8, turn);
            hopper::barrier_expect(full, S::kXBytes + w_bytes);
            if (step >= early_steps) copy_w(step, slot);
            copy_x();
          }
        } else {
          hopper::barrier_wait(empty_at + slot * 8, turn);
          if (step >= early_steps) fill_w(step, slot);
          hopper::fence_async_proxy();
          hopper::named_barrier_sync(1, 128);
          if (fill_id == 0) {
            hopper::barrier_expect(full, S::kXBytes);
            copy_x();
          }
        }
        if (++slot == kStages) slot = 0, turn ^= 1;
      }
      __syncwarp();
      // The second-level cache is asked for y of the next tile.
      if (const uint32_t next = unit + gridDim.x; next < units) {
        const SgmvTile<T> after = tiles.at(args, next / columns_blocks);
        constexpr int kLines = kColumns / 64;
        for (int line = fill_id; line < after.rows * kLines; line += 128) {
          const int64_t at = column_of(next) + line % kLines * 64;
          if (at < args.d_out) {
            prefetch_line(static_cast<const T*>(args.y) + (after.row + line / kLines) * args.y_stride + at);
          }
        }
      }
    }
    return;
  }

  if constexpr (S::kConsumers > 128) hopper::raise_registers<kMultiplyRegisters>();
  if (args.early_reads) grid_dependency_wait<kArch>();
  const int warp_row = id / 32 * 16;
  constexpr int kWUnits = kInOut ? 64 * 128 : 16;
  const uint64_t x_descriptor = hopper::wgmma_descriptor(shared + group * (64 * 128), 1, 16, 8 * 128);
  const uint64_t w_descriptor = hopper::wgmma_descriptor(shared + S::kXBytes, 1, kWUnits, 8 * 128);
  constexpr uint32_t kWNext = (kInOut ? 16 * 128 : 32) >> 4;
  const auto release = [&](int slot) {
    if (lane == 0) hopper::barrier_arrive(empty_at + slot * 8);
  };
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    if (unit != blockIdx.x) tile = tiles.at(args, unit / columns_blocks);
    const int64_t column = column_of(unit);
    // Of 32 columns q, a lane has eight neighbouring ones of rows g and g + 8.
    const int64_t own_column = column + lane % 4 * 8;
    T* const y = static_cast<T*>(args.y) + (tile.row + warp_row + lane / 4) * args.y_stride + own_column;
    const int own_rows = tile.rows - warp_row - lane / 4, own_columns = static_cast<int>(args.d_out - own_column);
    const auto piece_of_y = [&](int q, int half) {
      return reinterpret_cast<uint4*>(y + half * 8 * args.y_stride + q * 32);
    };
    const auto is_there = [&](int q, int half) { return half * 8 < own_rows && q * 32 < own_columns; };
    uint4 old[kColumns / 32][2];
#pragma unroll
    for (int q = 0; q < kColumns / 32; ++q) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (is_there(q, half)) old[q][half] = *piece_of_y(q, half);
      }
    }
    float sums[S::kWide][S::kN / 2] = {};
    int pending = -1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      hopper::barrier_wait(full_at + slot * 8, turn);
      const uint64_t a = x_descriptor + slot * (S::kStageBytes >> 4), b = w_descriptor + slot * (S::kStageBytes >> 4);
      hopper::products_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int m = 0; m < S::kWide; ++m) {
          hopper::wgmma_m64k16<T, S::kN, kInOut>(sums[m], a + k * 2, b + m * (S::kN * 128 >> 4) + k * kWNext);
        }
      }
      hopper::products_commit();
      hopper::products_wait<1>();
      if (pending >= 0) release(pending);
      pending = slot;
      if (++slot == kStages) slot = 0, turn ^= 1;
    }
    hopper::products_wait<0>();
#pragma unroll
    for (int m = 0; m < S::kWide; ++m) hopper::pin(sums[m]);
    release(pending);
#pragma unroll
    for (int q = 0; q < kColumns / 32; ++q) {
      float four[4][4];
#pragma unroll
      for (int i = 0; i < 16; ++i) four[i / 4][i % 4] = sums[q / (S::kN / 32)][q % (S::kN / 32) * 16 + i];
      gather_columns(four, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float eight[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) eight[c] = four[c / 2][half * 2 + c % 2];
        if (is_there(q, half)) *piece_of_y(q, half) = add_eight<T>(old[q][half], eight);
      }
    }
  }
#endif
}

template <class T, bool kInOut, class S>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  const int64_t units = max_tiles(args, S::kRows) * ((args.d_out + S::kColumns - 1) / S::kColumns);
  const int64_t room = int64_t{S::kBlocks} * launcher.num_multiprocessors();
  LaunchShape shape;
  shape.grid =
      static_cast<unsigned>(args.num_segments <= WarpTiles<T, S::kRows>::kSegments && units > room ? room : units);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kStages * S::kStageBytes;
  CUtensorMap x_map, w_map;
  const int64_t x_stride = args.rows > 1 ? args.x_stride : args.d_in;  // of a single row it may be anything
  const MatrixMap w = kInOut ? MatrixMap{args.d_out, args.d_in, args.d_out, 64, 64}
                             : MatrixMap{args.d_in, args.d_out, args.d_in, 64, S::kColumns};
  cudaError_t error = matrix_map(args.x, {args.d_in, args.rows, x_stride, 64, S::kRows}, &x_map);
  if (error == cudaSuccess) error = matrix_map_anywhere(w, &w_map);
  if (error != cudaSuccess) return to_status(launcher.op(), error);
  return launcher.launch<sgmv_broad<Arch::kSm90, T, kInOut, S>>(shape, args, x_map, w_map);
}

// A choice of tiles, not of arithmetic.
template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  constexpr int64_t kEnough = 100;  // blocks, to keep an H200 busy
  constexpr int64_t kLongIn = 384;  // d_in above which products take longer than y
  const auto blocks = [&](int rows, int width) { return max_tiles(args, rows) * ((args.d_out + width - 1) / width); };
  if (args.rows >= 128 * args.num_segments) {
    if (args.d_in > kLongIn && blocks(128, 256) >= kEnough) {
      return launch<T, kInOut, Broad<2, 256, 1>>(launcher, args);
    }
    if (blocks(64, 128) >= kEnough) return launch<T, kInOut, Broad<1, 128, 2>>(launcher, args);
  }
  return launch<T, kInOut, Broad<1, 64, 2>>(launcher, args);
}

}  // namespace

bool is_sgmv_broad(SgmvWeights weights, const SgmvArgs& args) {
  constexpr int64_t kLeastIn = 256;  // below, a ring has too little to do for what it takes to start
  const int64_t w_row = weights == SgmvWeights::kInOut ? args.d_out : args.d_in;
  const bool long_enough = args.rows >= 16 * args.num_segments;  // else most of a tile's rows are others'
  return args.d_in >= kLeastIn && long_enough && args.x_aligned && args.y_aligned && args.d_out % 8 == 0 &&
         w_row % 8 == 0;
}

Status launch_sgmv_broad(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args) {
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
