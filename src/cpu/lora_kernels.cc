// The LoRA kernels, compiled once for each instruction set: the tables of lora_kernels.h.
//
//   lora_bgmv-inl.h   dispatch_bgmv
//   lora_dot-inl.h    sgmv_shrink: weights whose rows run along the sum
//   lora_outer-inl.h  sgmv_cutlass: weights whose rows run along the outputs
#include "src/cpu/lora_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/lora_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/lora_bgmv-inl.h"
#include "src/cpu/lora_dot-inl.h"
#include "src/cpu/lora_outer-inl.h"

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {

const LoraKernels* kernels() {
  static constexpr LoraKernels table = {
      {bgmv<float16_t, false>, bgmv<bfloat16_t, false>, bgmv<float, false>},
      {sgmv_out_in<float16_t, false>, sgmv_out_in<bfloat16_t, false>, sgmv_out_in<float, false>},
      {sgmv_in_out<float16_t, false>, sgmv_in_out<bfloat16_t, false>, sgmv_in_out<float, false>},
  };
  return &table;
}

#if HWY_TARGET == HWY_AVX3
const LoraKernels* kernels_bf16() {
  static constexpr LoraKernels table = {
      {bgmv<float16_t, true>, bgmv<bfloat16_t, true>, bgmv<float, true>},
      {sgmv_out_in<float16_t, true>, sgmv_out_in<bfloat16_t, true>, sgmv_out_in<float, true>},
      {sgmv_in_out<float16_t, true>, sgmv_in_out<bfloat16_t, true>, sgmv_in_out<float, true>},
  };
  return &table;
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace punica::cpu {

const LoraKernels* lora_kernels(Isa isa) { return PUNICA_SELECT_KERNELS(isa); }

}  // namespace punica::cpu
#endif
