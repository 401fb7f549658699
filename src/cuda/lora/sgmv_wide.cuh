// What the kernels of sgmv whose sums are those of mma.m16n8k16 or wgmma do with y.
#pragma once

#include <cstdint>

#include "src/cuda/common/device.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {

// Of 16 rows: the columns 2t, 2t + 1 of four products at lane t become the eight columns of product t.
__device__ __forceinline__ void gather_columns(float (&sums)[4][4], int lane) {
  const bool high = (lane & 2) != 0, odd = (lane & 1) != 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, high ? sums[i][e] : sums[i + 2][e], 2);
      if (high) {
        sums[i][e] = other;
      } else {
        sums[i + 2][e] = other;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float other = __shfl_xor_sync(0xffffffffu, odd ? sums[i][e] : sums[i + 1][e], 1);
      if (odd) {
        sums[i][e] = other;
      } else {
        sums[i + 1][e] = other;
      }
    }
  }
}

// Adds 16 rows x 32 columns of sums, as gather_columns() leaves them, to `rows` rows of y that start anywhere: a column
// a lane, by way of shared memory, so that an access of the warp is 64 adjacent bytes. y: of the lane's column. rows:
// for this lane, none or less if its column is not there. staged: kSinglyFloats of the warp alone. Not inlined, so that
// its registers are not those of the way that rows with aligned starts take.
inline constexpr int kSinglyPitch = 33;
inline constexpr int kSinglyFloats = 8 * kSinglyPitch;
template <class T>
__device__ __noinline__ void add_singly(T* y, int64_t stride, int rows, const float (&sums)[4][4], float* staged) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T old[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (half * 8 + r < rows) old[r] = y[(half * 8 + r) * stride];
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 8; ++c) staged[lane / 4 * kSinglyPitch + lane % 4 * 8 + c] = sums[c / 2][half * 2 + c % 2];
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (half * 8 + r >= rows) continue;
      y[(half * 8 + r) * stride] = from_float<T>(to_float(old[r]) + staged[r * kSinglyPitch + lane]);
    }
  }
}

// The same for rows from the tile's row `first` on.
template <class T>
__device__ __forceinline__ void add_singly(const SgmvArgs& args, const SgmvTile<T>& tile, int first,
                                           int64_t warp_column, const float (&sums)[4][4], float* staged, int lane) {
  T* const y = static_cast<T*>(args.y) + (tile.row + first) * args.y_stride + warp_column + lane;
  float copy[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) copy[i / 4][i % 4] = sums[i / 4][i % 4];
  add_singly(y, args.y_stride, warp_column + lane < args.d_out ? tile.rows - first : 0, copy, staged);
}

// What a lane has of a tile of y: rows g, g + 8, g + 16 ..., eight columns of each, or fewer at the right edge.
// kMaxRows: of the warp, so that rows beyond belong to another.
template <class T, int kMaxRows>
struct LaneOfY {
  T* y;
  int64_t step;  // to the next of its rows
  int rows;      // of the tile, from this lane's next one on
  int columns;
  bool is_vector;

  __device__ __forceinline__ LaneOfY(const SgmvArgs& args, const SgmvTile<T>& tile, int warp_row, int64_t warp_column,
                                     int lane) {
    const int64_t first = warp_column + lane % 4 * 8;
    const int row = warp_row + lane / 4;
    y = static_cast<T*>(args.y) + (tile.row + row) * args.y_stride + first;
    step = 8 * args.y_stride;
    rows = tile.rows - row;
    columns = static_cast<int>(max(min(args.d_out - first, int64_t{8}), int64_t{0}));
    is_vector = args.y_aligned && columns == 8;
  }

  // Asks the L2 cache for the lines of its rows.
  __device__ __forceinline__ void prefetch() const {
    if (columns == 0) return;
    for (int i = 0; i * 8 < min(rows, kMaxRows); ++i) prefetch_line(y + i * step);
  }

  // Starts copies of its rows, where they are vectors, to kThreads * 16 bytes a row.
  template <int kThreads>
  __device__ __forceinline__ void copy(uint32_t to) const {
    if (!is_vector) return;
#pragma unroll
    for (int i = 0; i < kMaxRows / 8; ++i) {
      if (i * 8 < rows) copy_async_16(to + i * kThreads * 16, y + i * step, 16);
    }
  }

  // The next kCount of its rows, where they are vectors: all at once, so that the reads do not wait for each other.
  template <int kCount>
  __device__ __forceinline__ void read(Vec<T, 8> (&old)[kCount]) const {
    if (!is_vector) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i * 8 < rows) old[i] = load<T, 8>(y + i * step);
    }
  }

  // The same for two, without a branch: what follows need not wait for them.
  __device__ __forceinline__ void read_if(bool wanted, Vec<T, 8> (&old)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4 v;
      asm volatile(
          "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
          "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
          : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
          : "l"(y + i * step), "r"(static_cast<int>(wanted && is_vector && i * 8 < rows))
          : "memory");
      *reinterpret_cast<uint4*>(&old[i]) = v;
    }
  }

  // Adds row g (half 0) or g + 8 (half 1) of four products to the next of its rows, and leaves that behind.
  __device__ __forceinline__ void add(const Vec<T, 8>& old, const float (&sums)[4][4], int half) {
    T* to = y;
    const bool is_there = rows > 0;
    y += step;
    rows -= 8;
    if (!is_there) return;
    if (is_vector) {
      Vec<T, 8> result;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        result.values[c] = from_float<T>(to_float(old.values[c]) + sums[c / 2][half * 2 + c % 2]);
      }
      store(to, result);
    } else {
      T values[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c < columns) values[c] = to[c];
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c < columns) to[c] = from_float<T>(to_float(values[c]) + sums[c / 2][half * 2 + c % 2]);
      }
    }
  }
};

}  // namespace punica::cuda
