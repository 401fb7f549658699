// Root-mean-square normalisation.
#pragma once

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// output = input * rsqrt(mean(input^2) + epsilon) * weight, in float32 with one rounding. With a residual,
// residual += input first (rounded to T), and that sum is what is normalised.
struct RmsNormParams {
  TensorView output;    // T [rows, columns], written; may be input itself; rows may be strided
  TensorView input;     // T [rows, columns], rows may be strided
  TensorView weight;    // T [columns]
  TensorView residual;  // optional, T [rows, columns], updated; rows may be strided
  float epsilon = 1e-6f;
};

Status validate(const RmsNormParams& params);

Status rms_norm(const RmsNormParams& params, const Context& context);

}  // namespace punica
