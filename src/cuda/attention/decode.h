// The fast decode: launches of decode_kernel (decode.cuh) and of the kernel that merges what it left in pieces.
#pragma once

#include <cstdint>

#include "punica/attention.h"
#include "src/cuda/attention/args.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Blocks of decode_kernel at most: each has a DecodePiece in the workspace.
inline constexpr int64_t kMaxDecodeWorkers = 1024;

// Splits of a query are folded in groups of so many, counted from its first one, and groups to the whole.
inline constexpr int kGroupSplits = 8;

// A query that begins in a block of decode_kernel and ends in another one: left to merge. Of the splits of a group, the
// ones that the block of the group's first split has are in the workspace as one, in the place of that first split;
// others one by one. But the whole groups that the block of the query's first split has are one, in its place.
struct alignas(16) DecodePiece {
  int32_t count;  // splits of the query; 0: nothing is left
  int32_t sequence, part, first_slot;
  int32_t groups;  // whole groups in the block where the query begins
  // Shares of the blocks, in splits of all queries counted over the whole batch: `each`, the first `more` blocks one
  // more.
  int32_t each, more;
};

// Whether decode_kernel serves such calls: a function of the data type and static sizes alone, so that all rows of all
// batches of a model take the same path. Tables with room for 2^31 tokens are not served.
bool decode_serves(DType dtype, int64_t head_dim);
bool decode_serves(const BatchDecodeParams& params);

// Query heads that a block of decode_kernel takes at most: two columns of 8, one where registers are short.
constexpr int decode_head_tile(int64_t group_size, int64_t head_dim) {
  return group_size <= 8 || head_dim > 128 ? 8 : 16;
}

Status launch_decode(const Launcher& launcher, DType dtype, const AttentionArgs& args, const RopeTable* rope);

// By type, each in a file of its own: they compile side by side.
Status launch_decode_float16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope);
Status launch_decode_bfloat16(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope);

}  // namespace punica::cuda
