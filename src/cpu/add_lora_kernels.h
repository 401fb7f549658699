// The kernels of add_lora as add_lora.cc sees them: one table for each instruction set.
#pragma once

#include <cstdint>

#include "punica/add_lora.h"
#include "src/cpu/isa.h"

namespace punica::cpu {

inline constexpr int64_t kLoraTokens = 64;  // of an item at most

// Up to kLoraTokens rows of one adapter, on one slice of y. Pointers are of the call's layer.
struct LoraItem {
  const int32_t* rows;  // [num_tokens], row numbers of x and y
  int64_t num_tokens;
  const void* a;  // T [rank, h_in]
  const void* b;  // T [h_out, rank], rows b_row_stride apart
  int64_t rank;
  int64_t b_row_stride;
  float scale;
  int64_t column;  // of y, where the slice begins
  int64_t h_out;
  float* v;  // [num_tokens, rank]: A x, from the first phase to the second
};

// What a task of either phase does for its item: `count` ranks (a shrink) or outputs of the slice (an expand), from
// `first` on. Nothing in how the work is cut changes a result.
struct LoraTask {
  const LoraItem* item;
  int64_t first;
  int64_t count;
};

inline constexpr int64_t kShrinkRanks = 64;     // of a task at most
inline constexpr int64_t kExpandOutputs = 512;  // where an expand is cut: at multiples

// One phase of a call, on up to num_threads threads.
using LoraPhase = void (*)(const AddLoraParams& params, const LoraTask* tasks, int64_t num_tasks, int num_threads);

// Indexed by DType: kFloat16, kBFloat16, kFloat32 are 0, 1, 2.
struct AddLoraKernels {
  LoraPhase shrink[3];  // writes ranks of v
  LoraPhase expand[3];  // adds to outputs of y
};

// The table of `isa`, which active_isa() gave.
const AddLoraKernels* add_lora_kernels(Isa isa);

}  // namespace punica::cpu
