// The fast decode: one query a sequence, 16-bit types, head dims that are multiples of 16. It moves bytes: every key
// and value is read once, and tensor cores do the little there is to compute (decode_tile.cuh).
//
// Work is counted in splits of 256 tokens, those of all KV heads (and tiles of heads, where a group is large) of a
// sequence after each other. Each block of a grid that fills the device takes an equal share of consecutive splits. Its
// warps take turns over the tiles of 16 tokens of a split, each with a ring of tiles in shared memory of its own that
// cp.async fills far ahead, over the ends of splits and sequences, so that nothing in between lets the memory idle:
// the tables of the sequence after and the page addresses of the split after the next are loaded long before their use.
//
// The same bits everywhere: the warps' sums are added in a fixed order at the end of a split, and splits are folded
// from left to right. A block that has the first splits of a query folds them in registers (most queries of a large
// batch end there); splits that follow in other blocks go to the workspace one by one, and merge_decode folds them to
// the first ones in the same order by the same function.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/decode_walk.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

enum class CopyPart { kAll, kAllButNewest, kNewest };

// Starts the copies of a tile. `newest`: the token of the tile that an earlier kernel may be writing, or -1.
template <int kDim, CopyPart kPart>
__device__ __forceinline__ void copy_tile_rows(uint32_t to, int64_t address, int tile, int64_t value_bytes, int newest,
                                               const void* anywhere) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const int index = lane + 32 * i, row = index / kChunks, chunk = index - row * kChunks;
    const int64_t key = __shfl_sync(0xffffffffu, address, tile % 2 * 16 + row);
    if (kPart == CopyPart::kAllButNewest && row == newest) continue;
    if (kPart == CopyPart::kNewest && row != newest) continue;
    const bool valid = key != 0;
    const unsigned char* from =
        valid ? reinterpret_cast<const unsigned char*>(key) + 16 * chunk : static_cast<const unsigned char*>(anywhere);
    const uint32_t at = to + tile_offset<kDim>(row, chunk);
    copy_chunk(at, from, valid);
    copy_chunk(at + kTileTokens * kDim * 2, valid ? from + value_bytes : from, valid);
  }
}

// The sums of a query, spread over the block: thread i has dims 4 (i % 16) + 64 j .. + 3 of heads i / 16, + kThreads
// / 16..
template <class Shape, int kDim>
struct DecodeTotal {
  static constexpr int kSlices = (kDim + Shape::kSumDims - 1) / Shape::kSumDims;
  static constexpr int kHeadStep = Shape::kThreads / 16;
  static constexpr int kRows = Shape::kHeads / kHeadStep;
  float maximum[kRows], weight[kRows], sums[kRows][4 * kSlices];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      maximum[r] = minus_infinity();
      weight[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4 * kSlices; ++i) sums[r][i] = 0.0f;
    }
  }
  __device__ __forceinline__ static int head(int r) { return threadIdx.x / 16 + r * kHeadStep; }
  __device__ __forceinline__ static int dim(int j) { return threadIdx.x % 16 * 4 + j * Shape::kSumDims; }

  __device__ static float4* partial(const AttentionArgs& args, int64_t index, int j) {
    return reinterpret_cast<float4*>(args.partial_sums + index * kDim + dim(j));
  }
  __device__ void store_partial(const AttentionArgs& args, int64_t slot, int64_t first_head, int num_heads) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (head(r) >= num_heads) continue;
      const int64_t index = slot * args.num_heads() + first_head + head(r);
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (dim(j) >= kDim) continue;
        *partial(args, index, j) =
            make_float4(sums[r][4 * j], sums[r][4 * j + 1], sums[r][4 * j + 2], sums[r][4 * j + 3]);
      }
      if (threadIdx.x % 16 == 0) args.partial_states[index] = make_float2(maximum[r], weight[r]);
    }
  }
  template <class T>
  __device__ void store_output(const AttentionArgs& args, const DecodeSplit& split, int64_t first_head, int num_heads,
                               bool aligned) const {
    const bool empty = split.kv_len == 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (head(r) >= num_heads) continue;
      T* to = static_cast<T*>(args.o) + split.sequence * args.o_stride + (first_head + head(r)) * kDim;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (dim(j) >= kDim) continue;
        Vec<T, 4> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values.values[i] = from_float<T>(empty ? 0.0f : __fdiv_rn(sums[r][4 * j + i], weight[r]));
        }
        if (aligned) {
          store(to + dim(j), values);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[dim(j) + i] = values.values[i];
        }
      }
      if (args.lse != nullptr && threadIdx.x % 16 == 0) {
        args.lse[split.sequence * args.num_heads() + first_head + head(r)] =
            empty ? minus_infinity() : __fadd_rn(maximum[r], log2f(weight[r]));
      }
    }
  }
};

template <Arch kArch, class T, int kDim, int kColumns, bool kRope>
__global__ void __launch_bounds__(DecodeShape<kArch, kDim, kColumns, kRope>::kThreads,
                                  DecodeShape<kArch, kDim, kColumns, kRope>::kBlocks)
    decode_kernel(const __grid_constant__ AttentionArgs args, DecodePiece* pieces, bool early_reads,
                  const __grid_constant__ std::conditional_t<kRope, RopeTable, NoRope> rope) {
  if constexpr (kCompiled<kArch>) {
    using Shape = DecodeShape<kArch, kDim, kColumns, kRope>;
    using Warp = DecodeWarp<T, kDim, kColumns, kRope>;
    using Total = DecodeTotal<Shape, kDim>;
    using Addresses = DecodeAddresses<Shape>;
    constexpr int kStages = Shape::kStages, kTiles = Shape::kTiles;
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    float* const all_sums = reinterpret_cast<float*>(dynamic_shared + Shape::kWarps * Shape::kRingBytes);
    float2* const states = reinterpret_cast<float2*>(all_sums + Shape::kSumBytes / 4);
    float4* const angles = reinterpret_cast<float4*>(states + Shape::kStateBytes / 8);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const uint32_t ring = shared_address(dynamic_shared) + warp * Shape::kRingBytes;
    float* const warp_sums = all_sums + warp * Shape::kHeads * Shape::kSumRow;
    float4* const query_angles = reinterpret_cast<float4*>(warp_sums);

    launch_dependents<kArch>();
    // The tables are on their way into the second-level cache while this waits.
    if (kArch == Arch::kSm90 && !early_reads) {
      const int64_t line = static_cast<int64_t>(blockIdx.x) * Shape::kThreads + thread;
      constexpr int64_t kPointers = kLineBytes / 8;
      if (line * kPointers < args.num_page_ptrs) prefetch_line(args.kv_ptrs + line * kPointers);
      if (line * kLineBytes / 4 < args.num_sequences) {
        prefetch_line(args.kv_indptr + line * kLineBytes / 4);
        prefetch_line(args.last_page_offset + line * kLineBytes / 4);
      }
    }
    uint64_t turns[(kDim / 2 + 31) / 32];  // of dims lane, lane + 32, ..
    if constexpr (kRope) {
      for (int i = thread; i < kTileTokens * kDim / 2; i += Shape::kThreads) {
        const int token = i / (kDim / 2), d = i % (kDim / 2);
        const int place = token * Warp::kRopeRow + ((d / 2) ^ ((token & 1) << 2));
        reinterpret_cast<float2*>(angles)[2 * place + d % 2] = turn(rope.turns[d] * static_cast<uint64_t>(token));
      }
#pragma unroll
      for (int i = 0; i < (kDim / 2 + 31) / 32; ++i) turns[i] = rope.turns[lane + 32 * i];
    }
    if (!early_reads) grid_dependency_wait<kArch>();

    DecodeWalk walk = find_share<Shape::kThreads>(args, reinterpret_cast<int64_t*>(states));
    DecodeSplit split = walk.at, after, ahead;
    Addresses here, next, later;
    here.fetch(args, split);
    here.template finish<kDim>(args, split.part);
    // Early reads: all but the newest token may be read now.
    const int64_t newest = early_reads ? split.kv_len - 1 - split.base : -1;  // from the split's base
    bool waits = false;
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      const int row = static_cast<int>(newest - (i * Shape::kWarps + warp) * kTileTokens);
      const bool has_newest = early_reads && newest < kSplitTokens && row >= 0 && row < kTileTokens;
      copy_tile_rows<kDim, CopyPart::kAllButNewest>(ring + i * 2 * Shape::kTileBytes, here.of_tile(i), i,
                                                    args.value_bytes, has_newest ? row : -1, args.kv_ptrs);
      waits = waits || has_newest;
      copy_commit();
    }
    walk.advance();
    after = walk.at;
    next.fetch(args, after);
    if (early_reads) {
      grid_dependency_wait<kArch>();
      if (waits) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) {
          const int row = static_cast<int>(newest - (i * Shape::kWarps + warp) * kTileTokens);
          copy_tile_rows<kDim, CopyPart::kNewest>(ring + i * 2 * Shape::kTileBytes, here.of_tile(i), i,
                                                  args.value_bytes, row, args.kv_ptrs);
        }
        copy_commit();
        copy_wait<0>();
      }
    }

    const bool aligned_queries = (reinterpret_cast<uint64_t>(args.q) % 4 == 0) && args.q_stride % 2 == 0;
    const bool aligned_outputs = (reinterpret_cast<uint64_t>(args.o) % 8 == 0) && args.o_stride % 4 == 0;
    Warp work;
    Total total;
    total.clear();
    int stage = 0;
    bool folds = false, fresh = true;
    DecodePiece piece = {0, 0, 0, 0, 0};
    __syncthreads();  // the tables of angles are here, and `states` are free
    while (split.valid) {
      next.template finish<kDim>(args, after.part);
      walk.advance();
      ahead = walk.at;
      later.fetch(args, ahead);

      const int kv_head = split.part / args.head_tiles, head_tile = split.part - kv_head * args.head_tiles;
      const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * Shape::kHeads;
      const int heads_left = args.group_size - head_tile * Shape::kHeads;
      const int num_heads = heads_left < Shape::kHeads ? heads_left : Shape::kHeads;
      if (fresh || split.index == 0) {
        work.load_queries(static_cast<const T*>(args.q) + split.sequence * args.q_stride + first_head * kDim, num_heads,
                          aligned_queries);
        fresh = false;
      }
      work.clear();
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        copy_wait<kStages - 1>();
        __syncwarp();
        const int first = (tile * Shape::kWarps + warp) * kTileTokens;
        const uint32_t at = ring + stage * 2 * Shape::kTileBytes;
        if (first < split.end && first + kTileTokens > split.begin) {
          if constexpr (kRope) {
            const uint64_t distance = static_cast<uint64_t>(split.kv_len - 1 - split.base - first);
#pragma unroll
            for (int i = 0; i < (kDim / 2 + 31) / 32; ++i) {
              if (lane + 32 * i < kDim / 2) {
                reinterpret_cast<float2*>(query_angles)[lane + 32 * i] = turn(turns[i] * distance);
              }
            }
            __syncwarp();
          }
          work.add_tile(at, split.begin - first, split.end - first, args.scale, args.cap, angles, query_angles);
          __syncwarp();  // the tile has been read
        }
        const int ahead_tile = tile + kStages;
        const bool same = ahead_tile < kTiles;
        const int of = same ? ahead_tile : ahead_tile - kTiles;
        const int its_first = (of * Shape::kWarps + warp) * kTileTokens;
        const int its_begin = same ? split.begin : after.begin, its_end = same ? split.end : after.end;
        const int64_t address = same ? here.of_tile(of) : next.of_tile(of);
        if (its_first < its_end && its_first + kTileTokens > its_begin) {
          copy_tile_rows<kDim, CopyPart::kAll>(at, address, of, args.value_bytes, -1, args.kv_ptrs);
        }
        copy_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }

      // The sums of the warps, in their order, go to the total of the query or to the workspace.
      if (split.index == 0) {
        folds = true;
        total.clear();
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float weight = work.weight[n][h];
#pragma unroll
          for (int d = 4; d < 32; d *= 2) weight = __fadd_rn(weight, __shfl_xor_sync(0xffffffffu, weight, d));
          if (g == 0) states[warp * Shape::kHeads + 8 * n + 2 * t + h] = make_float2(work.maximum[n][h], weight);
        }
      }
#pragma unroll
      for (int j = 0; j < Total::kSlices; ++j) {
#pragma unroll
        for (int k = 4 * j; k < 4 * j + 4; ++k) {
          if (k >= Warp::kSteps) continue;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int head = 8 * n + 2 * t + i % 2;
              if (head >= num_heads) continue;
              warp_sums[head * Shape::kSumRow + 16 * (k - 4 * j) + g + i / 2 * 8] = work.sums[k][n][i];
            }
          }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < Total::kRows; ++r) {
          const int head = Total::head(r);
          if (head >= num_heads || Total::dim(j) >= kDim) continue;
          float top = minus_infinity();
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) top = fmaxf(top, states[w * Shape::kHeads + head].x);
          const float subtracted = finite_or_zero(top);
          float weight = 0.0f;
          float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) {
            const float2 state = states[w * Shape::kHeads + head];
            const float decay = exp2_fast(__fsub_rn(state.x, subtracted));
            weight = __fmaf_rn(state.y, decay, weight);
            const float4 v = *reinterpret_cast<const float4*>(all_sums + (w * Shape::kHeads + head) * Shape::kSumRow +
                                                              threadIdx.x % 16 * 4);
            value.x = __fmaf_rn(v.x, decay, value.x);
            value.y = __fmaf_rn(v.y, decay, value.y);
            value.z = __fmaf_rn(v.z, decay, value.z);
            value.w = __fmaf_rn(v.w, decay, value.w);
          }
          if (folds) {
            float maximum = total.maximum[r];
            const Fold fold(maximum, top);
            fold(total.sums[r][4 * j], value.x);
            fold(total.sums[r][4 * j + 1], value.y);
            fold(total.sums[r][4 * j + 2], value.z);
            fold(total.sums[r][4 * j + 3], value.w);
            if (j == Total::kSlices - 1 || Total::dim(j + 1) >= kDim) {
              fold(total.weight[r], weight);
              total.maximum[r] = maximum;
            }
          } else {
            const int64_t index = (split.slot + split.index) * args.num_heads() + first_head + head;
            *Total::partial(args, index, j) = value;
            if (j == 0 && thread % 16 == 0) args.partial_states[index] = make_float2(top, weight);
          }
        }
        __syncthreads();
      }

      if (folds) {
        if (split.index == split.count - 1) {
          total.template store_output<T>(args, split, first_head, num_heads, aligned_outputs);
          folds = false;
        } else if (!after.valid) {
          total.store_partial(args, split.slot, first_head, num_heads);
          piece = {split.sequence, split.slot, split.count, split.part, static_cast<int32_t>(split.index + 1)};
        }
      }
      split = after;
      after = ahead;
      here = next;
      next = later;
    }
    copy_wait<0>();
    if (pieces != nullptr && thread == 0) pieces[blockIdx.x] = piece;
  }
}

}  // namespace punica::cuda
