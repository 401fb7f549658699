// Which kernel of sgmv_shrink.cuh and sgmv_tall.cuh serves a call, with how many blocks to a cluster.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

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
constexpr TallShape kNarrowShapes[] = {{16, 1, 3, 0.13}, {64, 1, 3, 0.15}, {192, 1, 1, 0.2}};
constexpr TallShape kWideShapes[] = {{16, 1, 2, 0.13}, {64, 1, 2, 0.15},  {128, 1, 2, 0.2}, {192, 1, 1, 0.25},
                                     {64, 2, 2, 0.22}, {128, 2, 2, 0.36}, {192, 2, 1, 0.4}};

// Chooses the rows of a tile and the blocks of a cluster by a model of the time, whose constants were measured on an
// H200: every round of blocks takes what its bytes or its steps take, and some us of latencies. Arithmetic is as
// shrink_parts says, whatever is chosen.
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
  ShrinkTile tile = {16, 1};
  const auto consider = [&](const TallShape& shape) {
    const int64_t columns = kN * shape.wide;
    if (shape.wide > 1 && args.d_out <= kN) return;
    const int64_t items = segments * ((length + shape.rows - 1) / shape.rows) * ((args.d_out + columns - 1) / columns);
    for (int cluster = 1; cluster <= plan.parts; cluster *= 2) {
      if (plan.parts / cluster > 1 << shape.levels) continue;
      const int64_t room = shrink_room(1, cluster), rounds = (items + room - 1) / room;
      // Bytes a microsecond, of what the second-level cache gives to all blocks.
      const double rate = std::min(80e3, 6.1e6 / static_cast<double>(std::min(items, room) * cluster));
      const double part = static_cast<double>(args.d_in) / cluster;
      const double time = rounds * (std::max((shape.rows + columns) * 2.0 * part / rate, part / 64 * shape.step) + 3.3);
      if (time < best) best = time, tile = {shape.rows, shape.wide}, plan.cluster = cluster;
    }
  };
  if constexpr (kN == 32) {
    for (const TallShape& shape : kNarrowShapes) consider(shape);
  } else {
    for (const TallShape& shape : kWideShapes) consider(shape);
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
