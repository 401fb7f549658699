// What dispatch_bgmv takes from sm_90: the bulk copy engine, barriers that count bytes, clusters.
//
// Weights come into shared memory by cp.async.bulk: the copies are issued by one warp, take no registers and few
// instructions, so that blocks are light and those of the next kernel find room beside those of this one.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kBulkThreads = 128;
inline constexpr int kBulkWarps = kBulkThreads / 32;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Barriers in shared memory: one arrival, which says how many bytes to wait for --------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// After the barriers' initialisation, by the thread that did it: for the copy engine and the cluster's other blocks.
__device__ __forceinline__ void barrier_init_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of a phase; what arrived in it is seen.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
#endif
}

// ---- Copies -------------------------------------------------------------------------------------------------------

// `to`, `from` and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Brings a line into L2. That is where all SMs meet, so a load after griddepcontrol.wait sees the newest bytes even
// though this came before: it is no read in the sense of the memory order. Hence x and y, too, may be prefetched early.
__device__ __forceinline__ void prefetch_line(const void* address) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// A run of bytes with the alignment of an element. It lies in shared memory with the same offset from a multiple of 16
// as in global memory: what is whole there comes by bulk copy, the edges element by element.
struct Run {
  const unsigned char* from;
  int shift;  // offset from a multiple of 16
  int head;   // bytes before the whole pieces
  int whole;
  int tail;  // bytes after them

  __device__ __forceinline__ Run(const void* start, int bytes) : from(static_cast<const unsigned char*>(start)) {
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(start) & 15);
    head = min((16 - shift) & 15, bytes);
    whole = (bytes - head) & ~15;
    tail = bytes - head - whole;
  }

  // `image` is a multiple of 16; byte 0 of the run comes to image + shift.
  __device__ __forceinline__ void copy_whole(unsigned char* image, uint64_t* barrier) const {
    if (whole > 0) bulk_copy(image + shift + head, from + head, whole, barrier);
  }

  // By eight threads, i = 0..7.
  __device__ __forceinline__ void copy_edges(unsigned char* image, int i) const {
    const auto copy = [&](int at) {
      *reinterpret_cast<uint16_t*>(image + shift + at) = *reinterpret_cast<const uint16_t*>(from + at);
    };
    if (2 * i < head) copy(2 * i);
    if (2 * i < tail) copy(head + whole + 2 * i);
  }
};

// kCount words of shared memory, zeros from element `count` on. kAligned: to their own size, and `count` is a multiple
// of 2 * kCount or below 0. Otherwise up to 4 bytes beyond are read.
template <int kCount, bool kAligned>
__device__ __forceinline__ Words<kCount> read_image(const unsigned char* from, int count) {
  Words<kCount> r = {};
  if constexpr (kAligned) {
    if (count > 0) r = *reinterpret_cast<const Words<kCount>*>(from);
  } else {
    const uint32_t odd = reinterpret_cast<uintptr_t>(from) & 2;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from - odd);
    uint32_t next = words[0];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t word = next;
      next = words[i + 1];
      r.values[i] = __funnelshift_r(word, next, odd * 8);
      if (2 * i >= count) r.values[i] = 0;
      if (2 * i + 1 == count) r.values[i] &= 0xffffu;
    }
  }
  return r;
}

// kCount words of x, zeros from element `count` on.
template <int kCount, bool kAligned, class T>
__device__ __forceinline__ Words<kCount> load_x(const T* from, int count) {
  Words<kCount> r = {};
  if constexpr (kAligned && kCount == 4) {
    r = load_if(count > 0, from);
  } else if constexpr (kAligned) {
    if (count > 0) r = *reinterpret_cast<const Words<kCount>*>(from);
  } else {
    const uint16_t* elements = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      if (i < count) r.values[i / 2] |= static_cast<uint32_t>(elements[i]) << (16 * (i % 2));
    }
  }
  return r;
}

// ---- Clusters ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores two floats to the same variable of a block of the cluster and tells that block's barrier of eight bytes.
__device__ __forceinline__ void store_to_rank(float* variable, int rank, float a, float b, uint64_t* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .b32 to, at;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 at, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, [at];\n}" ::"r"(
          shared_address(variable)),
      "r"(shared_address(barrier)), "r"(rank), "f"(a), "f"(b)
      : "memory");
#endif
}

}  // namespace punica::cuda::bgmv
