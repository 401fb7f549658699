// Launches of sgmv_tall.cuh: tensor maps and shapes of tiles.
#pragma once

#include "src/cuda/lora/sgmv_shrink_plan.h"
#include "src/cuda/lora/sgmv_tall.cuh"

namespace punica::cuda {

template <class T, bool kInOut, int kN, int kWide, int kRows, int kLevels, int kBlocks = 1>
Status launch_tall_as(const Launcher& launcher, const SgmvArgs& args, ShrinkPlan plan) {
  using S = Tall<kN, kWide, kRows, kLevels, kBlocks>;
  LaunchShape shape;
  shape.grid =
      static_cast<unsigned>(max_tiles(args, kRows) * ((args.d_out + S::kColumns - 1) / S::kColumns) * plan.cluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kRingBytes;
  shape.cluster = plan.cluster;
  CUtensorMap x_map, w_map;
  const int64_t x_stride = args.rows > 1 ? args.x_stride : args.d_in;  // of a single row it may be anything
  const MatrixMap x = {args.d_in, args.rows, x_stride, 64, kRows};
  const MatrixMap w = kInOut ? MatrixMap{args.d_out, args.d_in, args.d_out, kN, 64}
                             : MatrixMap{args.d_in, args.d_out, args.d_in, 64, S::kColumns};
  cudaError_t error = matrix_map(args.x, x, &x_map);
  if (error == cudaSuccess) error = matrix_map_anywhere(w, &w_map);
  if (error != cudaSuccess) return to_status(launcher.op(), error);
  const Status status = launcher.launch<sgmv_tall<Arch::kSm90, T, kInOut, kN, kWide, kRows, kLevels, kBlocks>>(
      shape, args, plan, x_map, w_map);
  if (status.ok() || plan.cluster <= kPortableCluster) return status;
  // A GPU without 16 multiprocessors in a group: fewer blocks to a cluster, with the same sums.
  plan.cluster = kPortableCluster;
  return launch_tall_as<T, kInOut, kN, kWide, kRows, kLevels, kBlocks>(launcher, args, plan);
}

template <class T, bool kInOut, int kN>
Status launch_tall(const Launcher& launcher, const SgmvArgs& args, const ShrinkPlan& plan, const ShrinkTile& tile) {
  const auto [rows, wide, blocks] = tile;
  if constexpr (kN == 64) {
    if (wide == 2) {
      return rows == 64    ? launch_tall_as<T, kInOut, kN, 2, 64, 2>(launcher, args, plan)
             : rows == 128 ? launch_tall_as<T, kInOut, kN, 2, 128, 2>(launcher, args, plan)
                           : launch_tall_as<T, kInOut, kN, 2, 192, 1>(launcher, args, plan);
    }
    if (rows == 128) return launch_tall_as<T, kInOut, kN, 1, 128, 2>(launcher, args, plan);
  }
  if (rows == 16 && blocks == 2)
    return launch_tall_as<T, kInOut, kN, 1, 16, shrink_levels(kN), 2>(launcher, args, plan);
  if (rows == 16) return launch_tall_as<T, kInOut, kN, 1, 16, shrink_levels(kN)>(launcher, args, plan);
  if (rows == 64) return launch_tall_as<T, kInOut, kN, 1, 64, shrink_levels(kN)>(launcher, args, plan);
  return launch_tall_as<T, kInOut, kN, 1, 192, 1>(launcher, args, plan);
}

}  // namespace punica::cuda
