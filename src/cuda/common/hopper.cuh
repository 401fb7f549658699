// What sm_90 has beyond sm_80, as functions: barriers in shared memory that count bytes, tensor copies, products of a
// warpgroup (128 threads). PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "wgmma".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace punica::cuda::hopper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- Barriers: addresses in shared memory ---------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the initialisation, by the thread that did it: for the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and says how many bytes will be copied in this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// Hardware barriers of `threads` threads; 0 is that of __syncthreads().
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes what this thread wrote to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Tensor copies --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

// ---- Products of a warpgroup ----------------------------------------------------------------------------------------
//
// Operands in shared memory lie in rows of 128 bytes, eight of which, at a multiple of 1024 bytes, are an atom: piece i
// of 16 bytes of row r lies at place i ^ r % 8 (swizzle of 128 bytes, as tensor copies write it).

// Where an operand begins and how it goes on. Kept in two halves: behind a multiple of 16 bytes is an addition.
struct Descriptor {
  uint32_t low, high;

  __device__ __forceinline__ Descriptor behind(int bytes) const { return {low + (bytes >> 4), high}; }
  __device__ __forceinline__ uint64_t bits() const { return static_cast<uint64_t>(high) << 32 | low; }
};

// 8 rows of 128 bytes to the next atom, and the swizzle.
constexpr uint32_t kDescriptorHigh = uint32_t{1} << 30 | 1024 >> 4;

// The same in all threads of a warp, and known to be.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }

// Rows along M or N, K within a row (64 elements). `address` may point to any 32 bytes (16 elements of K) of the first
// row.
__device__ __forceinline__ Descriptor descriptor_rows(uint32_t address) {
  return {uniform(uint32_t{1} << 16 | (address & 0x3ffff) >> 4), kDescriptorHigh};
}

// Rows along K, N within a row; further 64 columns of N lie `column_bytes` behind. `address` is that of a row that is a
// multiple of 8.
__device__ __forceinline__ Descriptor descriptor_columns(uint32_t address, uint32_t column_bytes) {
  return {uniform((column_bytes >> 4) << 16 | (address & 0x3ffff) >> 4), kDescriptorHigh};
}

// Between writes to registers of sums or operands and the products that take them.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums in registers that products in flight write: no access moves across this.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// The sums of a thread: d[4 n + 0, 1] are row g, columns 8 n + 2t, 2t + 1; d[4 n + 2, 3] row g + 8, the same columns;
// g = lane / 4 within the warp's 16 rows, t = lane % 4.
// clang-format off
#define PUNICA_SUMS_64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PUNICA_SUM_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PUNICA_SUMS_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PUNICA_SUM_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// clang-format on

// d (+)= a @ b^T: a [64, 16] and b [128, 16] in rows (descriptor_rows).
template <class T>
__device__ __forceinline__ void product(float (&d)[64], const Descriptor& a, const Descriptor& b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PUNICA_SUM_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : PUNICA_SUMS_64
        : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PUNICA_SUM_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : PUNICA_SUMS_64
        : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(add)));
  }
}

// d (+)= a @ b: a [64, 16] in registers, as mma_m16n8k16 takes it, warp w rows 16 w .. 16 w + 15; b [16, 128] in
// columns (descriptor_columns).
template <class T>
__device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4], const Descriptor& b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PUNICA_SUM_NAMES_64
        "}, {%64, %65, %66, %67}, "
        "%68, p, 1, 1, 1;\n}"
        : PUNICA_SUMS_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PUNICA_SUM_NAMES_64
        "}, {%64, %65, %66, %67}, "
        "%68, p, 1, 1, 1;\n}"
        : PUNICA_SUMS_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  }
}

// d (+)= a @ b: a [64, 16] in registers, as mma_m16n8k16 takes it, warp w rows 16 w .. 16 w + 15; b [16, 64] in
// columns (descriptor_columns).
template <class T>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], const Descriptor& b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PUNICA_SUM_NAMES_32
        "}, {%32, %33, %34, %35}, "
        "%36, p, 1, 1, 1;\n}"
        : PUNICA_SUMS_32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PUNICA_SUM_NAMES_32
        "}, {%32, %33, %34, %35}, "
        "%36, p, 1, 1, 1;\n}"
        : PUNICA_SUMS_32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  }
}

#undef PUNICA_SUMS_64
#undef PUNICA_SUM_NAMES_64
#undef PUNICA_SUMS_32
#undef PUNICA_SUM_NAMES_32

#endif

}  // namespace punica::cuda::hopper
