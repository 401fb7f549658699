// The fast decode: launches of decode_kernel (decode.cuh) and of the kernel that merges what it left in pieces.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Blocks of decode_kernel at most: each has a DecodePiece in the workspace.
inline constexpr int64_t kMaxDecodeWorkers = 1024;

// Splits of a query are folded in groups of so many, counted from its first one, and groups to the whole.
inline constexpr int kGroupSplits = 8;

// The equal shares of the blocks: splits of all queries, counted over the whole batch.
struct DecodeShares {
  int64_t each, more;  // the first `more` blocks have one more

#ifdef __CUDACC__
  __device__ int64_t begin(int64_t worker) const { return each * worker + (worker < more ? worker : more); }
  __device__ int64_t owner(int64_t index) const {
    return index < more * (each + 1) ? index / (each + 1) : more + (index - more * (each + 1)) / each;
  }
#endif
};

// A query that begins in a block of decode_kernel and ends in another one: left to merge. Of the splits of a group, the
// ones that the block of the group's first split has are in the workspace as one, in the place of that first split;
// others one by one. But the whole groups that the block of the query's first split has are one, in its place.
struct alignas(16) DecodePiece {
  int64_t sequence;
  int64_t first_slot;
  int64_t count;  // splits in all; 0: nothing is left
  DecodeShares shares;
  int32_t part;    // kv_head * head_tiles + head tile
  int32_t groups;  // whole groups in the block where the query begins
};

// Whether decode_kernel serves such calls: a function of the data type and static sizes alone, so that all rows of all
// batches of a model take the same path.
bool decode_serves(DType dtype, int64_t head_dim);

// Query heads that a block of decode_kernel takes at most: two columns of 8, one where registers are short.
constexpr int decode_head_tile(int64_t group_size, int64_t head_dim) {
  return group_size <= 8 || head_dim > 128 ? 8 : 16;
}

Status launch_decode(const Launcher& launcher, DType dtype, const AttentionArgs& args, const RopeTable* rope);

// By type, each in a file of its own: they compile side by side.
Status launch_decode_float16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope);
Status launch_decode_bfloat16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope);

}  // namespace punica::cuda
