// The body of launch_mma(): each prefill_mma_*.cu has one head dim, to keep compile times short.
#pragma once

#include "src/cuda/attention/prefill_mma.cuh"
#include "src/cuda/attention/prefill_mma.h"

namespace punica::cuda {

template <Arch kArch, class T, int kDim>
Status launch_mma_type(const Launcher& launcher, const AttentionArgs& args, const MmaCall& call, const RopeTable* rope,
                       unsigned blocks) {
  LaunchShape shape;
  shape.grid.x = blocks;
  shape.block.x = MmaShape<kDim, false>::kThreads;
  if (rope != nullptr) {
    shape.shared_bytes = sizeof(MmaShared<MmaShape<kDim, true>, true>);
    return launcher.launch<prefill_mma_kernel<kArch, T, kDim, true>>(shape, args, call, *rope);
  }
  shape.shared_bytes = sizeof(MmaShared<MmaShape<kDim, false>, false>);
  return launcher.launch<prefill_mma_kernel<kArch, T, kDim, false>>(shape, args, call, NoRope{});
}

template <int kDim>
Status launch_mma(const Launcher& launcher, DType dtype, const AttentionArgs& args, const MmaCall& call,
                  const RopeTable* rope, unsigned blocks) {
  return with_arch(launcher.arch, [&](auto arch) {
    constexpr Arch kArch = decltype(arch)::value;
    return dtype == DType::kFloat16 ? launch_mma_type<kArch, __half, kDim>(launcher, args, call, rope, blocks)
                                    : launch_mma_type<kArch, __nv_bfloat16, kDim>(launcher, args, call, rope, blocks);
  });
}

}  // namespace punica::cuda
