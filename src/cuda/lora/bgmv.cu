// dispatch_bgmv on CUDA devices: y[b] += scale * W[indices[b]][layer_idx] @ x[b].
//
// A block starts for every row and every range of outputs. It finds the rows that share the adapter of its own in the
// table of indices; the first of a group of them serves all, the others end. So there is no plan on the host, weights
// are read once for a group, and a batch of different adapters needs no more than the bytes of its weights. Long K,
// short K and float32 have kernels of their own, the first two other ones for sm_90 than for sm_80. How K is split
// follows from h_in, the data type and the code path; what else is chosen here changes no bits.
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "src/cuda/backend.h"
#include "src/cuda/common/launch.h"
#include "src/cuda/lora/bgmv_bulk_deep.cuh"
#include "src/cuda/lora/bgmv_dense.cuh"
#include "src/cuda/lora/bgmv_diagonal_deep.cuh"
#include "src/cuda/lora/bgmv_direct.cuh"
#include "src/cuda/lora/bgmv_float32.cuh"
#include "src/cuda/lora/bgmv_long.cuh"
#include "src/cuda/lora/bgmv_panel.cuh"
#include "src/cuda/lora/bgmv_row.cuh"
#include "src/cuda/lora/bgmv_shares.cuh"
#include "src/cuda/lora/bgmv_short.cuh"

namespace punica::cuda {
namespace {

using namespace bgmv;

// The longest h_in whose weights a warp takes alone. Beyond, splitting K is what keeps enough loads in flight.
constexpr int kShortMax = 32 * kShortSteps;
constexpr int64_t kMaxRows = 1 << 20;           // of a launch whose rows are along x, a multiple of kScanRows
constexpr int64_t kMaxRowsY = 511 * kScanRows;  // where they are along y, which has 65535 blocks at most
constexpr int64_t kMaxTiles = 65535;
constexpr int64_t kMaxWidth = int64_t{1} << 30;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls launch(args, rows, tiles) for parts of the batch and of `tiles` that fit in a grid: one, in all but absurd
// sizes.
template <class Launch>
Status for_parts(BgmvArgs args, int64_t tiles, int64_t max_rows, Launch launch) {
  const int64_t batch = args.batch;
  for (int64_t row = 0; row < batch; row += max_rows) {
    for (int64_t tile = 0; tile < tiles; tile += kMaxTiles) {
      args.first_row = row;
      args.batch = std::min(batch, row + max_rows);
      args.first_tile = static_cast<int>(tile);
      PUNICA_RETURN_IF_ERROR(launch(args, static_cast<unsigned>(args.batch - row),
                                    static_cast<unsigned>(std::min(tiles - tile, kMaxTiles))));
    }
  }
  return {};
}

// Blocks below which there is room to spare: two of them a multiprocessor. Nothing that depends on it changes bits.
constexpr int64_t kFewBlocks = 256;

// ---- sm_90 ---------------------------------------------------------------------------------------------------------

// Blocks along x: see BlockRow.
unsigned row_blocks(const BgmvArgs& args, unsigned rows) {
  if (!args.one_adapter) return rows;
  return static_cast<unsigned>(rows / kScanRows * (kScanRows / args.group_rows) +
                               div_up(rows % kScanRows, args.group_rows));
}

template <class T, int kRanks, int kChunk, bool kWhole, bool kRing>
Status launch_diagonal(const Launcher& launcher, BgmvArgs args) {
  constexpr int kWarps = kDiagonalWarps;
  args.resident = std::min(args.steps, kChunk);
  if (args.resident < args.steps) args.group_rows = 1;  // kRing
  // One output a warp is for so few blocks that rows are not grouped, and whole steps in a ring are more than fit.
  constexpr bool kMayGroup = kRanks > 1 && !(kWhole && kRing);
  if (!kMayGroup) args.group_rows = 1;
  return for_parts(
      args, div_up(args.h_out, kRanks * kWarps >> args.k_warp_bits), kMaxRowsY,
      [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
        LaunchShape shape;
        shape.grid = dim3(tile_count, row_blocks(part, rows));
        shape.block = dim3(32 * kWarps);
        shape.shared_bytes = diagonal_shared_bytes(part.group_rows, kRanks, kWarps, part.resident);
        if constexpr (kMayGroup) {
          if (part.group_rows > 1) {
            return launcher.launch<bgmv_diagonal_kernel<Arch::kSm90, T, kRanks, kWarps, kChunk, kWhole, kRing, false>>(
                shape, part);
          }
        }
        return launcher.launch<bgmv_diagonal_kernel<Arch::kSm90, T, kRanks, kWarps, kChunk, kWhole, kRing, true>>(shape,
                                                                                                                  part);
      });
}

// Whether blocks of bgmv_diagonal_deep_kernel fill the multiprocessors, and where the next kernel reads nothing early
// and the adapters are so few that most rows share theirs, bgmv_diagonal_kernel is faster.
bool prefer_deep(const BgmvArgs& args) {
  const int64_t blocks = args.batch * div_up(args.h_out, kDeepOutputs);
  if (args.one_adapter) return false;
  return args.early_reads ? blocks >= 256 : blocks >= 128 && args.batch <= 2 * args.num_adapters;
}

template <class T>
Status launch_diagonal_deep(const Launcher& launcher, BgmvArgs args) {
  args.resident = args.steps;
  return for_parts(args, div_up(args.h_out, kDeepOutputs), kMaxRowsY,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
                     LaunchShape shape;
                     shape.grid = dim3(tile_count, row_blocks(part, rows));
                     shape.block = dim3(32 * kDiagonalWarps);
                     shape.shared_bytes = deep_shared_bytes(part.group_rows);
                     return launcher.launch<bgmv_diagonal_deep_kernel<Arch::kSm90, T>>(shape, part);
                   });
}

// A shrink of one row a block, by blocks of `outputs`.
template <auto kKernel>
Status launch_row_shrink(const Launcher& launcher, const BgmvArgs& args, int outputs, size_t shared_bytes) {
  return for_parts(args, div_up(args.h_out, outputs), kMaxRowsY,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
                     LaunchShape shape;
                     shape.grid = dim3(tile_count, rows);
                     shape.block = dim3(32 * kDiagonalWarps);
                     shape.shared_bytes = shared_bytes;
                     return launcher.launch<kKernel>(shape, part);
                   });
}

// An expand of one row a block, by blocks of `warps` with `outputs` each.
template <auto kKernel>
Status launch_row_expand(const Launcher& launcher, const BgmvArgs& args, int warps, int outputs, size_t shared_bytes) {
  return for_parts(args, div_up(args.h_out, warps * outputs), kMaxRows,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
                     LaunchShape shape;
                     shape.grid = dim3(rows, tile_count);
                     shape.block = dim3(32 * warps);
                     shape.shared_bytes = shared_bytes;
                     return launcher.launch<kKernel>(shape, part);
                   });
}

template <class T>
Status launch_row_shrink(const Launcher& launcher, const BgmvArgs& args) {
  return launch_row_shrink<bgmv_row_shrink_kernel<Arch::kSm90, T>>(launcher, args, kRowOutputs, kRowShrinkShared);
}

template <class T, int kSteps>
Status launch_row_shrink_long(const Launcher& launcher, const BgmvArgs& args) {
  return launch_row_shrink<bgmv_row_shrink_long_kernel<Arch::kSm90, T, kSteps>>(
      launcher, args, kRowOutputs, size_t{kSteps} * kRowOutputs * kRowPlace);
}

// Weights straight to registers, kOutputs of a block.
template <class T, int kOutputs, bool kAhead>
Status launch_direct_shrink(const Launcher& launcher, const BgmvArgs& args) {
  return launch_row_shrink<bgmv_direct_shrink_kernel<Arch::kSm90, T, kOutputs, 1, 3, kAhead>>(launcher, args, kOutputs,
                                                                                              0);
}

// The same, kTiles times 32 outputs of a warp.
template <class T, int kTiles, bool kAhead>
Status launch_direct_expand(const Launcher& launcher, const BgmvArgs& args) {
  return launch_row_expand<bgmv_direct_expand_kernel<Arch::kSm90, T, kTiles, kDirectWarps, 4, 1, kAhead>>(
      launcher, args, kDirectWarps, kTiles * 32, 0);
}

// bgmv_row_expand_kernel by blocks of `warps`.
template <class T, int kTiles>
Status launch_row_expand(const Launcher& launcher, const BgmvArgs& args, int warps) {
  return launch_row_expand<bgmv_row_expand_kernel<Arch::kSm90, T, kTiles>>(
      launcher, args, warps, kTiles * kRowTile, static_cast<size_t>(warps) * kTiles * kRowTileBytes);
}

// Whether all blocks that take one row run at once and are enough: a wave of four on a multiprocessor. Without early
// reads most rows must have an adapter of their own.
bool row_blocks_fit(const BgmvArgs& args, int64_t outputs) {
  const int64_t blocks = args.batch * div_up(args.h_out, outputs);
  return blocks >= kFewBlocks && blocks <= 528 && (args.early_reads || args.batch <= 2 * args.num_adapters);
}

// What the kernels for one adapter take, about, in us, by measured times: bgmv_diagonal_kernel for every row, four
// outputs and step that a multiprocessor has,
double diagonal_time(const BgmvArgs& args) {
  const int64_t work = args.batch * div_up(args.h_out, 4 * kDiagonalWarps >> args.k_warp_bits) * args.steps;
  if (!args.vectors) return 4 + 0.006 * static_cast<double>(work);
  return 1.8 + 0.0011 * (args.steps > 4 ? 2.2 : 1.0) * static_cast<double>(work);
}

// bgmv_dense_kernel for every wave of tiles and step.
double dense_time(const BgmvArgs& args) {
  using Tile = DenseTile<kDenseOut, kDenseRow>;
  const int64_t tiles =
      div_up(args.batch, Tile::kRows) * div_up(args.h_out, Tile::kOutputs * kDenseWarps >> args.k_warp_bits);
  return (2.5 + (args.vectors ? 3.6 : 20.0) * args.steps) * static_cast<double>(div_up(tiles, 132)) *
         (args.k_warp_bits < 3 ? 1.3 : 1.0);
}

template <class T>
Status launch_dense(const Launcher& launcher, BgmvArgs args) {
  using Tile = DenseTile<kDenseOut, kDenseRow>;
  args.group_rows = Tile::kRows;
  return for_parts(args, div_up(args.h_out, Tile::kOutputs * kDenseWarps >> args.k_warp_bits), kMaxRows,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
                     LaunchShape shape;
                     shape.grid = dim3(row_blocks(part, rows), tile_count);
                     shape.block = dim3(kDenseThreads);
                     shape.shared_bytes = Tile::kSharedBytes;
                     return launcher.launch<bgmv_dense_kernel<Arch::kSm90, T, kDenseOut, kDenseRow>>(shape, part);
                   });
}

template <class T, int kOut, int kRow>
Status launch_shares(const Launcher& launcher, const BgmvArgs& args) {
  using Tile = SharesTile<kOut, kRow>;
  return for_parts(args, div_up(args.h_out, Tile::kOutputs), kMaxRows,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
                     LaunchShape shape;
                     shape.cluster = 1u << part.k_warp_bits;
                     shape.grid = dim3(static_cast<unsigned>(div_up(rows, Tile::kRows)) * shape.cluster, tile_count);
                     shape.block = dim3(kSharesThreads);
                     shape.shared_bytes = Tile::kSharedBytes;
                     return launcher.launch<bgmv_shares_kernel<Arch::kSm90, T, kOut, kRow>>(shape, part);
                   });
}

// bgmv_shares_kernel with each of its tiles: before its steps; for a step that waits for what it has asked for; where
// the blocks of a multiprocessor share what it can take in, for a step and a block of each.
struct SharesTime {
  int out, row;
  double base, wait, step, unaligned_wait, unaligned_step, block;
};
constexpr SharesTime kSharesTimes[] = {{1, 1, 1.65, 0.29, 0.26, 0.95, 0.9, 0.4},
                                       {1, 4, 1.85, 0.36, 0.6, 1.45, 1.85, 1.0},
                                       {2, 4, 2.3, 0.47, 0.75, 1.9, 2.1, 0.7},
                                       {4, 4, 3.1, 0.86, 1.15, 2.95, 2.6, 1.3}};

double shares_time(const BgmvArgs& args, const SharesTime& tile) {
  const int64_t blocks = (div_up(args.batch, 8 * tile.row) * div_up(args.h_out, 16 * tile.out)) << args.k_warp_bits;
  const double wait = args.steps * (args.vectors ? tile.wait : tile.unaligned_wait);
  const double step = args.vectors ? tile.step : tile.unaligned_step;
  const double block = (args.k_warp_bits < 2 ? 0.2 : 1.0) * tile.block;  // few shares of K to add up
  return tile.base + std::max(wait, static_cast<double>(blocks) / 132 * (args.steps * step + block));
}

int best_shares_tile(const BgmvArgs& args) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(std::size(kSharesTimes)); ++i) {
    if (shares_time(args, kSharesTimes[i]) < shares_time(args, kSharesTimes[best])) best = i;
  }
  return best;
}

template <class T>
Status launch_shares(const Launcher& launcher, const BgmvArgs& args, int tile) {
  switch (tile) {
    case 0:
      return launch_shares<T, 1, 1>(launcher, args);
    case 1:
      return launch_shares<T, 1, 4>(launcher, args);
    case 2:
      return launch_shares<T, 2, 4>(launcher, args);
    default:
      return launch_shares<T, 4, 4>(launcher, args);
  }
}

// Calls launch(shape, part) with so many chunks of rows that all blocks run at once.
template <class Tile, class Launch>
Status for_panels(const BgmvArgs& args, Launch launch) {
  const int64_t tiles = div_up(args.h_out, kPanelOutputs);
  return for_parts(args, tiles, kMaxRows, [&](BgmvArgs part, unsigned rows, unsigned tile_count) {
    const int64_t row_tiles = div_up(rows, Tile::kRows);
    part.steps = static_cast<int>(div_up(row_tiles, std::clamp(132 * Tile::kBlocks / tiles, int64_t{1}, row_tiles)));
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(div_up(row_tiles, part.steps)), tile_count);
    shape.block = dim3(Tile::kThreads);
    shape.shared_bytes = Tile::kSharedBytes;
    return launch(shape, part);
  });
}

template <class T, int kSteps>
Status launch_panel_short(const Launcher& launcher, const BgmvArgs& args) {
  return for_panels<PanelShortTile<kSteps>>(args, [&](const LaunchShape& shape, const BgmvArgs& part) {
    return launcher.launch<bgmv_panel_short_kernel<Arch::kSm90, T, kSteps>>(shape, part);
  });
}

template <class T, int kSteps, int kRow>
Status launch_panel(const Launcher& launcher, const BgmvArgs& args) {
  return for_panels<PanelTile<kSteps, kRow>>(args, [&](const LaunchShape& shape, const BgmvArgs& part) {
    return launcher.launch<bgmv_panel_kernel<Arch::kSm90, T, kSteps, kRow>>(shape, part);
  });
}

template <class T>
Status launch_panel(const Launcher& launcher, const BgmvArgs& args) {
  if (args.h_in <= kDiagonalStep) return launch_panel<T, 1, 2>(launcher, args);
  // By measured times.
  return args.batch * args.h_out >= 3000000 ? launch_panel<T, 2, 4>(launcher, args)
                                            : launch_panel<T, 2, 2>(launcher, args);
}

// Whether the kernels whose weights stay in shared memory take less time than others, as measured.
bool prefer_panel(const BgmvArgs& args) {
  if (!args.one_adapter || args.h_in > kPanelMaxIn || args.batch < 32) return false;
  const int64_t outputs = args.batch * args.h_out;
  return outputs >= (args.h_in <= 16 ? 4000000 : args.h_in <= 64 ? 1000000 : args.h_in <= kShortMax ? 850000 : 550000);
}

template <class T>
Status launch_panel_short(const Launcher& launcher, const BgmvArgs& args) {
  return args.h_in <= 16   ? launch_panel_short<T, 0>(launcher, args)
         : args.h_in <= 64 ? launch_panel_short<T, 2>(launcher, args)
                           : launch_panel_short<T, 4>(launcher, args);
}

template <class T>
Status launch_diagonal_or_dense(const Launcher& launcher, BgmvArgs args) {
  constexpr int kWarps = kDiagonalWarps;
  // As many warps share K as have two steps each; this fixes the order of the sums.
  const int64_t steps = div_up(args.h_in, kDiagonalStep);
  args.k_warp_bits = 0;
  while ((1 << args.k_warp_bits) < kWarps && (2 << args.k_warp_bits) < steps) ++args.k_warp_bits;
  args.steps = static_cast<int>(div_up(steps, 1 << args.k_warp_bits));
  const int tiles = kWarps >> args.k_warp_bits;
  // From here on nothing changes bits. Outputs of a warp: the more, the less often x is read; the fewer, the more
  // blocks.
  int ranks = args.steps <= 2 ? 4 : 2;
  while (ranks > 1 && args.batch * div_up(args.h_out, ranks * tiles) < 128) ranks /= 2;
  args.group_rows = kGroupRows;
  while (args.group_rows > 1 && args.batch / args.group_rows * div_up(args.h_out, ranks * tiles) < kFewBlocks) {
    args.group_rows /= 2;
  }
  if (args.one_adapter) {
    const double diagonal = diagonal_time(args), dense = dense_time(args);
    const int tile = best_shares_tile(args);
    const double shares = shares_time(args, kSharesTimes[tile]);
    if (shares < dense && shares + 0.15 < diagonal) return launch_shares<T>(launcher, args, tile);
    if (dense < diagonal) return launch_dense<T>(launcher, args);
  }
  const bool whole = args.k_warp_bits == 3 && args.h_in % (kWarps * kDiagonalStep) == 0;
  if (whole && args.steps == 2 && args.group_rows == 1 && args.vectors) {
    if (ranks == 1) return launch_direct_shrink<T, 1, false>(launcher, args);
    if (ranks == 4 && args.early_reads && !args.one_adapter && args.h_out % kRowOutputs == 0) {
      return launch_direct_shrink<T, kRowOutputs, true>(launcher, args);
    }
    if (ranks == 4) return launch_row_shrink<T>(launcher, args);
  }
  if (whole && args.steps == 7 && args.vectors && args.early_reads && !args.one_adapter &&
      args.h_out % kRowOutputs == 0 && row_blocks_fit(args, 2)) {
    return launch_row_shrink_long<T, 7>(launcher, args);
  }
  if (whole && args.steps == 2 && ranks == 4 && prefer_deep(args)) return launch_diagonal_deep<T>(launcher, args);
  switch (ranks) {
    case 1:
      return whole && args.steps <= 8 ? launch_diagonal<T, 1, 8, true, false>(launcher, args)
                                      : launch_diagonal<T, 1, 8, false, true>(launcher, args);
    case 2:
      return !whole            ? launch_diagonal<T, 2, 4, false, true>(launcher, args)
             : args.steps <= 4 ? launch_diagonal<T, 2, 4, true, false>(launcher, args)
                               : launch_diagonal<T, 2, 4, true, true>(launcher, args);
    default:
      return whole ? launch_diagonal<T, 4, 2, true, false>(launcher, args)
                   : launch_diagonal<T, 4, 2, false, false>(launcher, args);
  }
}

template <class T, int kSteps, int kRounds, bool kDeep = false>
Status launch_bulk_short(const Launcher& launcher, BgmvArgs args) {
  args.group_rows = kMaxGroupRows;
  // Groups of eight cost least, except that in a chain, where the weights are there early, what one row after the other
  // takes is what others wait for.
  const bool fewer = args.early_reads && kSteps == 0;
  const int64_t tiles = div_up(args.h_out, kRounds * kBlockRoundRows);
  while (args.group_rows > (fewer ? 1 : kGroupRows) &&
         args.batch / args.group_rows * tiles < (fewer ? 2 * kFewBlocks : kFewBlocks)) {
    args.group_rows /= 2;
  }
  while (args.group_rows > 1 && args.group_rows / 2 >= args.batch) args.group_rows /= 2;
  // Pairs of rows save less than the search for them takes.
  if (kDeep && args.group_rows == 2) args.group_rows = 1;
  return for_parts(
      args, div_up(args.h_out, kDeep ? 2 * kRounds * kDeepTileRounds : kRounds * kBlockRoundRows), kMaxRows,
      [&](const BgmvArgs& part, unsigned rows, unsigned tiles) {
        LaunchShape shape;
        shape.grid = dim3(row_blocks(part, rows), tiles);
        if constexpr (kDeep) {
          shape.block = dim3(32 * kDeepWarps);
          shape.shared_bytes = std::max(bulk_deep_shared_bytes(part.h_in, kRounds), deep_shared_bytes(1));
          return launcher.launch<bgmv_bulk_deep_kernel<Arch::kSm90, T, kSteps, kRounds>>(shape, part);
        } else {
          shape.block = dim3(kBulkThreads);
          shape.shared_bytes = bulk_short_shared_bytes<false>(part.h_in, kRounds);
          if constexpr (kSteps == 0 && kRounds == 1) {  // more rounds are for more blocks
            // Its blocks take few registers; where there are many, those of too many kernels of a
            // chain would ask for weights before the first has what it needs.
            if (part.group_rows == 1 && static_cast<int64_t>(rows) * tiles < kFewBlocks) {
              shape.shared_bytes = bulk_short_shared_bytes<true>(part.h_in, kRounds);
              return launcher.launch<bgmv_bulk_short_kernel<Arch::kSm90, T, kSteps, kRounds, true>>(shape, part);
            }
          }
          return launcher.launch<bgmv_bulk_short_kernel<Arch::kSm90, T, kSteps, kRounds, false>>(shape, part);
        }
      });
}

template <class T, int kSteps>
Status launch_bulk_short(const Launcher& launcher, const BgmvArgs& args) {
  // As many outputs a block as make 16 KiB of weights; fewer where the batch is small.
  int rounds = kBulkRounds<kSteps>;
  const int64_t groups = args.one_adapter ? div_up(args.batch, kGroupRows) : args.batch;
  while (rounds > 1 && (rounds * kBlockRoundRows * args.h_in > 8192 ||
                        groups * div_up(args.h_out, rounds * kBlockRoundRows) < kFewBlocks)) {
    rounds /= 2;
  }
  // Alone, twice as many blocks if all run at once: their loads start earlier.
  if (kSteps == 0 && !args.early_reads && rounds == 4 && args.batch * div_up(args.h_out, 2 * kBlockRoundRows) <= 1056) {
    rounds = 2;
  }
  // Blocks with two tiles of twice as many outputs: for chains, where there are enough of them.
  const bool deep =
      args.early_reads && !args.one_adapter && args.batch * div_up(args.h_out, rounds * kBlockRoundRows) >= 1024;
  if constexpr (kSteps == 0) {
    if (deep && rounds == 4) return launch_bulk_short<T, 0, 4, true>(launcher, args);
  } else if constexpr (kSteps == 2) {
    if (deep && rounds == 1) return launch_bulk_short<T, 2, 1, true>(launcher, args);
  }
  if constexpr (kBulkRounds<kSteps> >= 4) {
    if (rounds == 4) return launch_bulk_short<T, kSteps, 4>(launcher, args);
  }
  if constexpr (kBulkRounds<kSteps> >= 2) {
    if (rounds == 2) return launch_bulk_short<T, kSteps, 2>(launcher, args);
  }
  return launch_bulk_short<T, kSteps, 1>(launcher, args);
}

template <class T>
Status launch_sm90(const Launcher& launcher, BgmvArgs args) {
  if (prefer_panel(args)) {
    return args.h_in > kShortMax ? launch_panel<T>(launcher, args) : launch_panel_short<T>(launcher, args);
  }
  if (args.h_in > kShortMax) return launch_diagonal_or_dense<T>(launcher, args);
  if (args.h_in == 16 && args.vectors && !args.early_reads && args.h_out % 32 == 0 &&
      args.batch * div_up(args.h_out, 32 * kDirectWarps) < kFewBlocks) {
    return launch_direct_expand<T, 1, false>(launcher, args);
  }
  if (args.h_in == 16 && args.vectors && args.wide_y && !args.one_adapter && args.h_out % kRowTile == 0) {
    if (row_blocks_fit(args, 8 * kRowTile)) {
      return args.early_reads ? launch_direct_expand<T, 4, true>(launcher, args)
                              : launch_row_expand<T, 1>(launcher, args, 8);
    }
    // Two tiles a warp where they need all shared memory that two blocks have: 112 KiB each.
    if (args.h_out % (28 * kRowTile) == 0 && row_blocks_fit(args, 14 * kRowTile)) {
      return launch_row_expand<T, 2>(launcher, args, 14);
    }
  }
  return args.h_in <= 16   ? launch_bulk_short<T, 0>(launcher, args)
         : args.h_in <= 64 ? launch_bulk_short<T, 2>(launcher, args)
                           : launch_bulk_short<T, 4>(launcher, args);
}

// ---- sm_80 ---------------------------------------------------------------------------------------------------------

template <class T>
Status launch_long(const Launcher& launcher, BgmvArgs args) {
  constexpr int kWarps = kLongThreads / 32;
  args.steps = static_cast<int>(div_up(div_up(args.h_in, kLongStep), kWarps));
  return for_parts(args, div_up(args.h_out, kLongRows), kMaxRows,
                   [&](const BgmvArgs& part, unsigned rows, unsigned tiles) {
                     LaunchShape shape;
                     shape.grid = dim3(rows, tiles);
                     shape.block = dim3(kLongThreads);
                     shape.shared_bytes = long_shared_bytes(kLongThreads);
                     return launcher.launch<bgmv_long_kernel<Arch::kSm80, T>>(shape, part);
                   });
}

template <class T, int kCount>
Status launch_short(const Launcher& launcher, const BgmvArgs& args) {
  // Where there are more blocks than run at once, each takes twice as many outputs: both halves are in flight from the
  // start, and what finding its rows takes is paid once for them. Changes no bits: no output depends on its block.
  constexpr int64_t kWave = kCount == 2 ? 1056 : 528, kMaxRounds = kShortStages;
  const int64_t blocks = div_up(args.h_out, kShortWarps * kShortRows);
  const int64_t rounds = std::clamp((args.batch * blocks + kWave / 2) / kWave, int64_t{1}, kMaxRounds);
  const int64_t grid_y = std::min(div_up(blocks, rounds), kMaxTiles);
  return for_parts(args, grid_y, kMaxRows, [&](const BgmvArgs& part, unsigned rows, unsigned tiles) {
    LaunchShape shape;
    shape.grid = dim3(rows, tiles);
    shape.block = dim3(32 * kShortWarps);
    return launcher.launch<bgmv_short_kernel<Arch::kSm80, T, kCount>>(shape, part);
  });
}

template <class T>
Status launch_sm80(const Launcher& launcher, BgmvArgs args) {
  if (args.h_in > kShortMax) return launch_long<T>(launcher, args);
  args.vectors = args.vectors && reinterpret_cast<uintptr_t>(args.y) % (2 * sizeof(T)) == 0 && args.y_stride % 2 == 0 &&
                 args.h_out % 2 == 0;
  return args.h_in <= 16 ? launch_short<T, 2>(launcher, args) : launch_short<T, 4>(launcher, args);
}

// ---- Both ----------------------------------------------------------------------------------------------------------

template <Arch kArch>
Status launch_float32(const Launcher& launcher, BgmvArgs args) {
  args.team = 4;
  while (args.team < 32 && 4 * args.team < args.h_in) args.team *= 2;
  if (args.h_in > 32 * 4 * kFloatBatch) args.team = kFloatThreads;
  const int64_t tiles = div_up(args.h_out, kFloatRows * (kFloatThreads / args.team));
  return for_parts(args, tiles, kMaxRows, [&](const BgmvArgs& part, unsigned rows, unsigned tile_count) {
    LaunchShape shape;
    shape.grid = dim3(rows, tile_count);
    shape.block = dim3(kFloatThreads);
    return launcher.launch<bgmv_float32_kernel<kArch>>(shape, part);
  });
}

template <Arch kArch, class T>
Status launch(const Launcher& launcher, BgmvArgs args) {
  const int64_t lane_bytes = sizeof(T) == 2 && args.h_in <= 16 ? 8 : 16;
  const int64_t lane_elements = lane_bytes / static_cast<int64_t>(sizeof(T));
  args.vectors = reinterpret_cast<uintptr_t>(args.x) % lane_bytes == 0 && args.x_stride % lane_elements == 0 &&
                 args.h_in % lane_elements == 0;
  args.wide_y = reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.y_stride * sizeof(T) % 16 == 0 &&
                args.h_out * sizeof(T) % 16 == 0;
  args.one_adapter = kArch == Arch::kSm90 && sizeof(T) == 2 && args.num_adapters == 1;
  if constexpr (sizeof(T) == 4) {
    return launch_float32<kArch>(launcher, args);
  } else if constexpr (kArch == Arch::kSm90) {
    return launch_sm90<T>(launcher, args);
  } else {
    return launch_sm80<T>(launcher, args);
  }
}

}  // namespace

Status dispatch_bgmv(const BgmvParams& p, const Context& context) {
  if (p.x.shape[1] > kMaxWidth || p.y.shape[1] > kMaxWidth) {
    return {StatusCode::kUnsupported, "dispatch_bgmv: on CUDA h_in and h_out must be at most 1073741824"};
  }
  BgmvArgs args = {};
  args.y = p.y.data;
  args.x = p.x.data;
  args.w_ptr = p.w_ptr.as<const int64_t>();
  args.indices = p.indices.as<const int64_t>();
  args.y_stride = p.y.stride[0];
  args.x_stride = p.x.stride[0];
  args.num_adapters = p.w_ptr.shape[0];
  args.batch = p.y.shape[0];
  args.h_in = static_cast<int>(p.x.shape[1]);
  args.h_out = static_cast<int>(p.y.shape[1]);
  args.layer_offset = p.layer_idx * args.h_out * args.h_in;
  args.scale = p.scale;
  return on_device("dispatch_bgmv", p.y.device, context, [&](const Launcher& launcher) {
    args.early_reads = launcher.early_reads;
    return with_type(p.y.dtype, [&](auto t) {
      using T = decltype(t);
      return launcher.arch == Arch::kSm90 ? launch<Arch::kSm90, T>(launcher, args)
                                          : launch<Arch::kSm80, T>(launcher, args);
    });
  });
}

}  // namespace punica::cuda
