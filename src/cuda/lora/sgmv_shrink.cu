// Which kernel of sgmv_shrink.cuh and sgmv_tall.cuh serves a call, with how many blocks to a cluster.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "src/cuda/lora/sgmv_shrink_plan.h"

namespace punica::cuda {
namespace {

// The parts of d_in: a function of d_in alone, as the sum is.
int shrink_parts(int64_t d_in) { return d_in < 1024 ? 1 : d_in < 2048 ? 2 : d_in < 4096 ? 4 : d_in < 16384 ? 8 : 16; }

// Tiles of sgmv_tall.cuh, and what a block takes for 64 of d_in, in us.
struct TallShape {
  int rows, wide, levels;
  double step;
};
constexpr TallShape kNarrowShapes[] = {{16, 1, 3, 0.149}, {64, 1, 3, 0.14}, {192, 1, 1, 0.212}};
constexpr TallShape kWideShapes[] = {{16, 1, 2, 0.149}, {64, 1, 2, 0.14},   {128, 1, 2, 0.2}, {192, 1, 1, 0.212},
                                     {64, 2, 2, 0.193}, {128, 2, 2, 0.414}, {192, 2, 1, 0.45}};

// Bytes a microsecond that a multiprocessor takes, with tiles of up to 64 rows and of more, that the second-level cache
// gives to all, and the memory.
constexpr double kBlockRate = 57.6e3, kTallBlockRate = 35.5e3, kCacheRate = 10.3e6, kMemoryRate = 4.2e6;
// Microseconds of a round of blocks: of latencies, of 16 sums a thread in the end, of doubling the blocks of a cluster.
constexpr double kRoundTime = 3.575, kSumsTime = 0.44, kClusterTime = 0.09;

// Chooses the rows and columns of a tile and the blocks of a cluster by a model of the time, whose constants were
// fitted to times of 80 shapes on an H200, each with all tiles (on average the choice takes 1.2% more than the best
// one). Arithmetic is as shrink_parts says, whatever is chosen.
template <class T, bool kInOut, int kN>
Status choose(const Launcher& launcher, const SgmvArgs& args) {
  const bool raw = !args.x_aligned || args.d_in % 8 != 0 || (kInOut && args.d_out % 8 != 0);
  ShrinkPlan plan = {};
  plan.parts = shrink_parts(args.d_in);
  const int64_t segments = args.num_segments < args.rows ? args.num_segments : args.rows;
  const int64_t length = (args.rows + segments - 1) / segments;
  plan.cluster = plan.parts >> shrink_levels(kN) > 1 ? plan.parts >> shrink_levels(kN) : 1;
  double best = 1e30;
  if (raw) {
    int rows = 16;
    const auto consider = [&](int tile_rows, int blocks) {
      const int64_t items = segments * ((length + tile_rows - 1) / tile_rows) * ((args.d_out + kN - 1) / kN);
      for (int cluster = 1; cluster <= plan.parts; cluster *= 2) {
        if (plan.parts / cluster > 1 << shrink_levels(kN)) continue;
        const int64_t room = shrink_room(blocks, cluster), rounds = (items + room - 1) / room;
        const int64_t crowd = std::min<int64_t>(blocks, (items * cluster + 131) / 132);
        // Bytes a microsecond: of the bus, of what is on its way. A step takes its time too.
        const double rate = std::min(60e3 / crowd, 140e3 / blocks), part = static_cast<double>(args.d_in) / cluster;
        const double time = rounds * (std::max((tile_rows + kN) * 2.0 * part / rate, part / 128 * 0.28) + 3);
        if (time < best) best = time, rows = tile_rows, plan.cluster = cluster;
      }
    };
    consider(16, 1);
    consider(16, kShortShrinkBlocks<kN>);
    consider(64, 1);
    return launch_shrink<T, kInOut, kN>(launcher, args, plan, rows);
  }
  ShrinkTile tile = {16, 1, 1};
  const double bytes = 2.0 * static_cast<double>(args.d_in) * static_cast<double>(args.rows + segments * args.d_out);
  const auto consider = [&](const TallShape& shape, int blocks) {
    const int64_t columns = kN * shape.wide;
    if (shape.wide > 1 && args.d_out <= kN) return;
    const int64_t items = segments * ((length + shape.rows - 1) / shape.rows) * ((args.d_out + columns - 1) / columns);
    for (int cluster = 1; cluster <= plan.parts; cluster *= 2) {
      if (plan.parts / cluster > 1 << shape.levels) continue;
      const int64_t room = shrink_room(blocks, cluster), rounds = (items + room - 1) / room;
      const double rate = std::min((shape.rows > 64 ? kTallBlockRate : kBlockRate) / blocks,
                                   kCacheRate / static_cast<double>(std::min(items, room) * cluster));
      const double part = static_cast<double>(args.d_in) / cluster;
      const double steps = std::max((shape.rows + columns) * 2.0 * part / rate, part / 64 * shape.step);
      // Sums that a thread adds up in the end, in units of 16.
      const double units = static_cast<double>(shape.rows) * columns / 16 / (2 * std::max(shape.rows, 64) * cluster);
      const double round = steps + kRoundTime + kSumsTime * units + kClusterTime * std::log2(cluster);
      const double time = std::max(rounds * round, bytes / kMemoryRate);
      if (time < best) best = time, tile = {shape.rows, shape.wide, blocks}, plan.cluster = cluster;
    }
  };
  const auto consider_all = [&](const auto& shapes) {
    for (const TallShape& shape : shapes) {
      consider(shape, 1);
      if (shape.rows == 16) consider(shape, 2);
    }
  };
  if constexpr (kN == 32) {
    consider_all(kNarrowShapes);
  } else {
    consider_all(kWideShapes);
  }
  return launch_tall<T, kInOut, kN>(launcher, args, plan, tile);
}

template <bool kInOut>
Status choose(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  if (dtype == DType::kFloat16) {
    return args.d_out <= 32 ? choose<__half, kInOut, 32>(launcher, args) : choose<__half, kInOut, 64>(launcher, args);
  }
  return args.d_out <= 32 ? choose<__nv_bfloat16, kInOut, 32>(launcher, args)
                          : choose<__nv_bfloat16, kInOut, 64>(launcher, args);
}

}  // namespace

Status launch_sgmv_shrink_out_in(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return choose<false>(launcher, dtype, args);
}

Status launch_sgmv_shrink_in_out(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return choose<true>(launcher, dtype, args);
}

}  // namespace punica::cuda
