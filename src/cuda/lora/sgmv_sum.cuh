// The end of kernels whose sums are cut along d_in: adds the parts that warps and blocks have, in their order, to y.
#pragma once

#include <cstdint>

#include "src/cuda/common/device.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// Tells no more than that this block has begun, so that its shared memory is there.
__device__ __forceinline__ void cluster_arrive_begun() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Writes to the place in block `rank` of the cluster that has the address `address` in this one.
__device__ __forceinline__ void store_remote(uint32_t address, uint32_t rank, float value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_begun() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void store_remote(uint32_t, uint32_t, float) {}
#endif

// The rows of a tile of y [64, kCols], shared out among the blocks of a cluster, and a block's elements among its
// threads.
template <class T, int kCols, int kCluster>
struct TileOfY {
  static constexpr int kElements = kSgmvRows * kCols;
  static constexpr int kShare = kElements / kCluster;
  static constexpr int kEach = kShare / kSgmvThreads;
  static constexpr bool kEarly =
      kEach == 1;  // read the old values at the beginning, as registers allow, or ask for them
  static_assert(kShare % kSgmvThreads == 0);

  T* y;
  int64_t stride;
  int rows;
  int columns;
  int rank;
  T old[kEarly ? kEach : 1];

  // `columns`: how many there are from `y` on, possibly more than kCols.
  __device__ __forceinline__ TileOfY(T* y, int64_t stride, int rows, int64_t columns, uint32_t rank)
      : y(y),
        stride(stride),
        rows(rows),
        columns(static_cast<int>(min(columns, int64_t{kCols}))),
        rank(static_cast<int>(rank)) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!is_there(i)) continue;
      if constexpr (kEarly) {
        old[i] = *element(i);
      } else {
        prefetch_line(element(i));
      }
    }
  }

  __device__ __forceinline__ int id(int i) const {
    return rank * kShare + i * kSgmvThreads + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ bool is_there(int i) const { return id(i) / kCols < rows && id(i) % kCols < columns; }
  __device__ __forceinline__ T* element(int i) const { return y + id(i) / kCols * stride + id(i) % kCols; }

  // parts: [kParts][64][kCols], complete for the block. received: room for [kCluster][kShare], which nothing else uses,
  // in a cluster that has arrived at its barrier once.
  template <int kParts>
  __device__ __forceinline__ void add(const float* parts, float* received) {
    const auto sum_parts = [&](int id) {
      float sum = parts[id];
#pragma unroll
      for (int k = 1; k < kParts; ++k) sum += parts[k * kElements + id];
      return sum;
    };
    if constexpr (kCluster > 1) {
      cluster_wait();
      for (int id = threadIdx.x; id < rows * kCols; id += kSgmvThreads) {
        store_remote(shared_address(received + rank * kShare + id % kShare), id / kShare, sum_parts(id));
      }
      __syncwarp();
      cluster_arrive();
      cluster_wait();
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!is_there(i)) continue;
      float sum;
      if constexpr (kCluster > 1) {
        const float* part = received + i * kSgmvThreads + threadIdx.x;
        sum = part[0];
#pragma unroll
        for (int k = 1; k < kCluster; ++k) sum += part[k * kShare];
      } else {
        sum = sum_parts(id(i));
      }
      *element(i) = from_float<T>(to_float(kEarly ? old[kEarly ? i : 0] : *element(i)) + sum);
    }
  }
};

}  // namespace punica::cuda
