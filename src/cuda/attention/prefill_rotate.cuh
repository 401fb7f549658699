// Rotary embedding in the fast prefill: queries in shared memory, once an item. Keys come rotated (rotate_keys_kernel),
// or are rotated in shared memory too, each tile anew, with the same bits.
#pragma once

#include "src/cuda/attention/prefill_items.cuh"
#include "src/cuda/attention/prefill_mma_rope.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace punica::cuda::prefill {

// Piece `piece` of 16 bytes of a row; 64 further elements lie column_bytes behind.
__device__ __forceinline__ uint4* piece_of(unsigned char* tile, int row, int piece, int column_bytes) {
  return reinterpret_cast<uint4*>(tile + piece / 8 * column_bytes + row * 128 + (piece ^ row) % 8 * 16);
}

// Of the pairs of elements 8 chunk .. 8 chunk + 7, two to a float4.
__device__ __forceinline__ void find_angles(const uint64_t* turns, int chunk, uint64_t position, float4 (&angles)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = turn(turns[8 * chunk + 2 * i] * position), b = turn(turns[8 * chunk + 2 * i + 1] * position);
    angles[i] = make_float4(a.x, a.y, b.x, b.y);
  }
}

template <class T, int kDim>
__device__ __forceinline__ void rotate_row(unsigned char* tile, int row, int chunk, int column_bytes,
                                           const float4 (&angles)[4]) {
  uint4* const low = piece_of(tile, row, chunk, column_bytes);
  uint4* const high = piece_of(tile, row, chunk + kDim / 16, column_bytes);
  uint4 a = *low, b = *high;
  rotate_chunks<T>(angles, a, b);
  *low = a;
  *high = b;
}

// A group's rows of queries: the first is head `head` of the query at `position`. By its 128 threads; each has eight
// pairs of elements of all heads of a query.
template <class T, int kDim>
__device__ __forceinline__ void rotate_queries(const uint64_t* turns, int position, int head, int rows, int group_size,
                                               unsigned char* queries, int thread) {
  constexpr int kChunks = kDim / 16;
  const int chunk = thread % kChunks;
#pragma unroll 1
  for (int i = thread / kChunks; i * group_size - head < rows; i += 128 / kChunks) {
    float4 angles[4];
    find_angles(turns, chunk, static_cast<uint64_t>(int64_t{position} + i), angles);
    const int end = min((i + 1) * group_size - head, rows);
#pragma unroll 1
    for (int row = max(i * group_size - head, 0); row < end; ++row) {
      rotate_row<T, kDim>(queries, row, chunk, 64 * 128, angles);
    }
  }
}

// A tile of keys, the first of which is at `position`, a multiple of 16. By `threads` threads; a multiple of 128.
template <class T, int kDim>
__device__ __forceinline__ void rotate_keys(const uint64_t* turns, int position, unsigned char* keys, int thread,
                                            int threads) {
  constexpr int kChunks = kDim / 16, kParts = 16 * kChunks;  // eight pairs of elements of every 16th token
  const int part = thread % kParts, chunk = part % kChunks, token = part / kChunks;
  float4 near[4];
  find_angles(turns, chunk, token, near);
#pragma unroll 1
  for (int i = thread / kParts; i < kPrefillKeys / 16; i += threads / kParts) {
    float4 angles[4];
    find_angles(turns, chunk, static_cast<uint64_t>(position + 16 * i), angles);
#pragma unroll
    for (int j = 0; j < 4; ++j) angles[j] = add_angles(angles[j], near[j]);
    rotate_row<T, kDim>(keys, 16 * i + token, chunk, kPrefillKeys * 128, angles);
  }
}

}  // namespace punica::cuda::prefill

#endif
