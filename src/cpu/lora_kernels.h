// The LoRA kernels as lora.cc sees them: one table for each instruction set.
#pragma once

#include <cstdint>

#include "punica/lora.h"
#include "src/cpu/isa.h"

namespace punica::cpu {

// How a call is cut into tasks. Nothing in it changes a result: a row's bits depend on the row's own data, on static
// sizes and on the instruction set only.
struct BgmvSplit {
  int num_threads;
  int64_t outputs_per_task;  // a task computes this many elements of one row of y
};

struct SgmvSplit {
  int num_threads;
  int64_t tokens_per_task;  // at most kMaxTokensPerTask
  int64_t outputs_per_task;
  // [S + 1]: segment i has the token blocks [first_block[i], first_block[i + 1]) of tokens_per_task tokens (the last
  // one may have fewer).
  const int64_t* first_block;
};

inline constexpr int64_t kMaxTokensPerTask = 64;

// sgmv cuts the outputs at multiples of one of these numbers.
inline constexpr int64_t kDotOutputsPerTask = 64;
inline constexpr int64_t kOuterOutputsPerTask = 512;  // sgmv_lanes_are_outputs()

// sgmv_shrink with so few inputs, which is an expand, runs as sgmv_cutlass does, on transposed weights: with short
// rows, adding up the lanes of dot products would be most of the work.
inline constexpr int64_t kMaxTransposedInputs = 255;

inline bool sgmv_lanes_are_outputs(const SgmvParams& params) {
  return params.weights == SgmvWeights::kInOut || params.x.shape[1] <= kMaxTransposedInputs;
}

// Indexed by DType: kFloat16, kBFloat16, kFloat32 are 0, 1, 2. The sizes of the params are positive.
struct LoraKernels {
  void (*bgmv[3])(const BgmvParams& params, const BgmvSplit& split);
  void (*sgmv_out_in[3])(const SgmvParams& params, const SgmvSplit& split);
  void (*sgmv_in_out[3])(const SgmvParams& params, const SgmvSplit& split);
};

// The table of `isa`, which active_isa() gave.
const LoraKernels* lora_kernels(Isa isa);

// The rows of segment i within [0, rows): a malformed segment is empty.
struct Segment {
  int64_t begin;
  int64_t end;
};

inline Segment sgmv_segment(const SgmvParams& params, int64_t i) {
  const int64_t rows = params.y.shape[0];
  const int64_t start = params.s_start.as<const int32_t>()[i];
  const int64_t stop = params.s_end.as<const int32_t>()[i];
  const int64_t begin = start < 0 ? 0 : (start > rows ? rows : start);
  const int64_t end = stop > rows ? rows : stop;
  return {begin, end < begin ? begin : end};
}

}  // namespace punica::cpu
