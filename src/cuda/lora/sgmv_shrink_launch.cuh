// Which kernel of sgmv_shrink.cuh serves a call, with how many blocks to a cluster.
#pragma once

#include <algorithm>

#include "src/cuda/lora/sgmv_tall.cuh"

namespace punica::cuda {

// The parts of d_in: a function of d_in alone, as the sum is.
inline int shrink_parts(int64_t d_in) {
  return d_in < 1024 ? 1 : d_in < 2048 ? 2 : d_in < 4096 ? 4 : d_in < 16384 ? 8 : 16;
}

inline constexpr int kPortableCluster = 8;

// Clusters that an H200 (132 multiprocessors, in groups of 16 and 18) runs at once.
inline int64_t shrink_room(int blocks, int cluster) { return blocks * (cluster <= 2 ? 132 : 120) / cluster; }

template <class T, bool kInOut, int kN, int kRows, int kBlocks, bool kRaw>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args, ShrinkPlan plan) {
  using S = Shrink<kInOut, kN, kRows, kBlocks, kRaw>;
  LaunchShape shape;
  plan.items = max_tiles(args, kRows) * ((args.d_out + kN - 1) / kN);
  shape.grid = static_cast<unsigned>(std::min(plan.items, shrink_room(kBlocks, plan.cluster)) * plan.cluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = plan.cluster;
  const Status status =
      launcher.launch<sgmv_shrink<Arch::kSm90, T, kInOut, kN, kRows, kBlocks, kRaw>>(shape, args, plan);
  if (status.ok() || plan.cluster <= kPortableCluster) return status;
  // A GPU without 16 multiprocessors in a group: fewer blocks to a cluster, with the same sums.
  plan.cluster = kPortableCluster;
  return launch_shrink<T, kInOut, kN, kRows, kBlocks, kRaw>(launcher, args, plan);
}

template <class T, bool kInOut, int kN, int kWide, int kWarpgroups, int kLevels>
Status launch_tall(const Launcher& launcher, const SgmvArgs& args, const ShrinkPlan& plan) {
  using S = Tall<kN, kWide, kWarpgroups, kLevels>;
  LaunchShape shape;
  shape.grid =
      static_cast<unsigned>(max_tiles(args, S::kRows) * ((args.d_out + S::kColumns - 1) / S::kColumns) * plan.cluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kRingBytes;
  shape.cluster = plan.cluster;
  return launcher.launch<sgmv_tall<Arch::kSm90, T, kInOut, kN, kWide, kWarpgroups, kLevels>>(shape, args, plan);
}

// Chooses the rows of a tile and the blocks of a cluster by a model of the time, whose constants were measured on an
// H200: every round of blocks takes what its bytes or its steps take, and 3 us of latencies. Arithmetic is as
// shrink_parts says, whatever is chosen.
template <class T, bool kInOut, int kN>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args) {
  const bool raw = !args.x_aligned || args.d_in % 8 != 0 || (kInOut && args.d_out % 8 != 0);
  ShrinkPlan plan = {};
  plan.parts = shrink_parts(args.d_in);
  const int64_t segments = args.num_segments < args.rows ? args.num_segments : args.rows;
  const int64_t length = (args.rows + segments - 1) / segments;
  plan.cluster = plan.parts >> shrink_levels(kN) > 1 ? plan.parts >> shrink_levels(kN) : 1;
  int rows = 16, wide = 1;
  bool is_short = true, is_tall = false;
  double best = 1e30;
  const auto consider = [&](int tile_rows, int blocks) {
    const int64_t items = segments * ((length + tile_rows - 1) / tile_rows) * ((args.d_out + kN - 1) / kN);
    for (int cluster = 1; cluster <= plan.parts; cluster *= 2) {
      if (plan.parts / cluster > 1 << shrink_levels(kN)) continue;
      const int64_t room = shrink_room(blocks, cluster), rounds = (items + room - 1) / room;
      const int64_t crowd = std::min<int64_t>(blocks, (items * cluster + 131) / 132);
      // Bytes a microsecond: of the bus, of what is on its way. A step takes its time too.
      const double rate = std::min(60e3 / crowd, 140e3 / blocks), part = static_cast<double>(args.d_in) / cluster;
      const double time = rounds * (std::max((tile_rows + kN) * 2.0 * part / rate, part / 128 * 0.28) + 3);
      if (time < best) best = time, rows = tile_rows, is_short = blocks > 1, plan.cluster = cluster;
    }
  };
  const auto consider_tall = [&](int tile_rows, int tile_wide, int levels) {
    if (length <= tile_rows - 64 || length <= 32) return;
    const int64_t columns = kN * tile_wide;
    const int64_t items = segments * ((length + tile_rows - 1) / tile_rows) * ((args.d_out + columns - 1) / columns);
    for (int cluster = 1; cluster <= std::min(plan.parts, kPortableCluster); cluster *= 2) {
      if (plan.parts / cluster > 1 << levels) continue;
      const int64_t room = shrink_room(1, cluster), rounds = (items + room - 1) / room;
      const double part = static_cast<double>(args.d_in) / cluster;
      const double time = rounds * ((std::min<int64_t>(tile_rows, length) + columns) * 2.0 * part / 50e3 + 3);
      if (time < best) best = time, rows = tile_rows, wide = tile_wide, is_tall = true, plan.cluster = cluster;
    }
  };
  constexpr int kShortBlocks = kN == 32 ? 3 : 2;
  consider(16, 1);
  consider(16, kShortBlocks);
  consider(64, 1);
  if (raw) {
    return rows == 16 ? launch_shrink<T, kInOut, kN, 16, kShortBlocks, true>(launcher, args, plan)
                      : launch_shrink<T, kInOut, kN, 64, 1, true>(launcher, args, plan);
  }
  if (kN == 32 || args.d_out <= kN) {
    consider_tall(192, 1, 1);
  } else {
    consider_tall(64, 2, 2);
    consider_tall(128, 2, 2);
    consider_tall(192, 2, 1);
  }
  if (is_tall) {
    if constexpr (kN == 64) {
      if (wide == 2) {
        return rows == 64    ? launch_tall<T, kInOut, kN, 2, 1, 2>(launcher, args, plan)
               : rows == 128 ? launch_tall<T, kInOut, kN, 2, 2, 2>(launcher, args, plan)
                             : launch_tall<T, kInOut, kN, 2, 3, 1>(launcher, args, plan);
      }
    }
    return launch_tall<T, kInOut, kN, 1, 3, 1>(launcher, args, plan);
  }
  if (rows == 16) {
    return is_short ? launch_shrink<T, kInOut, kN, 16, kShortBlocks, false>(launcher, args, plan)
                    : launch_shrink<T, kInOut, kN, 16, 1, false>(launcher, args, plan);
  }
  return launch_shrink<T, kInOut, kN, 64, 1, false>(launcher, args, plan);
}

template <class T, bool kInOut>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args) {
  if (args.d_out <= 32) return launch_shrink<T, kInOut, 32>(launcher, args);
  return launch_shrink<T, kInOut, 64>(launcher, args);
}

}  // namespace punica::cuda
