// batch_prefill where tensor copies and warpgroup products serve it.
#pragma once

#include "punica/attention.h"
#include "src/cuda/attention/args.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {

// Float16 and bfloat16, sm_90, D 64 or 128, a positive factor of the scores, and less than 2^31 tokens in the table and
// pairs of a row and a head of its group. Nothing else of the batch decides, nor alignment.
bool serves_prefill(Arch arch, const BatchPrefillParams& params);

// Room that helps: with few rows, for partial results, so that splits of long contexts are worked on side by side;
// with many, for keys rotated ahead.
int64_t prefill_workspace_bytes(const BatchPrefillParams& params);

// `rope`: null without rotation.
Status launch_prefill(const Launcher& launcher, const BatchPrefillParams& params, const AttentionArgs& args,
                      const RopeTable* rope);

}  // namespace punica::cuda
