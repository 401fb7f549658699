// Warpgroup products of sm_90 from operands in shared memory, and the mbarrier and cluster operations around them. The
// layouts are those of the PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace punica::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Orders this thread's writes to shared memory, those of its finished cp.async too, before later reads by wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The descriptor of a matrix in shared memory. swizzle: 1, 2, 3 for 128, 64, 32 bytes. In bytes, multiples of 16:
//   K-major (8 rows of 128 bytes a unit):           stride: to the next 8 rows; leading: unused
//   MN-major (8 rows of K, `swizzle` bytes each):   stride: to the next 8 of K; leading: to the next `swizzle` bytes of
//   MN
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint64_t swizzle, uint32_t leading,
                                                     uint32_t stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         swizzle << 62;
}

#define PUNICA_REGS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PUNICA_REGS_16 PUNICA_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PUNICA_REGS_32 PUNICA_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PUNICA_REGS_64                                                                           \
  PUNICA_REGS_32                                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PUNICA_OUT_8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PUNICA_OUT_16(i) PUNICA_OUT_8(i), PUNICA_OUT_8(i + 8)
#define PUNICA_OUT_32(i) PUNICA_OUT_16(i), PUNICA_OUT_16(i + 16)
#define PUNICA_OUT_64(i) PUNICA_OUT_32(i), PUNICA_OUT_32(i + 32)
#define PUNICA_WGMMA_ONE(n, type, regs, outs, a_at, b_at, trans_at)                                 \
  asm volatile(                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, " a_at ", " b_at \
      ", p, 1, 1, 0, " trans_at ";\n}"                                                              \
      : outs                                                                                        \
      : "l"(a), "l"(b), "n"(int{kTransposeB}))
#define PUNICA_WGMMA(n, count, a_at, b_at, trans_at)                                               \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                \
    PUNICA_WGMMA_ONE(n, "bf16", PUNICA_REGS_##count, PUNICA_OUT_##count(0), a_at, b_at, trans_at); \
  } else {                                                                                         \
    PUNICA_WGMMA_ONE(n, "f16", PUNICA_REGS_##count, PUNICA_OUT_##count(0), a_at, b_at, trans_at);  \
  }

// d += a @ b for a [64, 16] K-major, b [16, kN] (K-major, or MN-major if kTransposeB), of the warpgroup. With
// g = lane / 4 and t = lane % 4, lane of warp w has of d: d[4j + 2h + i] = row 16w + 8h + g, column 8j + 2t + i.
template <class T, int kN, bool kTransposeB>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128);
  if constexpr (kN == 16) {
    PUNICA_WGMMA("16", 8, "%8", "%9", "%10")
  } else if constexpr (kN == 32) {
    PUNICA_WGMMA("32", 16, "%16", "%17", "%18")
  } else if constexpr (kN == 64) {
    PUNICA_WGMMA("64", 32, "%32", "%33", "%34")
  } else {
    PUNICA_WGMMA("128", 64, "%64", "%65", "%66")
  }
}

#undef PUNICA_WGMMA
#undef PUNICA_WGMMA_ONE
#undef PUNICA_OUT_64
#undef PUNICA_OUT_32
#undef PUNICA_OUT_16
#undef PUNICA_OUT_8
#undef PUNICA_REGS_64
#undef PUNICA_REGS_32
#undef PUNICA_REGS_16
#undef PUNICA_REGS_8

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives when all asynchronous copies that this thread has started are there.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of the given parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Writes to a block of the cluster, and counts the 16 bytes at its barrier.
__device__ __forceinline__ void store_async(uint32_t remote, float4 v, uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier)
      : "memory");
}

#endif

}  // namespace punica::cuda
