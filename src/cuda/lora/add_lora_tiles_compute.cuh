// The warps of add_lora_tiles.cu that compute: the sums over K, their exchange, the way through y.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/lora/add_lora_tiles.cuh"

namespace punica::cuda::fused_lora::tiles {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class T, class S, int kT>
struct Consumer {
  static constexpr int kWarpGroups = 2 * kWarpUnits;  // of eight rows
  using Sums = float[kT][kWarpGroups][4];
  // The first of a unit's two groups of rows.
  __device__ __forceinline__ int group_of(int unit) const { return 4 * unit + 2 * b.part; }

  const Block& b;
  Ring<S> ring = {b.ring, b.barriers};

  // Four neighbouring registers that a product takes come from two loads. A move that the compiler does not see through
  // puts them together once; otherwise it does so before each product.
  __device__ __forceinline__ uint32_t moved(uint32_t word) const {
    uint32_t result;
    asm volatile("xor.b32 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(b.zero));
    return result;
  }

  // Tile j of A of a piece: of ranks g and g + 8.
  __device__ __forceinline__ void read_a(uint4 (&words)[2][2], int j) const {
    const int g = b.lane / 4, t = b.lane % 4;
    const uint32_t unit = ring.weights() + j * kUnitBytes;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      words[0][c] = load_shared_16((unit + 16 * place<3>(g, t)) ^ 64 * c);
      words[1][c] = load_shared_16((unit + 16 * place<3>(g + 8, t)) ^ 64 * c);
    }
  }
  // The same as products take it.
  __device__ __forceinline__ void arrange_a(uint32_t (&a)[4][4], const uint4 (&words)[2][2]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 &upper = words[0][c], &lower = words[1][c];
      a[2 * c][0] = moved(upper.x), a[2 * c][1] = moved(lower.x);
      a[2 * c][2] = moved(upper.y), a[2 * c][3] = moved(lower.y);
      a[2 * c + 1][0] = moved(upper.z), a[2 * c + 1][1] = moved(lower.z);
      a[2 * c + 1][2] = moved(upper.w), a[2 * c + 1][3] = moved(lower.w);
    }
  }
  __device__ __forceinline__ uint32_t rows_unit(int unit) const {
    return ring.rows() + (2 * unit + b.part) * kUnitBytes;
  }
  // x of the warp's units of rows: of rows g and g + 8 of each.
  __device__ __forceinline__ void read_x(uint4 (&x)[kWarpUnits][2][2], int units) const {
    const int g = b.lane / 4, t = b.lane % 4;
#pragma unroll
    for (int i = 0; i < kWarpUnits; ++i) {
      if (i < units) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[i][0][c] = load_shared_16((rows_unit(i) + 16 * place<3>(g, t)) ^ 64 * c);
          x[i][1][c] = load_shared_16((rows_unit(i) + 16 * place<3>(g + 8, t)) ^ 64 * c);
        }
      }
    }
  }
  // Adds the products of 16 ranks and 16 rows; kAlone: as a sum of their own.
  template <bool kAlone>
  __device__ __forceinline__ void multiply(float (*sums)[4], const uint32_t (&a)[4][4], const uint4 (&x)[2][2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float alone[4] = {};
      float (&to)[4] = kAlone ? alone : sums[h];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        mma_m16n8k16<T>(to, a[2 * c], {x[h][c].x, x[h][c].y});
        mma_m16n8k16<T>(to, a[2 * c + 1], {x[h][c].z, x[h][c].w});
      }
      if constexpr (kAlone) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[h][e] += alone[e];
      }
    }
  }

  // The same with all rows of the warp: as many products that do not wait for each other.
  template <bool kAlone>
  __device__ __forceinline__ void multiply_all(float (&sums)[kWarpGroups][4], const uint32_t (&a)[4][4],
                                               const uint4 (&x)[kWarpUnits][2][2]) {
    float alone[kWarpGroups][4] = {};
    float (&to)[kWarpGroups][4] = kAlone ? alone : sums;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int i = 0; i < kWarpGroups; ++i) {
        mma_m16n8k16<T>(to[i], a[2 * c], {x[i / 2][i % 2][c].x, x[i / 2][i % 2][c].y});
      }
#pragma unroll
      for (int i = 0; i < kWarpGroups; ++i) {
        mma_m16n8k16<T>(to[i], a[2 * c + 1], {x[i / 2][i % 2][c].z, x[i / 2][i % 2][c].w});
      }
    }
    if constexpr (kAlone) {
#pragma unroll
      for (int i = 0; i < kWarpGroups; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][e] += alone[i][e];
      }
    }
  }

  // kFull: of all units of rows and tiles of ranks, so that there is nothing to decide between products.
  template <bool kAlone, bool kFull>
  __device__ __forceinline__ void add_piece(Sums& sums, int units, int tiles) {
    ring.wait_full();
    if (!kFull && units == 0) {
      ring.release();
      return;
    }
    // Of A the next tile is on its way while one is multiplied, if there are registers for it.
    constexpr bool kAhead = kAlone || kT < 4;
    uint4 x[kWarpUnits][2][2], words[2][2];
    if constexpr (kAhead) read_a(words, 0);
    read_x(x, kFull ? kWarpUnits : units);
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      if (kFull || j < tiles) {
        uint32_t a[4][4];
        if constexpr (!kAhead) read_a(words, j);
        arrange_a(a, words);
        if (j + 1 < kT && (kFull || j + 1 < tiles)) {
          if constexpr (kAhead) read_a(words, j + 1);
        } else {
          ring.release();
        }
        if constexpr (kFull) {
          multiply_all<kAlone>(sums[j], a, x);
        } else {
#pragma unroll
          for (int i = 0; i < kWarpUnits; ++i) {
            if (i < units) multiply<kAlone>(&sums[j][2 * i], a, x[i]);
          }
        }
      }
    }
  }

  // The sums over K of a chain and rows.
  __device__ __forceinline__ void add_chain(Sums& sums, int chain, int units, int tiles) {
    const int h_in = b.args.h_in;
    // With kT = 4 a kernel has one of the two ways: both take too many registers.
    if (!S::kAnyLength || (kT < 4 && h_in <= kLeaves * kPiece)) {
#pragma unroll 1
      for (int p = chain; p * kPiece < h_in; p += kChains) {
        if (units == kWarpUnits && tiles == kT) {
          add_piece<true, true>(sums, units, tiles);
        } else {
          add_piece<true, false>(sums, units, tiles);
        }
      }
    } else if constexpr (S::kAnyLength) {
#pragma unroll 1
      for (int leaf = chain; leaf < kLeaves; leaf += kChains) {
        Sums of_leaf = {};
#pragma unroll 1
        for (int p = leaf; p * kPiece < h_in; p += kLeaves) {
          if (units == kWarpUnits && tiles == kT) {
            add_piece<false, true>(of_leaf, units, tiles);
          } else {
            add_piece<false, false>(of_leaf, units, tiles);
          }
        }
#pragma unroll
        for (int j = 0; j < kT; ++j) {
#pragma unroll
          for (int i = 0; i < kWarpGroups; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[j][i][e] += of_leaf[j][i][e];
          }
        }
      }
    }
  }

  // Those of the team to shared memory.
  __device__ __forceinline__ void shrink(const Pass& pass, int units) {
#pragma unroll 1
    for (int c = 0; c < S::kTeamChains; ++c) {
      Sums sums = {};
      add_chain(sums, (b.rank * kTeams + b.team) * S::kTeamChains + c, units, pass.tiles);
      static_assert(S::kTeamChains <= 2, "neighbours of a balanced tree");
#pragma unroll
      for (int j = 0; j < kT; ++j) {
#pragma unroll
        for (int i = 0; i < kWarpGroups; ++i) {
          float4* const to = b.parts + ((b.team * kT + j) * kGroups + group_of(i / 2) + i % 2) * 32 + b.lane;
          float4 sum = {sums[j][i][0], sums[j][i][1], sums[j][i][2], sums[j][i][3]};
          if (c > 0) sum.x += to->x, sum.y += to->y, sum.z += to->z, sum.w += to->w;
          *to = sum;
        }
      }
    }
    hopper::named_barrier_sync(1, 32 * kWarps);
  }

  template <int kCount>
  static __device__ __forceinline__ float4 add_neighbours(float4 (&v)[kCount]) {
#pragma unroll
    for (int width = 1; width < kCount; width *= 2) {
#pragma unroll
      for (int w = 0; w < kCount; w += 2 * width) {
        v[w].x += v[w + width].x, v[w].y += v[w + width].y, v[w].z += v[w + width].z, v[w].w += v[w + width].w;
      }
    }
    return v[0];
  }

  // v of a pass, as pairs of numbers, from the sums of all blocks. A warp has a group of eight rows; a lane has of each
  // tile ranks g and g + 8 of rows 2t and 2t + 1. `number`: of passes before.
  __device__ __forceinline__ void exchange(const Job& job, const Pass& pass, int number, int group, bool more) {
    Shared& shared = b.shared;
    const int g = b.lane / 4, t = b.lane % 4;
    const uint32_t barrier = shared_address(&shared.received);
    float4 own[kT];
    if (number > 0) hopper::barrier_wait(shared_address(&shared.drained), (number - 1) & 1);
    if (threadIdx.x == 0) hopper::barrier_expect(barrier, static_cast<int>(S::kReceiveBytes));
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      const int i = (j * kGroups + group) * 32 + b.lane;
      float4 v[kTeams];
#pragma unroll
      for (int w = 0; w < kTeams; ++w) v[w] = b.parts[w * kT * S::kTileFours + i];
      own[j] = add_neighbours(v);
#pragma unroll
      for (int other = 1; other < S::kBlocks; ++other) {
        const uint32_t peer = b.rank ^ other;
        hopper::store_async(
            hopper::remote_address(shared_address(b.receive + (other - 1) * kT * S::kTileFours + i), peer), own[j],
            hopper::remote_address(barrier, peer));
      }
    }
    hopper::barrier_wait(barrier, number & 1);
    float values[kT][4];
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      const int i = (j * kGroups + group) * 32 + b.lane;
      // In the order of distance: the tree of neighbours, seen from this block.
      float4 v[S::kBlocks];
      v[0] = own[j];
#pragma unroll
      for (int other = 1; other < S::kBlocks; ++other) v[other] = b.receive[(other - 1) * kT * S::kTileFours + i];
      const float4 sum = add_neighbours(v);
      values[j][0] = sum.x, values[j][1] = sum.y, values[j][2] = sum.z, values[j][3] = sum.w;
    }
    __syncwarp();  // v takes the place of parts that this warp alone has read
    if (more) {
      if (b.lane > 0 && b.lane < S::kBlocks) {
        // Says that reads have ended; to release writes to the cluster would be to wait for those to y.
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                         hopper::remote_address(shared_address(&shared.drained), b.rank ^ b.lane))
                     : "memory");
      }
    }
    float down[kT][2];
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      if (j < pass.tiles) {
        const int rest = job.work.slices[pass.slice_of[j]].rank - pass.rank_of[j] - g;
        if (rest <= 0) values[j][0] = values[j][1] = 0;
        if (rest <= 8) values[j][2] = values[j][3] = 0;
      }
      down[j][0] = down[j][1] = 1;
    }
    if constexpr (std::is_same_v<T, __half>) {
      // The power of two that float16 needs is of the row and slice.
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float largest[kT];
#pragma unroll
        for (int j = 0; j < kT; ++j) {
          const float first = values[j][e], second = values[j][2 + e];
          largest[j] = fmaxf(isfinite(first) ? fabsf(first) : 0.0f, isfinite(second) ? fabsf(second) : 0.0f);
#pragma unroll
          for (int step = 4; step < 32; step *= 2) {
            largest[j] = fmaxf(largest[j], __shfl_xor_sync(0xffffffffu, largest[j], step));
          }
        }
#pragma unroll
        for (int j = 0; j < kT; ++j) {
          if (j < pass.tiles) {
            float of_slice = 0;
#pragma unroll
            for (int i = 0; i < kT; ++i) {
              if (i < pass.tiles && pass.slice_of[i] == pass.slice_of[j]) of_slice = fmaxf(of_slice, largest[i]);
            }
            const int exponent = row_exponent(of_slice);
            down[j][e] = down_scale(exponent);
            if (g == 0 && pass.rank_of[j] == 0) {
              shared.up[pass.slice_of[j] - pass.begin][8 * group + 2 * t + e] = up_scale(exponent);
            }
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kT; ++j) {
      if (j < pass.tiles) {
        const bool one = job.work.slices[pass.slice_of[j]].rank <= 16;
        uint32_t words[2][2];  // of ranks g and g + 8, of rows 2t and 2t + 1: high and low number
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint16_t high, low;
            split<T>(values[j][2 * h + e] * down[j][e], &high, &low);
            words[h][e] = high | static_cast<uint32_t>(low) << 16;
          }
        }
        // Four lanes have neighbouring ranks of the same rows: each of them gets all four for one h and e, which lie
        // next to each other where products read them.
        const bool odd = g % 2 != 0, upper = g / 2 % 2 != 0;
        uint32_t two[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t kept = odd ? words[h][1] : words[h][0];
          const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[h][0] : words[h][1], 4);
          two[h][0] = odd ? got : kept;
          two[h][1] = odd ? kept : got;
        }
        uint32_t four[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t kept = upper ? two[1][i] : two[0][i];
          const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? two[0][i] : two[1][i], 8);
          four[i] = upper ? got : kept;
          four[2 + i] = upper ? kept : got;
        }
        // The product, and in it the lane, that take rank k and the three after it.
        const int k = pass.rank_of[j] + (upper ? 8 : 0) + (g & 4);
        const int product = j - pass.rank_of[j] / 16 + (one ? 0 : k / 32 * 2 + k % 8 / 4);
        const int to_lane = one ? k / 4 : k % 32 / 8;
        uint4 pair;
        pair.x = __byte_perm(four[0], four[1], 0x5410), pair.y = __byte_perm(four[2], four[3], 0x5410);
        pair.z = __byte_perm(four[0], four[1], 0x7632), pair.w = __byte_perm(four[2], four[3], 0x7632);
        reinterpret_cast<uint4*>(b.parts)[(product * kGroups + group) * 32 + (2 * t + (odd ? 1 : 0)) * 4 + to_lane] =
            pair;
      }
    }
  }

  // Of B of a strip what products j take, of kChunks of 32 ranks, 0 standing for a half one: rows g and g + 8 of it are
  // outputs 8g + 2j and 8g + 2j + 1. `from`: the lane's unit of B.
  template <int kChunks, int kProducts>
  __device__ __forceinline__ void read_b(uint32_t (&w)[kProducts][4], uint32_t from, int j) const {
    constexpr int kRowBits = kChunks + 1;  // log2 of the pieces of a row
    const int g = b.lane / 4, t = b.lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (8 * g) % (128 >> kRowBits) + 2 * j + h;
      if constexpr (kChunks == 0) {
        uint2 words;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(words.x), "=r"(words.y)
                     : "r"(from + 16 * place_b<1>(row, t / 2) + t % 2 * 8)
                     : "memory");
        w[0][h] = moved(words.x), w[0][2 + h] = moved(words.y);
      } else {
#pragma unroll
        for (int q = 0; q < kChunks; ++q) {
          const uint4 words = load_shared_16(from + 16 * place_b<kRowBits>(row, 4 * q + t));
          w[2 * q][h] = moved(words.x), w[2 * q][2 + h] = moved(words.y);
          w[2 * q + 1][h] = moved(words.z), w[2 * q + 1][2 + h] = moved(words.w);
        }
      }
    }
  }

  template <int kChunks>
  __device__ __forceinline__ void expand(const Job& job, const Slice& s, int first_tile, int slice_of_pass, int units) {
    static_assert(kChunks <= 2);
    constexpr int kProducts = kChunks == 0 ? 1 : 2 * kChunks;
    constexpr int kUnitRows = 64 >> kChunks;
    const int g = b.lane / 4, t = b.lane % 4, count = job.work.count;
    const uint32_t v = shared_address(b.parts) + 16 * (first_tile * kGroups * 32 + b.lane);
    const uint32_t y_at = 16 * place_y(2 * t, g);
#pragma unroll 1
    for (int c = (b.rank * kTeams + b.team) * kStrip; c < s.width; c += S::kBlocks * kTeams * kStrip) {
      ring.wait_full();
      if (units == 0) {
        ring.release();
        continue;
      }
      const uint32_t from = ring.weights() + 8 * g / kUnitRows * kUnitBytes;
      uint32_t w[4][kProducts][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) read_b<kChunks>(w[j], from, j);
      char* const y = static_cast<char*>(b.args.y) + sizeof(T) * (s.begin + c + 8 * g);
      const bool inside = c + 8 * g < s.width;
#pragma unroll 1
      for (int u = 0; u < units; ++u) {
        uint4 pairs[2][kProducts];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
            pairs[h][p] = load_shared_16(v + 512 * (p * kGroups + group_of(u) + h));
          }
        }
        // All products before y is looked at: as many of them as there can be do not wait for each other, and there is
        // room for their sums.
        float sums[4][2][4] = {};
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) mma_m16n8k16<T>(sums[j][h], w[j][p], {pairs[h][p].x, pairs[h][p].y});
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) mma_m16n8k16<T>(sums[j][h], w[j][p], {pairs[h][p].z, pairs[h][p].w});
          }
        }
        int64_t row_at[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) row_at[h][e] = job.y_at[8 * (group_of(u) + h) + 2 * t + e];
        }
        uint32_t words[2][2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint4 four = load_shared_16((rows_unit(u) + y_at + 1024 * h + 128 * e) ^ 16 * e);
            words[h][e][0] = four.x, words[h][e][1] = four.y, words[h][e][2] = four.z, words[h][e][3] = four.w;
          }
        }
        if (u == units - 1) ring.release();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float factor = s.scale;
            if constexpr (std::is_same_v<T, __half>) {
              factor *= b.shared.up[slice_of_pass][8 * (group_of(u) + h) + 2 * t + e];
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              uint32_t& word = words[h][e][j];
              float2 before;
              if constexpr (std::is_same_v<T, __half>) {
                before = __half22float2(*reinterpret_cast<const __half2*>(&word));
              } else {
                before = {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
              }
              word = pack<T>(fmaf(factor, sums[j][h][e], before.x), fmaf(factor, sums[j][h][2 + e], before.y));
            }
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = 8 * (group_of(u) + h) + 2 * t + e;
            const uint32_t (&after)[4] = words[h][e];
            if (row < count && inside) {
              asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y + row_at[h][e]), "r"(after[0]),
                           "r"(after[1]), "r"(after[2]), "r"(after[3])
                           : "memory");
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    Shared& shared = b.shared;
    int number = 0, n = 0;  // exchanges, jobs
#pragma unroll 1
    for (uint32_t tile = b.tile; tile < b.tiles; tile += b.step, ++n) {
      if (n > 0) wait_job(shared, n);
      const Job& job = shared.jobs[n & 1];
      const int units = max((job.work.count - 16 * b.part + 31) / 32, 0),
                passes = job.work.count == 0 ? 0 : job.num_passes;
#pragma unroll 1
      for (int p = 0; p < passes; ++p) {
        const Pass& pass = job.passes[p];
        if (number > 0) hopper::named_barrier_sync(1, 32 * kWarps);  // v is used no more
        shrink(pass, units);
        const bool more = p + 1 < passes || b.tiles > b.step;
        exchange(job, pass, number, 2 * b.team + b.part, more);
        ++number;
        hopper::named_barrier_sync(1, 32 * kWarps);  // v is there
        int first = 0;
#pragma unroll 1
        for (int i = pass.begin; i < pass.end; ++i) {
          const Slice& s = job.work.slices[i];
          const int tiles = padded_tiles(s.rank);
          if (tiles == 1) {
            expand<0>(job, s, first, i - pass.begin, units);
          } else if (tiles == 2) {
            if constexpr (kT >= 2) expand<1>(job, s, first, i - pass.begin, units);
          } else {
            if constexpr (kT >= 4) expand<2>(job, s, first, i - pass.begin, units);
          }
          first += tiles;
        }
      }
      end_job(shared, n);
    }
  }
};

#endif

}  // namespace punica::cuda::fused_lora::tiles
