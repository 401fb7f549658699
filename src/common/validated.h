// The operations without validation, for a caller that has something to do between validate() and the operation itself:
// a workspace that is added to the params meanwhile is not looked at.
#pragma once

#include "punica/add_lora.h"
#include "punica/attention.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"

namespace punica {

Status run_validated(const BatchPrefillParams& params, const Context& context);
Status run_validated(const BatchDecodeParams& params, const Context& context);
Status run_validated(const InitKvParams& params, const Context& context);
Status run_validated(const AppendKvParams& params, const Context& context);
Status run_validated(const BgmvParams& params, const Context& context);
Status run_validated(const SgmvParams& params, const Context& context);
Status run_validated(const AddLoraParams& params, const Context& context);
Status run_validated(const LoraBatchParams& params, const Context& context);
Status run_validated(const RmsNormParams& params, const Context& context);

}  // namespace punica
