// What the kernels of dispatch_bgmv on sm_90 share: which rows a block serves, barriers that count bytes, bulk copies,
// clusters.
//
// A block has 128 threads and about 20 KiB of shared memory, so that blocks of two kernels of a chain are resident
// together. It moves 16 KiB of weights, which take little time to come: what it does besides must be few instructions.
// So one warp finds the rows for all.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kBulkThreads = 128;
inline constexpr int kBulkWarps = kBulkThreads / 32;

// ---- Rows that share an adapter: find_group() for one warp ---------------------------------------------------------

struct BulkGroup {
  int64_t weights;           // address of the adapter
  int64_t rows[kGroupRows];  // of the columns below count
  int count;                 // 0: the block has nothing to do
};

// By the whole of one warp. `meanwhile` is called while the first loads are on their way. On return the warp sees
// `group`.
template <class Meanwhile>
__device__ __forceinline__ void find_group_by_warp(const BgmvArgs& args, int64_t b, BulkGroup* group,
                                                   Meanwhile meanwhile) {
  constexpr int kWords = kScanRows / 32;
  const int lane = threadIdx.x % 32;
  const int64_t run = b - b % kScanRows;
  const int n = static_cast<int>(min(args.batch - run, static_cast<int64_t>(kScanRows)));
  const int64_t index = args.indices[b];
  int64_t mine[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) mine[i] = 32 * i + lane < n ? args.indices[run + 32 * i + lane] : -1;
  meanwhile();
  int count = 0;
  if (index >= 0 && index < args.num_adapters) {
    const int64_t weights = args.w_ptr[index];
    const int me = static_cast<int>(b - run);
    uint32_t votes[kWords];
    int before = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      votes[i] = __ballot_sync(0xffffffffu, mine[i] == index);
      const uint32_t earlier = me >= 32 * (i + 1) ? 0xffffffffu : me <= 32 * i ? 0u : (1u << (me % 32)) - 1;
      before += __popc(votes[i] & earlier);
      total += __popc(votes[i]);
    }
    if (before % kGroupRows == 0) {
      count = min(total - before, kGroupRows);
      int column = __popc(votes[0] & ((1u << lane) - 1)) - before;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (mine[i] == index && column >= 0 && column < kGroupRows) group->rows[column] = run + 32 * i + lane;
        if (i + 1 < kWords) column += __popc(votes[i] >> lane) + __popc(votes[i + 1] & ((1u << lane) - 1));
      }
      if (lane == 0) group->weights = weights;
    }
  }
  if (lane == 0) group->count = count;
  __syncwarp();
}

// ---- Barriers in shared memory: an arrival says how many bytes to wait for -----------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
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

// Waits for the end of a phase; what arrived in it is seen: from the copy engine, or from the cluster.
template <bool kCluster>
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint32_t done;
  do {
    if constexpr (kCluster) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } else {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(barrier)), "r"(parity)
                   : "memory");
    }
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

__device__ __forceinline__ uint16_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <class T>
__device__ __forceinline__ T bits_as(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(bits);
  } else {
    return __ushort_as_bfloat16(bits);
  }
}

// ---- Clusters ------------------------------------------------------------------------------------------------------

// Orders nothing but the barriers' initialisation, which has its own fence.
__device__ __forceinline__ void cluster_arrive() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
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
