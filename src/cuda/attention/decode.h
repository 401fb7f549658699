// The fast decode: launches of decode_kernel (decode.cuh) and of the kernel that merges what it left in pieces.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Blocks of decode_kernel at most: each has a DecodePiece in the workspace.
inline constexpr int64_t kMaxDecodeWorkers = 1024;

// What a block of decode_kernel leaves to merge: a query whose first `prefix` splits it has summed, and whose others
// lie in the workspace one by one, written by the blocks after it. count = 0: nothing.
struct alignas(16) DecodePiece {
  int64_t sequence;
  int64_t first_slot;
  int64_t count;  // splits in all
  int32_t part;   // kv_head * head_tiles + head tile
  int32_t prefix;
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
