// What the host side and the kernels of sgmv share.
#pragma once

#include <cstdint>

#include "punica/lora.h"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Rows of a tile, where nothing else is said. A tile lies inside one segment, so a segment leaves at most one tile
// partly empty.
inline constexpr int kSgmvRows = 64;

// Threads of a block, where nothing else is said.
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
  // Of sgmv_expand.cu alone.
  int y_shift;     // elements from the last multiple of 16 bytes to a row of y, if y_vectors
  bool y_vectors;  // that is the same for all rows
  bool x_fours;    // all rows of x are made of four elements at multiples of 8 bytes
};

// Enough tiles of n rows for any segments that do not overlap: one of m rows has (m + n - 1) / n of them, and at most
// m.
inline int64_t max_tiles(const SgmvArgs& args, int tile_rows) {
  const int64_t tiles = (args.rows + (tile_rows - 1) * args.num_segments) / tile_rows;
  return tiles < args.rows ? tiles : args.rows;
}

// Segments of 16 rows or less on average: tiles of 16 rows serve them better. A choice of tiles, not of arithmetic.
inline bool short_segments(const SgmvArgs& args) { return args.rows <= 16 * args.num_segments; }

// float16 and bfloat16, W [d_out, d_in], sm_90, where d_in is large and d_out at most 16: x is what moves.
Status launch_sgmv_stream(const Launcher& launcher, DType dtype, const SgmvArgs& args);
// The same bits for d_in up to 4096 and rows of x at multiples of 16 bytes: where rows are many and segments long, and
// otherwise.
bool is_sgmv_rows(const SgmvArgs& args);
Status launch_sgmv_rows(const Launcher& launcher, DType dtype, const SgmvArgs& args);
bool is_sgmv_short(const SgmvArgs& args);
Status launch_sgmv_short(const Launcher& launcher, DType dtype, const SgmvArgs& args);
// The same bits for few rows at multiples of 16 bytes.
bool is_sgmv_split(const SgmvArgs& args);
Status launch_sgmv_split(const Launcher& launcher, DType dtype, const SgmvArgs& args);
// The same with d_out above 16 and at most 512, W in either layout.
Status launch_sgmv_shrink_out_in(const Launcher& launcher, DType dtype, const SgmvArgs& args);
Status launch_sgmv_shrink_in_out(const Launcher& launcher, DType dtype, const SgmvArgs& args);
// Otherwise where d_in is large and d_out small: on the sm_80 path, and W [d_in, d_out] with d_out at most 16.
Status launch_sgmv_deep(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float16 and bfloat16 on sm_90 where d_in is at most 128, y is large and all is aligned: y is what moves. The bits are
// those of launch_sgmv_expand and launch_sgmv_wide.
bool is_sgmv_ring(const Launcher& launcher, const SgmvArgs& args);
Status launch_sgmv_ring(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float16 and bfloat16 where d_in is 16 or less: y is what moves.
Status launch_sgmv_expand(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float16 and bfloat16 otherwise: y is what moves, or nothing is small.
Status launch_sgmv_wide(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// The same on sm_90 where d_in is more than 128; other bits.
Status launch_sgmv_wide_wgmma(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// The same bits, where all is aligned and segments are long.
bool is_sgmv_broad(SgmvWeights weights, const SgmvArgs& args);
Status launch_sgmv_broad(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args);
// float32.
Status launch_sgmv_float(const Launcher& launcher, SgmvWeights weights, const SgmvArgs& args);

}  // namespace punica::cuda
