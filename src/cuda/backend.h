// The operations of the CUDA backend, the same as those of the CPU backend. Compiled under PUNICA_WITH_CUDA. src/common
// validates the params before it calls one.
#pragma once

#include <cstdint>

#include "punica/add_lora.h"
#include "punica/attention.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"

namespace punica::cuda {

int64_t sgmv_cutlass_tmp_size(int64_t num_segments);
int64_t workspace_bytes(const BatchPrefillParams& params);
int64_t workspace_bytes(const BatchDecodeParams& params);

Status dispatch_bgmv(const BgmvParams& params, const Context& context);
Status sgmv(const SgmvParams& params, const Context& context);
Status add_lora(const AddLoraParams& params, const Context& context);
Status update_lora_batch(const LoraBatchParams& params, const Context& context);
Status batch_prefill(const BatchPrefillParams& params, const Context& context);
Status batch_decode(const BatchDecodeParams& params, const Context& context);
Status init_kv(const InitKvParams& params, const Context& context);
Status append_kv(const AppendKvParams& params, const Context& context);
Status rms_norm(const RmsNormParams& params, const Context& context);

}  // namespace punica::cuda
