// The CPU backend: which instruction set its kernels use.
#pragma once

#include <cstdint>
#include <string>

#include "punica/status.h"

namespace punica::cpu {

enum class Isa : uint8_t {
  kBaseline,    // what every CPU of the architecture has (x86-64: SSE2)
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // the same and the bfloat16 dot product
  kNeon,        // AArch64
};

const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512", "avx512_bf16", "neon"

// The names of those that this build has and this CPU runs, from the slowest to the fastest: "baseline, avx2".
std::string supported_isas();

// The best one that this CPU runs, or the one that the environment variable PUNICA_ISA names (read at the first call).
// An error if it names none, or one that this CPU or build does not have.
Status active_isa(Isa* isa);

// The instruction set that the last kernel called from this thread was compiled for, written by the kernel itself;
// nullptr before the first.
const char* last_isa();

}  // namespace punica::cpu
