// What the host side and the kernels of sgmv share.
#pragma once

#include <cstdint>

#include "punica/lora.h"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Rows of a tile. A tile lies inside one segment, so a segment leaves at most one tile partly empty.
inline constexpr int kSgmvRows = 64;

// Threads of a block, in every kernel of sgmv.
inline constexpr int kSgmvThreads = 256;

struct SgmvArgs {
  void* y;
  const void* x;
  const int64_t* w_ptr;
  const int32_t* s_start;
  const int32_t* s_end;
  int64_t y_stride;  // elements, of rows
  int64_t x_stride;
  int64_t rows;
  int64_t d_in;
  int64_t d_out;
  int64_t w_offset;  // elements from the adapter's address to the layer's weights
  int64_t num_segments;
  bool y_aligned;  // every row starts at a multiple of 16 bytes
  bool x_aligned;
  bool early_reads;
};

// Enough tiles for any segments that do not overlap: a segment of n rows has (n + 63) / 64 of them, and at most n.
inline int64_t max_tiles(const SgmvArgs& args) {
  const int64_t tiles = (args.rows + (kSgmvRows - 1) * args.num_segments) / kSgmvRows;
  return tiles < args.rows ? tiles : args.rows;
}

// float16 and bfloat16 where d_in is large and d_out small: x is what moves.
Status launch_sgmv_deep(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float16 and bfloat16 otherwise: y is what moves, or nothing is small.
Status launch_sgmv_wide(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float32.
Status launch_sgmv_float(const Launcher& launcher, SgmvWeights weights, const SgmvArgs& args);

}  // namespace punica::cuda
