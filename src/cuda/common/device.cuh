// What kernels of every family are made of: programmatic dependent launch, data types, vector loads, warp sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "punica/cuda.h"
#include "punica/types.h"

namespace punica::cuda {

// Kernels of the sm_90 path are compiled for that architecture alone; elsewhere their body is left out.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
inline constexpr bool kCompilesSm90 = true;
#else
inline constexpr bool kCompilesSm90 = false;
#endif

template <Arch kArch>
inline constexpr bool kCompiled = kArch == Arch::kSm80 || kCompilesSm90;

// Waits until the kernels before this one in the stream have ended and their writes are visible. Every thread of every
// block calls it, on every path, before it reads what they may write and before it writes anything to global memory.
template <Arch kArch>
__device__ __forceinline__ void grid_dependency_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kArch == Arch::kSm90) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one start once every block of this one has called this or ended. Safe at any place: what
// that kernel reads of ours it reads after its own wait, which is for our end.
template <Arch kArch>
__device__ __forceinline__ void launch_dependents() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kArch == Arch::kSm90) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// kCount elements that move as one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  static constexpr int kSize = kCount;
  T values[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Vec<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Vec<T, kCount>*>(from);
}

// One access: the compiler makes accesses of 2 bytes of a struct of 16-bit elements that it has just put together.
template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const Vec<T, kCount>& value) {
  constexpr int kBytes = sizeof(T) * kCount;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(&value);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(&value);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(raw.x), "r"(raw.y) : "memory");
  } else if constexpr (kBytes == 4) {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(&value);
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(raw) : "memory");
  } else {
    *to = value.values[0];
  }
}

// Brings a line into the second-level cache. Allowed before grid_dependency_wait(), whoever writes there: that cache is
// where all writes meet, so this reads nothing, and a load after the wait finds the newest bytes in it.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
inline constexpr int kLineBytes = 128;

// Of what is read once: it is the first to leave the second-level cache, which is better kept for tables, queries and
// partial results.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t read_again_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Closes the group of this thread's asynchronous copies (cp.async) since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// Calls body(T{}) with the device type of a float16, bfloat16 or float32 tensor.
template <class Body>
auto with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

}  // namespace punica::cuda
