// What one warp of the fast decode does with 16 tokens in shared memory: scores of up to 16 query heads, the online
// softmax, the weighted sums. Tokens are the rows of the tensor-core products and heads their columns: 8 heads, the
// least that a product has, waste less than 16.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/mma.cuh"

namespace punica::cuda {

inline constexpr int kTileTokens = 16;

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of kDim 16-bit elements, in bytes. Eight rows of one
// chunk, what ldmatrix reads at once, fall into different banks: rows are 0, 64, 32 or 96 bytes apart modulo 128.
template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  constexpr int kRest = kDim * 2 % 128;
  const int swizzle = kRest == 0 ? row & 7 : (kRest == 64 ? (row >> 1) & 3 : (row >> 2) & 1);
  return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ swizzle) << 4));
}

__device__ __forceinline__ uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 16 bytes to shared memory, zeros where `valid` is false (then nothing is read).
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The same with a policy (device.cuh).
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  } else {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
  }
}

// Sine and cosine of an angle in units of 2^-64 turns: x is the cosine.
__device__ __forceinline__ float2 turn(uint64_t turns) {
  float sine, cosine;
  sincospif(static_cast<float>(static_cast<int32_t>(turns >> 32)) * 0x1p-31f, &sine, &cosine);
  return make_float2(cosine, sine);
}

// Elements d (low) and d + D / 2 (high) of two neighbours, rotated and rounded. c: cosine, sine, cosine, sine.
template <class T>
__device__ __forceinline__ void rotate_pairs(uint32_t& low, uint32_t& high, const float4& c) {
  const float2 a = unpack<T>(low), b = unpack<T>(high);
  low = pack<T>(__fmaf_rn(-b.x, c.y, __fmul_rn(a.x, c.x)), __fmaf_rn(-b.y, c.w, __fmul_rn(a.y, c.z)));
  high = pack<T>(__fmaf_rn(a.x, c.y, __fmul_rn(b.x, c.x)), __fmaf_rn(a.y, c.w, __fmul_rn(b.y, c.z)));
}

// Folding the state of later keys (maximum, weight = sum of 2^(score - maximum), sums of values times the same) to one
// of earlier keys: the same arithmetic wherever it is done, in the block that has both or in the kernel that merges.
// Parts that saw nothing have -inf, 0, zeros.
struct Fold {
  float decay, later_decay;
  __device__ __forceinline__ Fold(float& maximum, float later_maximum) {
    const float top = fmaxf(maximum, later_maximum), subtracted = finite_or_zero(top);
    decay = exp2_fast(__fsub_rn(maximum, subtracted));
    later_decay = exp2_fast(__fsub_rn(later_maximum, subtracted));
    maximum = top;
  }
  __device__ __forceinline__ void operator()(float& sum, float later) const {
    sum = __fmaf_rn(later, later_decay, __fmul_rn(sum, decay));
  }
};

// A warp's queries and its state. In the layout of mma_m16n8k16 (mma.cuh), with g = lane / 4 and t = lane % 4: queries
// are b (column g a head), scores d (rows g, g + 8 tokens, columns 2t, 2t + 1 heads), sums d (rows dims, columns
// heads). Product k of the scores takes the chunks of 8 dims k and k + kDim / 16: those that rotate together.
template <class T, int kDim, int kColumns, bool kRope>
struct DecodeWarp {
  static constexpr int kSteps = kDim / 16;
  static constexpr int kRopeRow = (kDim / 4 + 7) / 8 * 8;  // float4s of the angles of a token

  uint32_t query[kSteps][kColumns][2];
  float maximum[kColumns][2];  // of heads 2t, 2t + 1; the same in all g
  float weight[kColumns][2];   // of this lane's tokens
  float sums[kSteps][kColumns][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      maximum[n][0] = maximum[n][1] = minus_infinity();
      weight[n][0] = weight[n][1] = 0.0f;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[k][n][i] = 0.0f;
      }
    }
  }

  // From rows of heads in shared memory, laid out as tiles of tokens are.
  __device__ __forceinline__ void load_queries(uint32_t from) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int k = 0; k < kSteps; k += 2) {
        // Both chunks of two products.
        uint32_t b[4];
        load_matrices(b, from + tile_offset<kDim>(8 * n + lane % 8, k + lane / 16 + lane / 8 % 2 * (kDim / 16)));
#pragma unroll
        for (int i = 0; i < 4; ++i) query[k + i / 2][n][i % 2] = b[i];
      }
    }
  }

  // Scores and sums of the 16 tokens at `keys`, kTileTokens * kDim * 2 bytes before their values, both in shared
  // memory. Tokens outside [begin, end), which count from the first of the tile, are not seen; their keys and values
  // are zeros. kRope: `angles` are the angles of 16 tokens from 0 (float4s of cosine, sine of two dims), `query_angles`
  // the ones of the query's position relative to the tile's.
  __device__ __forceinline__ void add_tile(uint32_t keys, int begin, int end, float scale, float cap,
                                           const float4* angles, const float4* query_angles) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Even and odd products are summed apart: shorter chains.
    float scores[kColumns][2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      // Lanes 0-7, 8-15: tokens 0-7, 8-15 of chunk k; 16-31: the same of the other chunk.
      load_matrices(a, keys + tile_offset<kDim>(lane % 16, k + lane / 16 * (kDim / 16)));
      if constexpr (kRope) {
        rotate_pairs<T>(a[0], a[2], angles[g * kRopeRow + ((4 * k + t) ^ ((g & 1) << 2))]);
        rotate_pairs<T>(a[1], a[3], angles[(g + 8) * kRopeRow + ((4 * k + t) ^ ((g & 1) << 2))]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        uint32_t b[2] = {query[k][n][0], query[k][n][1]};
        if constexpr (kRope) rotate_pairs<T>(b[0], b[1], query_angles[4 * k + t]);
        mma_m16n8k16<T>(scores[n][k % 2], a, b);
      }
    }
    uint32_t p[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = __fadd_rn(scores[n][0][i], scores[n][1][i]);
      float factor = scale;
      if (cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = tanhf(__fmul_rn(s[i], scale));
        factor = cap;
      }
      const bool seen[2] = {g >= begin && g < end, g + 8 >= begin && g + 8 < end};
      float top[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float first = seen[0] ? __fmul_rn(s[h], factor) : minus_infinity();
        const float second = seen[1] ? __fmul_rn(s[h + 2], factor) : minus_infinity();
        top[h] = fmaxf(first, second);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], distance));
      }
      float decay[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(maximum[n][h], top[h]);
        const float subtracted = finite_or_zero(top[h]);
        decay[h] = exp2_fast(__fsub_rn(maximum[n][h], subtracted));
        maximum[n][h] = top[h];
        s[h] = seen[0] ? exp2_fast(__fmaf_rn(s[h], factor, -subtracted)) : 0.0f;
        s[h + 2] = seen[1] ? exp2_fast(__fmaf_rn(s[h + 2], factor, -subtracted)) : 0.0f;
        weight[n][h] = __fmaf_rn(weight[n][h], decay[h], __fadd_rn(s[h], s[h + 2]));
      }
      // Where no maximum of the warp has grown, this would be a product with 1, which changes no bit.
      if (__any_sync(0xffffffffu, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[k][n][i] = __fmul_rn(sums[k][n][i], decay[i % 2]);
        }
      }
      p[n][0] = transpose_matrix(pack<T>(s[0], s[1]));
      p[n][1] = transpose_matrix(pack<T>(s[2], s[3]));
    }
    const uint32_t values = keys + kTileTokens * kDim * 2;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      // Lanes 0-7: tokens 0-7 of chunk 2k; 8-15: of chunk 2k + 1; 16-31: tokens 8-15 of both.
      load_matrices_transposed(a, values + tile_offset<kDim>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) mma_m16n8k16<T>(sums[k][n], a, p[n]);
    }
  }
};

}  // namespace punica::cuda
