// How the kernels of sgmv_shrink.cuh fill their tiles in shared memory, and how they add their sums to y.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared_2(uint32_t to, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}
#else
__device__ __forceinline__ void store_shared_16(uint32_t, uint4) {}
__device__ __forceinline__ void store_shared_2(uint32_t, uint16_t) {}
#endif

// Rows of up to kColumns elements at any address, as the words of 4 bytes that they lie in. No more of a word is read
// than belongs to the tensor: before its first element and behind its last the allocation may end.
template <int kRows, int kColumns>
struct RawTile {
  static constexpr int kPitch = kColumns * 2 + 16;
  static constexpr int kBytes = kRows * kPitch;

  // Asks for `rows` rows, `columns` of each; either may be more than the tile has, or none. Before the first
  // `beginning` rows and behind the last `ending` ones lies nothing of the tensor: an element there that shares its
  // word is read by itself, for the thread to wait for.
  template <int kThreads, class T>
  static __device__ __forceinline__ void fill(uint32_t to, const T* from, int64_t stride, int rows, int64_t columns,
                                              int beginning, int ending) {
    static_assert(kRows <= kThreads);
    constexpr int kLanes = kColumns / 2 < 32 ? kColumns / 2 : 32;  // of a row
    rows = min(rows, kRows);
    const int count = static_cast<int>(min(columns, int64_t{kColumns}));
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    if (count <= 0) return;
    const auto odd_of = [&](int row) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(from + row * stride) / 2 % 2);
    };
    const int own = static_cast<int>(threadIdx.x);
    const uint16_t* const own_row = reinterpret_cast<const uint16_t*>(from + own * stride);
    const int own_odd = odd_of(own);
    const bool reads_first = own < min(rows, beginning) && own_odd != 0;
    const bool reads_last = own < rows && own >= rows - ending && (count + own_odd) % 2 != 0;
    uint16_t first = 0, last = 0;
    if (reads_first) first = own_row[0];
    if (reads_last) last = own_row[count - 1];
#pragma unroll 4
    for (int row = own / kLanes; row < rows; row += kThreads / kLanes) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(from + row * stride);
      const int odd = odd_of(row);
      const int begin = row < beginning ? odd : 0, end = (count + odd + (row < rows - ending ? 1 : 0)) / 2;
      const char* const base = reinterpret_cast<const char*>(at & ~uintptr_t{3});
#pragma unroll
      for (int i = 0; i <= kColumns / 2; i += kLanes) {
        const int word = i + lane;
        if (word >= begin && word < end) copy_async_4(to + row * kPitch + word * 4, base + word * 4, 4);
      }
    }
    if (reads_first) store_shared_2(to + own * kPitch + 2, first);
    if (reads_last) store_shared_2(to + own * kPitch + (count - 1 + own_odd) * 2, last);
  }

  // Puts the tile together: place(row, chunk) says where 8 elements go. What is not there is zeros.
  template <int kThreads, class T, class Place>
  static __device__ __forceinline__ void spread(uint32_t raw, const T* from, int64_t stride, int rows, int64_t columns,
                                                Place place) {
    constexpr int kChunks = kColumns / 8;
    const int count = static_cast<int>(min(columns, int64_t{kColumns}));
#pragma unroll 4
    for (int item = threadIdx.x; item < kRows * kChunks; item += kThreads) {
      const int row = item / kChunks, chunk = item % kChunks;
      const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(from + row * stride) / 2 % 2);
      uint32_t words[5];
      const uint32_t at = raw + row * kPitch + chunk * 16;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(at)
                   : "memory");
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[4]) : "r"(at + 16) : "memory");
      const int valid = row < rows ? count - chunk * 8 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = __funnelshift_r(words[i], words[i + 1], odd * 16);
        if (valid < i * 2 + 2) words[i] = valid == i * 2 + 1 ? words[i] & 0xffffu : 0;
      }
      store_shared_16(place(row, chunk), {words[0], words[1], words[2], words[3]});
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A thread's chunks of 8 elements in a tile, kRowStep rows apart, of which `rows` exist. Where a step is of 4 rows,
// every other chunk is turned by 4 (wgmma's swizzle). Not inlined, so that its registers are not those of the loop that
// seldom needs it.
template <int kEach, int kRowStep>
__device__ __noinline__ void fill_words(uint32_t to, uint32_t to_step, const uint16_t* from, int64_t from_step,
                                        int count, int rows) {
  constexpr int kAtOnce = kEach < 4 ? kEach : 4;
#pragma unroll 1
  for (int first = 0; first < kEach; first += kAtOnce) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = load_eight_words(from, (first + i) * kRowStep < rows ? count : 0);
      from += from_step;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) store_shared_16(to + (first + i) * to_step, values[i]);
  }
}

// The same by asynchronous copies of 16 bytes. kZeros: rows that do not exist are zeros, else left as they are.
template <int kEach, int kRowStep, bool kZeros, class T>
__device__ __forceinline__ void fill_vectors(uint32_t to, uint32_t to_step, const T* from, int64_t from_step, int count,
                                             int rows) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kZeros || i * kRowStep < rows) copy_async_16(to + i * to_step, from, i * kRowStep < rows ? count * 2 : 0);
    from += from_step;
  }
}

// The balanced tree over kCount parts, `stride` apart.
template <int kCount>
__device__ __forceinline__ float4 tree_sum(const float4* part, int stride) {
  if constexpr (kCount == 1) {
    return *part;
  } else {
    return add(tree_sum<kCount / 2>(part, stride), tree_sum<kCount / 2>(part + kCount / 2 * stride, stride));
  }
}

// Two neighbouring elements of a row of y, of which the first `count` exist.
template <class T>
struct Pair {
  T values[2];

  static __device__ __forceinline__ bool whole(const T* at, int count) {
    return count >= 2 && reinterpret_cast<uintptr_t>(at) % 4 == 0;
  }
  __device__ __forceinline__ void load(const T* at, int count) {
    if (whole(at, count)) {
      const uint32_t raw = *reinterpret_cast<const uint32_t*>(at);
      values[0] = reinterpret_cast<const T*>(&raw)[0], values[1] = reinterpret_cast<const T*>(&raw)[1];
    } else {
      if (count > 0) values[0] = at[0];
      if (count > 1) values[1] = at[1];
    }
  }
  __device__ __forceinline__ void add_to(T* at, int count, float a, float b) const {
    Vec<T, 2> sum;
    sum.values[0] = from_float<T>(to_float(values[0]) + a), sum.values[1] = from_float<T>(to_float(values[1]) + b);
    if (whole(at, count)) {
      store(at, sum);
    } else {
      if (count > 0) at[0] = sum.values[0];
      if (count > 1) at[1] = sum.values[1];
    }
  }
};

#endif

}  // namespace punica::cuda
