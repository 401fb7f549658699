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

// 64 of d_in from k0 on of kColumns columns of weights at any address, `columns` of which exist, to where tensor copies
// put them: by 128 threads, where the copy engine cannot take them.
template <bool kInOut, int kColumns, class T>
__device__ __forceinline__ void fill_weights(uint32_t stage, const T* w, int64_t k0, int64_t column, int columns,
                                             const SgmvArgs& args, int thread) {
  if constexpr (!kInOut) {
    constexpr int kRowStep = 16;
    const int row = thread / 8, chunk = thread % 8;
    const int64_t k = k0 + chunk * 8;
    const T* const from = w + (column + row) * args.d_in + k;
    const int count = static_cast<int>(min(max(args.d_in - k, int64_t{0}), int64_t{8}));
    fill_words<kColumns / kRowStep, kRowStep>(stage + row * 128 + ((chunk ^ (row & 7)) * 16), kRowStep * 128,
                                              reinterpret_cast<const uint16_t*>(from), kRowStep * args.d_in, count,
                                              columns - row);
  } else {
    constexpr int kChunks = kColumns / 8, kWStep = 128 / kChunks;
    constexpr int kUnitChunks = kChunks < 8 ? kChunks : 8;
    static_assert(kWStep % 8 == 0 && kWStep <= 64);
    const int row = thread / kChunks, chunk = thread % kChunks;
    const int turn = kUnitChunks == 8 ? row & 7 : kUnitChunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
    const uint32_t to =
        stage + chunk / kUnitChunks * (64 * 128) + (row * kUnitChunks + (chunk % kUnitChunks ^ turn)) * 16;
    const int count = min(max(columns - chunk * 8, 0), 8);
    const int rows = static_cast<int>(min(max(args.d_in - k0, int64_t{0}), int64_t{64})) - row;
    const T* const from = w + (k0 + row) * args.d_out + column + chunk * 8;
    fill_words<64 / kWStep, kWStep>(to, kWStep * kUnitChunks * 16, reinterpret_cast<const uint16_t*>(from),
                                    kWStep * args.d_out, count, rows);
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

template <class T>
__device__ __forceinline__ uint4 add_eight(uint4 old, const float* sums) {
  return {add_pair<T>(old.x, sums[0], sums[1]), add_pair<T>(old.y, sums[2], sums[3]),
          add_pair<T>(old.z, sums[4], sums[5]), add_pair<T>(old.w, sums[6], sums[7])};
}

// To neighbouring elements of a row of y, of which the first `count` exist.
template <int kCount, class T>
__device__ __forceinline__ void add_some(T* y, int count, const float* sums) {
  T old[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) old[i] = y[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) y[i] = from_float<T>(to_float(old[i]) + sums[i]);
  }
}

// The end of a block: its sums of the rows [kRows, kColumns] of a tile go to the blocks of the cluster, each of which
// owns `share` rows and adds what all have of those, as a balanced tree, to y.
//
// A thread adds up units of 16 columns of a row, of which there are kUnits or fewer. Sums lie as
// [block of the cluster][unit][t], four to a t: of columns 2t, 2t + 1, 2t + 8 and 2t + 9, as products leave them; t is
// turned by the unit, so that threads of neighbouring units meet no bank conflicts.
template <class T, int kRows, int kColumns, int kThreads>
struct ShrinkSums {
  static constexpr int kUnits = (kRows * kColumns / 16 + kThreads - 1) / kThreads;
  static constexpr bool kIsPower = (kRows & (kRows - 1)) == 0;

  T* y;  // of the first row that this block owns
  int64_t stride;
  int columns;
  int share, share_bits, owned;
  uint32_t rank;
  bool whole;  // eight columns at a time are at multiples of 16 bytes
  uint4 old[kUnits][2];

  // tile_y: of the tile. cluster_bits: of the number of blocks.
  __device__ __forceinline__ ShrinkSums(T* tile_y, int64_t stride, bool y_aligned, int rows, int columns, uint32_t rank,
                                        int cluster_bits)
      : stride(stride), columns(columns), share(kRows >> cluster_bits), rank(rank) {
    share_bits = 31 - __clz(share);
    whole = y_aligned && columns % 8 == 0;
    owned = min(max(rows - static_cast<int>(rank) * share, 0), share);
    y = tile_y + rank * share * stride;
  }

  __device__ __forceinline__ int units() const { return share * (kColumns / 16); }
  __device__ __forceinline__ int group_of(int unit) const { return kIsPower ? unit >> share_bits : unit / share; }
  __device__ __forceinline__ int column_of(int unit) const { return group_of(unit) * 16; }
  __device__ __forceinline__ int row_of(int unit) const { return unit - group_of(unit) * share; }
  __device__ __forceinline__ bool is_there(int unit) const {
    return unit < units() && row_of(unit) < owned && column_of(unit) < columns;
  }
  __device__ __forceinline__ T* y_of(int unit) const { return y + row_of(unit) * stride + column_of(unit); }
  static __device__ __forceinline__ int unit(int i) { return static_cast<int>(threadIdx.x) + i * kThreads; }

  // What the other blocks will send.
  __device__ __forceinline__ int foreign_bytes(int cluster) const { return owned * (cluster - 1) * kColumns * 4; }

  __device__ __forceinline__ void prefetch() const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (is_there(unit(i))) prefetch_line(y_of(unit(i)));
    }
  }

  // All at once, where it takes no choice between ways to load: each choice would wait for its load.
  __device__ __forceinline__ void load() {
    if (!whole) return;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const uint4* const from = reinterpret_cast<const uint4*>(y_of(unit(i)));
      if (is_there(unit(i))) old[i][0] = from[0];
      if (is_there(unit(i)) && column_of(unit(i)) + 8 < columns) old[i][1] = from[1];
    }
  }

  // The products of kN columns each of a warpgroup, to `received` in the shared memory of the rows' owners, and 16
  // bytes each to the barrier there.
  template <int kN, int kWide>
  __device__ __forceinline__ void send(const float (&sums)[kWide][kN / 2], int rows, uint32_t received,
                                       uint32_t barrier) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = static_cast<int>(threadIdx.x) / 32 * 16 + h * 8 + lane / 4;
      if (row >= rows) continue;
      const uint32_t owner = kIsPower ? row >> share_bits : row / share;
      const int own_row = row - static_cast<int>(owner) * share;
      const uint32_t to = owner == rank ? received : hopper::remote_address(received, owner);
      const uint32_t to_barrier = hopper::remote_address(barrier, owner);
#pragma unroll
      for (int q = 0; q < kColumns / 16; ++q) {
        const float (&sum)[kN / 2] = sums[q / (kN / 16)];
        const int i = q % (kN / 16) * 8 + h * 2, unit = q * share + own_row;
        const float4 v = {sum[i], sum[i + 1], sum[i + 4], sum[i + 5]};
        const uint32_t at = to + ((rank * units() + unit) * 4 + (lane % 4 ^ (unit >> 1 & 3))) * 16;
        if (owner == rank) {
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                       : "memory");
        } else {
          hopper::store_async(at, v, to_barrier);
        }
      }
    }
  }

  // When all is there.
  __device__ __forceinline__ void add(const float4* parts, int cluster) const {
    switch (cluster) {
      case 1:
        return add_as<1>(parts);
      case 2:
        return add_as<2>(parts);
      case 4:
        return add_as<4>(parts);
      case 8:
        return add_as<8>(parts);
      default:
        return add_as<16>(parts);
    }
  }

 private:
  template <int kCluster>
  __device__ __forceinline__ void add_as(const float4* parts) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int u = unit(i);
      if (!is_there(u)) continue;
      float values[16];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float4 sum = tree_sum<kCluster>(parts + u * 4 + (t ^ (u >> 1 & 3)), units() * 4);
        values[2 * t] = sum.x, values[2 * t + 1] = sum.y;
        values[8 + 2 * t] = sum.z, values[9 + 2 * t] = sum.w;
      }
      if (whole) {
        uint4* const to = reinterpret_cast<uint4*>(y_of(u));
        to[0] = add_eight<T>(old[i][0], values);
        if (column_of(u) + 8 < columns) to[1] = add_eight<T>(old[i][1], values + 8);
      } else {
        add_some<16>(y_of(u), columns - column_of(u), values);
      }
    }
  }
};

#endif

}  // namespace punica::cuda
