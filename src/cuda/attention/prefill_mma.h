// batch_prefill by tensor-core products of warps: what it serves, and its launch.
#pragma once

#include "punica/attention.h"
#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/prefill_mma_items.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Both paths: float16 and bfloat16, a scale that is a number other than 0, tables with room for less than 2^31
// tokens. D above 192 without rotation needs 100 KiB of shared memory a block, which not every device has (the current
// one is asked).
bool serves_prefill_mma(const BatchPrefillParams& params);

// Room for partial results of splits, for what blocks merge of them, and for rotated keys.
int64_t prefill_mma_workspace_bytes(const BatchPrefillParams& params);

// `rope`: null without rotation.
Status launch_prefill_mma(const Launcher& launcher, const BatchPrefillParams& params, const AttentionArgs& args,
                          const RopeTable* rope);

// Rotates the keys of all sequences into call.rotated, and sets *call.next_item to 0.
Status launch_rotate_keys(const Launcher& launcher, DType dtype, const AttentionArgs& args, const MmaCall& call,
                          const RopeTable& rope);

// Launches the kernel for head dims up to kDim (prefill_mma_*.cu).
template <int kDim>
Status launch_mma(const Launcher& launcher, DType dtype, const AttentionArgs& args, const MmaCall& call,
                  const RopeTable* rope, unsigned blocks);

}  // namespace punica::cuda
