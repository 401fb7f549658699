// Which of the compiled instruction sets runs, and how a family's kernels are found for it.
//
// A family (lora, attention, ...) writes its kernels once, against Highway, in a file that foreach_target.h includes
// once for each instruction set. There it defines, in HWY_NAMESPACE, `const XKernels* kernels()`, a table of function
// pointers, and in the AVX-512 pass `kernels_bf16()` too, the table whose bfloat16 dot products are native
// (bf16_dot-inl.h). After the last pass (HWY_ONCE), PUNICA_SELECT_KERNELS picks among them.
#pragma once

// Not compiled: sets between the levels below (they would cost build time), and scalable vectors (kernels use sizes
// that are compile-time constants).
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

// The baseline is Highway's portable 128-bit target. Highway 1.0 distrusts it under GCC < 12.3, for a wrong
// vectorisation of 16-bit high multiplies (GCC bug 106322), which no kernel here does, and would fall back to one lane.
#if !defined(HWY_BROKEN_EMU128)
#define HWY_BROKEN_EMU128 0
#endif

#include "punica/cpu.h"

namespace punica::cpu {

// As punica::cpu::active_isa(); errors are those of `op`.
Status active_isa(const char* op, Isa* isa);

// Kernels call this with the name of the set that they were compiled for: see last_isa().
void record_isa(const char* name);

}  // namespace punica::cpu

// The current pass's name as in isa_name(); native_bf16 is a compile-time constant.
#define PUNICA_RECORD_ISA(native_bf16)                               \
  ::punica::cpu::record_isa((native_bf16)            ? "avx512_bf16" \
                            : HWY_TARGET == HWY_AVX3 ? "avx512"      \
                            : HWY_TARGET == HWY_AVX2 ? "avx2"        \
                            : HWY_TARGET == HWY_NEON ? "neon"        \
                                                     : "baseline")

// The table of `isa`, which active_isa() gave. Use within the namespace that encloses HWY_NAMESPACE.
#if defined(__x86_64__)
#define PUNICA_SELECT_KERNELS(isa)                                   \
  ((isa) == ::punica::cpu::Isa::kAvx512Bf16 ? N_AVX3::kernels_bf16() \
   : (isa) == ::punica::cpu::Isa::kAvx512   ? N_AVX3::kernels()      \
   : (isa) == ::punica::cpu::Isa::kAvx2     ? N_AVX2::kernels()      \
                                            : HWY_STATIC_DISPATCH(kernels)())
#else
#define PUNICA_SELECT_KERNELS(isa) (static_cast<void>(isa), HWY_STATIC_DISPATCH(kernels)())
#endif
