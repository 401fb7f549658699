// How a call of sgmv whose sums are long is cut into blocks (sgmv_shrink.cuh, sgmv_tall.cuh), and the launches of that.
#pragma once

#include <cstdint>

#include "src/cuda/lora/sgmv.h"

namespace punica::cuda {

struct ShrinkPlan {
  int parts;      // of d_in: a power of 2
  int cluster;    // blocks that share them: a power of 2, at most `parts`
  int64_t items;  // tiles times blocks of columns, or more: there are no more if segments do not overlap
};

struct ShrinkTile {
  int rows;
  int wide;    // its columns, in kN
  int blocks;  // of a multiprocessor
};

inline constexpr int kPortableCluster = 8;

// Levels of the tree of parts within a block, as registers allow.
constexpr int shrink_levels(int columns) { return columns == 32 ? 3 : 2; }

// Clusters that an H200 (132 multiprocessors, in groups of 16 and 18) runs at once.
inline int64_t shrink_room(int blocks, int cluster) { return blocks * (cluster <= 2 ? 132 : 120) / cluster; }

// Blocks of sgmv_shrink.cuh to a multiprocessor with tiles of 16 rows.
template <int kN>
inline constexpr int kShortShrinkBlocks = kN == 32 ? 3 : 2;

// sgmv_shrink.cuh, with tiles of 16 or 64 rows.
template <class T, bool kInOut, int kN>
Status launch_shrink(const Launcher& launcher, const SgmvArgs& args, const ShrinkPlan& plan, int rows);

// sgmv_tall.cuh.
template <class T, bool kInOut, int kN>
Status launch_tall(const Launcher& launcher, const SgmvArgs& args, const ShrinkPlan& plan, const ShrinkTile& tile);

}  // namespace punica::cuda
