// Rotary embedding in the prefill by warp products. Angles are exact at any position: integers in units of 2^-64 turns
// (RopeTable). Keys: sine and cosine of a token's angle are put together from those of the multiple of 16 before it and
// those of its distance from that, so few are computed. It is done in a tile of shared memory, or once for all tiles by
// rotate_keys_kernel, with the same bits.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// Cosine and sine for kTokens / 16 multiples of 16 tokens and for distances of 0 to 15, of each pair of elements d and
// d + D / 2. Neighbours 2 i, 2 i + 1 are one float4; those of eight-element chunk c lie so that lanes side by side,
// which have chunks side by side, meet no bank conflict.
template <int kDim, int kTokens>
struct KeyAngles {
  static constexpr int kChunks = (kDim / 2 + 7) / 8;
  static constexpr int kRow = 4 * kChunks;
  float4 near[16][kRow];
  float4 far[kTokens / 16][kRow];

  __device__ __forceinline__ static int place(int d) { return d % 8 / 2 * kChunks + d / 8; }
  __device__ __forceinline__ static float2& at(float4* row, int d) {
    return reinterpret_cast<float2*>(row)[2 * place(d) + d % 2];
  }

  // By all threads of the block, as set_far; a barrier has to follow. `turns` is in shared memory: in a kernel's
  // parameters, different places are read after each other.
  __device__ __forceinline__ void set_near(const uint64_t* turns, int half) {
    for (int i = threadIdx.x; i < 16 * half; i += blockDim.x) {
      const int token = i / half, d = i - token * half;
      at(near[token], d) = turn(turns[d] * static_cast<uint64_t>(token));
    }
  }
  // For tokens first, first + 1, ..: a multiple of 16.
  __device__ __forceinline__ void set_far(const uint64_t* turns, int half, int64_t first) {
    for (int i = threadIdx.x; i < kTokens / 16 * half; i += blockDim.x) {
      const int step = i / half, d = i - step * half;
      at(far[step], d) = turn(turns[d] * static_cast<uint64_t>(first + 16 * step));
    }
  }
};

// Cosine, sine of the sum of two angles, for two pairs of elements.
__device__ __forceinline__ float4 add_angles(const float4& a, const float4& b) {
  return make_float4(__fmaf_rn(a.x, b.x, -__fmul_rn(a.y, b.y)), __fmaf_rn(a.y, b.x, __fmul_rn(a.x, b.y)),
                     __fmaf_rn(a.z, b.z, -__fmul_rn(a.w, b.w)), __fmaf_rn(a.w, b.z, __fmul_rn(a.z, b.w)));
}

// Angles of elements 8 c .. 8 c + 7 of a token of the tile, two to a float4.
template <class Angles>
__device__ __forceinline__ void chunk_angles(const Angles& angles, int token, int c, float4 (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int place = i * Angles::kChunks + c;
    sum[i] = add_angles(angles.far[token / 16][place], angles.near[token % 16][place]);
  }
}

// Those elements and the ones half a row behind.
template <class T>
__device__ __forceinline__ void rotate_chunks(const float4 (&angles)[4], uint4& low, uint4& high) {
  uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) rotate_pairs<T>(lows[i], highs[i], angles[i]);
  low = make_uint4(lows[0], lows[1], lows[2], lows[3]);
  high = make_uint4(highs[0], highs[1], highs[2], highs[3]);
}

// The same of one pair of elements, d and half a row behind it.
template <class T, class Angles>
__device__ __forceinline__ void rotate_one(const Angles& angles, int token, int d, T& low, T& high) {
  const int place = Angles::place(d);
  const float4 angle = add_angles(angles.far[token / 16][place], angles.near[token % 16][place]);
  const float cosine = d % 2 == 0 ? angle.x : angle.z, sine = d % 2 == 0 ? angle.y : angle.w;
  const float a = to_float(low), b = to_float(high);
  low = from_float<T>(__fmaf_rn(-b, sine, __fmul_rn(a, cosine)));
  high = from_float<T>(__fmaf_rn(a, sine, __fmul_rn(b, cosine)));
}

// A tile of kKeys keys in shared memory, rows as tile_offset() says. By all threads of the block.
template <class T, int kDim, int kKeys, class Angles>
__device__ __forceinline__ void rotate_tile(const Angles& angles, unsigned char* keys, int head_dim) {
  const int half = head_dim / 2;
  if (half % 8 == 0) {
    constexpr int kPairs = Angles::kChunks;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * kPairs; i += blockDim.x) {
      const int token = i / kPairs, c = i - token * kPairs;
      if (c >= half / 8) continue;
      uint4* const low = reinterpret_cast<uint4*>(keys + tile_offset<kDim>(token, c));
      uint4* const high = reinterpret_cast<uint4*>(keys + tile_offset<kDim>(token, c + half / 8));
      uint4 a = *low, b = *high;
      float4 sum[4];
      chunk_angles(angles, token, c, sum);
      rotate_chunks<T>(sum, a, b);
      *low = a;
      *high = b;
    }
  } else {
    const auto at = [&](int token, int d) {
      return reinterpret_cast<T*>(keys + tile_offset<kDim>(token, d / 8) + d % 8 * 2);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * half; i += blockDim.x) {
      const int token = i / half, d = i - token * half;
      rotate_one<T>(angles, token, d, *at(token, d), *at(token, d + half));
    }
  }
}

}  // namespace punica::cuda
