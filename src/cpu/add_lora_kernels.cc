// The kernels of add_lora, compiled once for each instruction set: the tables of add_lora_kernels.h.
#include "src/cpu/add_lora_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/add_lora_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/add_lora-inl.h"

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {
namespace {

template <bool kBf16Isa>
const AddLoraKernels* add_lora_table() {
  static constexpr AddLoraKernels table = {
      {add_lora_shrink<float16_t, kBf16Isa>, add_lora_shrink<bfloat16_t, kBf16Isa>, add_lora_shrink<float, kBf16Isa>},
      {add_lora_expand<float16_t, kBf16Isa>, add_lora_expand<bfloat16_t, kBf16Isa>, add_lora_expand<float, kBf16Isa>},
  };
  return &table;
}

const AddLoraKernels* kernels() { return add_lora_table<false>(); }
#if HWY_TARGET == HWY_AVX3
const AddLoraKernels* kernels_bf16() { return add_lora_table<true>(); }
#endif

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace punica::cpu {

const AddLoraKernels* add_lora_kernels(Isa isa) { return PUNICA_SELECT_KERNELS(isa); }

}  // namespace punica::cpu
#endif
