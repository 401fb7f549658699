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

// Arrives when all cp.async that this thread has started until here have ended.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
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

// Of the block, in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of a place in shared memory, in block `rank` of the cluster.
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

// `policy`: of the second-level cache (device.cuh).
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
      : "memory");
}

// Brings a map, a kernel's __grid_constant__ argument, to where the copy engine looks for it: the first copy waits for
// memory otherwise. The argument is the kernel's own, so this may come before the wait for the kernel before.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// From shared memory; what is outside of the tensor is left out. Writes of other threads to shared memory have to be
// visible to the copy engine (fence_async_proxy).
__device__ __forceinline__ void store_box(uint32_t from, const CUtensorMap* map, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(c2), "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all that this thread has stored so has been read from shared memory.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier)
      : "memory");
}

// ---- Accesses of shared memory --------------------------------------------------------------------------------------

// Four matrices of 8 x 8 16-bit elements, packed as products leave them; lanes give the addresses of rows (stmatrix).
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
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

// The descriptor of a matrix in shared memory. swizzle: 1, 2, 3 for 128, 64, 32 bytes. In bytes, multiples of 16:
//   K-major (8 rows of 128 bytes a unit):           stride: to the next 8 rows; leading: unused
//   MN-major (8 rows of K, `swizzle` bytes each):   stride: to the next 8 of K; leading: to the next `swizzle` bytes of
//   MN
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint64_t swizzle, uint32_t leading,
                                                     uint32_t stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         swizzle << 62;
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

// d (+)= a @ b^T: a [64, 16] and b [128, 16] in rows (descriptor_rows).
template <class T>
__device__ __forceinline__ void product(float (&d)[64], const Descriptor& a, const Descriptor& b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PUNICA_REGS_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : PUNICA_OUT_64(0)
        : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PUNICA_REGS_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : PUNICA_OUT_64(0)
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
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PUNICA_REGS_64
        "}, {%64, %65, %66, %67}, "
        "%68, p, 1, 1, 1;\n}"
        : PUNICA_OUT_64(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PUNICA_REGS_64
        "}, {%64, %65, %66, %67}, "
        "%68, p, 1, 1, 1;\n}"
        : PUNICA_OUT_64(0)
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
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PUNICA_REGS_32
        "}, {%32, %33, %34, %35}, "
        "%36, p, 1, 1, 1;\n}"
        : PUNICA_OUT_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PUNICA_REGS_32
        "}, {%32, %33, %34, %35}, "
        "%36, p, 1, 1, 1;\n}"
        : PUNICA_OUT_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(static_cast<int>(add)));
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

#endif

}  // namespace punica::cuda::hopper
