// The fast decode: launches of decode_kernel (decode.cuh) and of the kernel that merges what it left in pieces.
#pragma once

#include <cstdint>

#include "punica/attention.h"
#include "src/cuda/attention/args.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Blocks of decode_kernel at most: each has a DecodePiece in the workspace.
inline constexpr int64_t kMaxDecodeWorkers = 1024;

// Splits of a query are folded in groups, counted from its first one, and groups to the whole. A query has so many
// groups at most, as a power of two: enough for a query alone to fill the device, a group a block, and no more than one
// block can fold quickly. `parts`: KV heads and tiles of heads of a sequence.
constexpr int decode_group_bits(int64_t parts) { return parts <= 8 ? 5 : (parts <= 16 ? 4 : 3); }

// What decode_kernel leaves in the workspace of a query that begins in one block and ends in another one. Of the splits
// of a group, the ones that the block of the group's first split has are there as one, in the place of that first
// split; others one by one. But the whole groups that the block of the query's first split has are one, in its place.
struct alignas(16) DecodePiece {
  int32_t count;  // splits of the query; 0: nothing is left
  int32_t sequence, part, first_slot;
  // Shares of the blocks, in splits of all queries counted over the whole batch: `each`, the first `more` blocks one
  // more.
  int32_t each, more;
};

// Where a launch of decode_kernel merges.
struct DecodeMerge {
  DecodePiece* pieces;  // of each block (or query), for merge_decode_kernel; null: nothing is left, or merged inside
  int32_t counters;     // set of counters of this workspace, for the last block of a query to merge it; -1: none
};

// Sets of counters, and counters of a set.
inline constexpr int kDecodeCounterSets = 512, kDecodeCounters = 384;

// The set of a workspace: the same for all calls with it, which do not overlap in time, and of no other workspace. -1
// where all sets are taken.
int decode_counters(const void* workspace);

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
