// Launches of sgmv_shrink.cuh.
#pragma once

#include <algorithm>

#include "src/cuda/lora/sgmv_shrink.cuh"

namespace punica::cuda {

template <class T, bool kInOut, int kN, int kRows, int kBlocks>
Status launch_shrink_as(const Launcher& launcher, const SgmvArgs& args, ShrinkPlan plan) {
  using S = Shrink<kInOut, kN, kRows, kBlocks>;
  LaunchShape shape;
  plan.items = max_tiles(args, kRows) * ((args.d_out + kN - 1) / kN);
  shape.grid = static_cast<unsigned>(std::min(plan.items, shrink_room(kBlocks, plan.cluster)) * plan.cluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = plan.cluster;
  const Status status = launcher.launch<sgmv_shrink<Arch::kSm90, T, kInOut, kN, kRows, kBlocks>>(shape, args, plan);
  if (status.ok() || plan.cluster <= kPortableCluster) return status;
  // A GPU without 16 multiprocessors in a group: fewer blocks to a cluster, with the same sums.
  plan.cluster = kPortableCluster;
  return launch_shrink_as<T, kInOut, kN, kRows, kBlocks>(launcher, args, plan);
}

template <class T, bool kInOut, int kN>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args, const ShrinkPlan& plan, int rows) {
  return rows == 16 ? launch_shrink_as<T, kInOut, kN, 16, kShortShrinkBlocks<kN>>(launcher, args, plan)
                    : launch_shrink_as<T, kInOut, kN, 64, 1>(launcher, args, plan);
}

}  // namespace punica::cuda
