// What a warp of the prefill by warp products does with a tile of keys and values in shared memory.
#pragma once

#include <cstdint>

#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/mma.cuh"

namespace punica::cuda {

// Which shape serves a head dim, padded with zeros to kDim. Two blocks fit on a multiprocessor, and one into 99 KiB.
template <int kDim_, bool kRope>
struct MmaShape {
  static constexpr int kDim = kDim_;
  static constexpr int kThreads = 128, kWarps = kThreads / 32;
  // Of 16 rows each, a warp: two let it use what it loads of keys and values twice; more than 128 dims leave no room.
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  // Keys of a tile: as many as registers have room for the scores of.
  static constexpr int kKeys = kDim <= 64 ? 128 : kRope && kDim > 192 ? 32 : 64;
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kRing = 2;  // tiles of keys or values in shared memory
  static constexpr int kSums = kDim / 8;
};

__device__ __forceinline__ float mma_quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float mma_quad_sum(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(~0u, v, 1));
  return __fadd_rn(v, __shfl_xor_sync(~0u, v, 2));
}

// A warp's sums and its state, in the layout of mma_m16n8k16 (mma.cuh): with g = lane / 4 and t = lane % 4 a lane has
// rows g + 8 h of each of its tiles of 16 rows, columns 2t, 2t + 1 of each 8.
template <class T, class Shape>
struct MmaWarp {
  static constexpr int kDim = Shape::kDim, kRowTiles = Shape::kRowTiles, kKeys = Shape::kKeys;

  float maximum[kRowTiles][2];  // of the scores before the factor, or less (soften); the same in all t
  float weight[kRowTiles][2];   // of this lane's columns
  float sums[kRowTiles][Shape::kSums][4];
  float scores[kRowTiles][kKeys / 8][4];

  // What follows is for the first kTiles tiles of rows: where there are few rows, one.

  __device__ __forceinline__ void clear_state() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) maximum[m][h] = minus_infinity(), weight[m][h] = 0.0f;
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int j = 0; j < Shape::kSums; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.0f;
      }
    }
  }

  // Scores of the warp's rows, which lie at `queries`, and the tile's keys.
  template <int kTiles>
  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][j][i] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        load_matrices(a[m], queries + 16 * m * (kDim * 2) + tile_offset<kDim>(lane % 16, 2 * k + lane / 16));
      }
      // Lanes 0-7, 8-15: keys 0-7 of chunks 2k, 2k + 1; 16-31: keys 8-15.
      const uint32_t columns = keys + tile_offset<kDim>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, columns + 16 * j * (kDim * 2));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(scores[m][2 * j], a[m], low);
          mma_m16n8k16<T>(scores[m][2 * j + 1], a[m], high);
        }
      }
    }
  }

  // Scores to weights, in place. What weights are relative to follows the row's maximum only when that has grown by a
  // factor of 2^8: until then they are no larger, and the sums so far need not shrink, which mostly is so after the
  // first tile. Each row decides for itself.
  template <int kTiles>
  __device__ __forceinline__ void soften(float factor) {
    float decay[kTiles][2];
    bool shrinks = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = fmaxf(scores[m][0][2 * h], scores[m][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
        top = mma_quad_max(top);
        const float growth = __fmul_rn(__fsub_rn(top, maximum[m][h]), factor);
        decay[m][h] = 1.0f;
        if (growth > 8.0f) {
          decay[m][h] = exp2_fast(-growth);
          maximum[m][h] = top;
          shrinks = true;
        }
        const float shift = __fmul_rn(finite_or_zero(maximum[m][h]), factor);
        float total[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[m][j][2 * h + e];
            score = exp2_fast(__fmaf_rn(score, factor, -shift));
            total[e] = __fadd_rn(total[e], score);
          }
        }
        weight[m][h] = __fmaf_rn(weight[m][h], decay[m][h], __fadd_rn(total[0], total[1]));
      }
    }
    // Otherwise a product with 1, which changes no bit.
    if (__any_sync(~0u, shrinks)) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < Shape::kSums; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][j][i] = __fmul_rn(sums[m][j][i], decay[m][i / 2]);
        }
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = pack<T>(scores[m][2 * k + i / 2][i % 2 * 2], scores[m][2 * k + i / 2][i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
        uint32_t b[4];
        // Lanes 0-7, 8-15: keys 0-7, 8-15 of chunk 2j; 16-31: of chunk 2j + 1.
        load_matrices_transposed(b, values + 16 * k * (kDim * 2) + tile_offset<kDim>(lane % 16, 2 * j + lane / 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(sums[m][2 * j], a[m], low);
          mma_m16n8k16<T>(sums[m][2 * j + 1], a[m], high);
        }
      }
    }
  }

  // Scores of keys outside [begin, end) of a row become -inf; `first` is the tile's first key.
  template <int kTiles>
  __device__ __forceinline__ void mask(const MmaRow* rows, int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const MmaRow& row = rows[16 * m + 8 * h + g];
        const int begin = row.begin - first - 2 * t, end = row.end - first - 2 * t;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * j + e < begin || 8 * j + e >= end) scores[m][j][2 * h + e] = minus_infinity();
          }
        }
      }
    }
  }

  // tanh(score * scale): absolute error below 3e-7.
  template <int kTiles>
  __device__ __forceinline__ void cap(float scale) {
    const float twice = __fmul_rn(scale, 2.885390082f);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = exp2_fast(__fmul_rn(scores[m][j][i], twice));
          scores[m][j][i] = __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, e)));
        }
      }
    }
  }

  // Adds the split that has ended to those before, at `saved` (float4 i of a thread at i * kThreads) and in `states`,
  // or with kLast to what is in the registers.
  template <bool kLast>
  __device__ __forceinline__ void fold_split(float4* saved, float2* states, bool any_saved, float factor) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float decay[2], later_decay[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2& state = states[16 * m + 8 * h + g];
        float2 before = any_saved ? state : make_float2(minus_infinity(), 0.0f);
        const Fold fold(before.x, __fmul_rn(maximum[m][h], factor));
        fold(before.y, mma_quad_sum(weight[m][h]));
        decay[h] = fold.decay;
        later_decay[h] = fold.later_decay;
        __syncwarp();
        if (kLast) {
          maximum[m][h] = before.x;
          weight[m][h] = before.y;
        } else if (t == 0) {
          state = before;
        }
      }
#pragma unroll
      for (int j = 0; j < Shape::kSums; ++j) {
        float4& place = saved[(m * Shape::kSums + j) * Shape::kThreads];
        float4 before = any_saved ? place : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float (&later)[4] = sums[m][j];
        before.x = __fmaf_rn(later[0], later_decay[0], __fmul_rn(before.x, decay[0]));
        before.y = __fmaf_rn(later[1], later_decay[0], __fmul_rn(before.y, decay[0]));
        before.z = __fmaf_rn(later[2], later_decay[1], __fmul_rn(before.z, decay[1]));
        before.w = __fmaf_rn(later[3], later_decay[1], __fmul_rn(before.w, decay[1]));
        if (kLast) {
          later[0] = before.x, later[1] = before.y, later[2] = before.z, later[3] = before.w;
        } else {
          place = before;
        }
      }
    }
    __syncwarp();
  }
};

}  // namespace punica::cuda
