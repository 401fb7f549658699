// The fast decode: one query a sequence, 16-bit types, head dims that are multiples of 16. It moves bytes: every key
// and value is read once, and tensor cores do the little there is to compute (decode_tile.cuh).
//
// Work is counted in splits of 256 tokens, those of all KV heads (and tiles of heads, where a group is large) of a
// sequence after each other. Each block of a grid that fills the device takes an equal share of consecutive splits. Its
// warps take turns over the tiles of 16 tokens of a split, each with a ring of tiles in shared memory of its own that
// cp.async fills far ahead, over the ends of splits and sequences, so that nothing in between lets the memory idle:
// the tables of the sequence after and the page addresses of the split after the next are loaded long before their use.
//
// The same bits everywhere: the warps' sums are added in a fixed order at the end of a split, splits are folded from
// left to right to groups, and groups to the whole. A block that has the beginning of a group or of a query folds in
// registers what it has of it (most queries of a large batch begin and end in one block). What other blocks have goes
// to the workspace. The last of a query's blocks to end folds it in the same order by the same function
// (decode_arrive.cuh), or, where queries are very few, merge_decode_kernel does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_arrive.cuh"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/attention/decode_walk.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

// Starts the copies of those tokens of a tile that have a bit in `rows`; zeros for tokens without an address. `whole`:
// the tile is known to be one stretch of a page.
template <int kDim>
__device__ __forceinline__ void copy_tile_rows(uint32_t to, int64_t address, int tile, int64_t value_bytes,
                                               uint32_t rows, const void* anywhere, uint64_t policy, bool whole) {
  constexpr int kChunks = kDim / 8, kValues = kTileTokens * kDim * 2;
  const int lane = threadIdx.x % 32;
  const int64_t first = __shfl_sync(0xffffffffu, address, tile % 2 * 16);
  if (!whole) {
    // Other tiles may be one stretch too.
    const bool follows = lane / 16 != tile % 2 || (address != 0 && address == first + lane % 16 * (kDim * 2));
    whole = __all_sync(0xffffffffu, follows);
  }
  if (rows == 0xffff && whole) {
    const unsigned char* key = reinterpret_cast<const unsigned char*>(first) + 16 * lane;
    const unsigned char* value = key + value_bytes;
    const uint32_t begin = to + tile_offset<kDim>(lane / kChunks, lane % kChunks);
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      uint32_t at;
      if constexpr (32 % kChunks == 0) {
        // Rows are 32 / kChunks further each time, which the swizzle sees in bits that are zero in the first one: the
        // same places as below, found with one instruction or none.
        at = (begin ^ (32 / kChunks * i % 8 << 4)) + 512 * i;
      } else {
        const int index = lane + 32 * i;
        at = to + tile_offset<kDim>(index / kChunks, index % kChunks);
      }
      copy_chunk(at, key + 512 * i, policy);
      copy_chunk(at + kValues, value + 512 * i, policy);
    }
    return;
  }
#pragma unroll 2
  for (int index = lane; index < kTileTokens * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index - row * kChunks;
    const int64_t key = __shfl_sync(0xffffffffu, address, tile % 2 * 16 + row);
    if ((rows >> row & 1) == 0) continue;
    const bool valid = key != 0;
    const unsigned char* from =
        valid ? reinterpret_cast<const unsigned char*>(key) + 16 * chunk : static_cast<const unsigned char*>(anywhere);
    const uint32_t at = to + tile_offset<kDim>(row, chunk);
    copy_chunk(at, from, valid, policy);
    copy_chunk(at + kValues, valid ? from + value_bytes : from, valid, policy);
  }
}

// Starts the copies of a query's heads, by all threads: rows of a tile, zeros where there is no head.
template <class T, int kDim, int kHeads, int kThreads>
__device__ __forceinline__ void copy_query_rows(uint32_t to, const T* from, int num_heads, bool aligned) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int begin = 0; begin < kHeads * kChunks; begin += kThreads) {
    const int index = begin + threadIdx.x, head = index / kChunks, chunk = index % kChunks;
    if (kHeads * kChunks % kThreads != 0 && index >= kHeads * kChunks) continue;
    const bool valid = head < num_heads;
    const uint32_t at = to + tile_offset<kDim>(head, chunk);
    if (aligned) {
      copy_chunk(at, from + (valid ? 8 * index : 0), valid);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (valid)
          words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[8 * index + i]) << i % 2 * 16;
      }
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                   "r"(words[3])
                   : "memory");
    }
  }
}

// The sums of a query, spread over the block: thread i has dims 4 (i % 16) + 64 j .. + 3 of heads i / 16, + kThreads
// / 16..
template <class Shape, int kDim>
struct DecodeTotal {
  static constexpr int kSlices = (kDim + 63) / 64;
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
  __device__ __forceinline__ static int dim(int j) { return threadIdx.x % 16 * 4 + 64 * j; }

  __device__ static float4* partial(const AttentionArgs& args, int64_t index, int j) {
    return reinterpret_cast<float4*>(args.partial_sums + index * kDim + dim(j));
  }
  __device__ void fold_in(const DecodeTotal& later) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Fold fold(maximum[r], later.maximum[r]);
      fold(weight[r], later.weight[r]);
#pragma unroll
      for (int i = 0; i < 4 * kSlices; ++i) fold(sums[r][i], later.sums[r][i]);
    }
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
      const float inverse = __fdiv_rn(1.0f, weight[r]);  // one division for all dims, in every kernel that merges
      T* to = static_cast<T*>(args.o) + static_cast<int64_t>(split.sequence) * args.o_stride +
              (first_head + head(r)) * kDim;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (dim(j) >= kDim) continue;
        Vec<T, 4> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values.values[i] = from_float<T>(empty ? 0.0f : __fmul_rn(sums[r][4 * j + i], inverse));
        }
        if (aligned) {
          store(to + dim(j), values);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[dim(j) + i] = values.values[i];
        }
      }
      if (args.lse != nullptr && threadIdx.x % 16 == 0) {
        args.lse[static_cast<int64_t>(split.sequence) * args.num_heads() + first_head + head(r)] =
            empty ? minus_infinity() : __fadd_rn(maximum[r], log2f(weight[r]));
      }
    }
  }
};

template <Arch kArch, class T, int kDim, int kColumns, bool kRope>
__global__ void __launch_bounds__(DecodeShape<kArch, kDim, kColumns, kRope>::kThreads,
                                  DecodeShape<kArch, kDim, kColumns, kRope>::kBlocks)
    decode_kernel(const __grid_constant__ AttentionArgs args, const DecodeMerge merge, int group_bits, bool early_reads,
                  const __grid_constant__ std::conditional_t<kRope, RopeTable, NoRope> rope) {
  if constexpr (kCompiled<kArch>) {
    using Shape = DecodeShape<kArch, kDim, kColumns, kRope>;
    using Warp = DecodeWarp<T, kDim, kColumns, kRope>;
    using Total = DecodeTotal<Shape, kDim>;
    using Addresses = DecodeAddresses<Shape>;
    constexpr int kStages = Shape::kStages, kTiles = Shape::kTiles;
    static_assert(sizeof(MergeShared<kDim, Shape::kThreads>) <= Shape::kWarps * Shape::kRingBytes + Shape::kSumBytes);
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    float* const all_sums = reinterpret_cast<float*>(dynamic_shared + Shape::kWarps * Shape::kRingBytes);
    float2* const states = reinterpret_cast<float2*>(all_sums + Shape::kSumBytes / 4);
    DecodeNote* const notes = reinterpret_cast<DecodeNote*>(states + Shape::kStateBytes / 8);
    DecodeList* const list = reinterpret_cast<DecodeList*>(notes + 2);
    static_assert(2 * sizeof(DecodeNote) + sizeof(DecodeList) == Shape::kNoteBytes);
    float4* const angles = reinterpret_cast<float4*>(list + 1);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const uint32_t ring = shared_address(dynamic_shared) + warp * Shape::kRingBytes;
    float* const warp_sums = all_sums + warp * Shape::kHeads * Shape::kSumRow;
    float4* const query_angles = reinterpret_cast<float4*>(warp_sums);

    launch_dependents<kArch>();
    // Under early reads nothing is waited for that a guess could save.
    const DecodeHint last_hint = merge.counters >= 0 && !early_reads ? load_hint(merge.counters) : DecodeHint{0, 0};
    // What needs no memory that others write is done before the wait.
    const DecodeScan scan = DecodeScan::prepare<Shape::kThreads>(args);
    const uint32_t page_size = static_cast<uint32_t>(args.page_size);
    const int page_shift = (page_size & (page_size - 1)) == 0 ? 31 - __clz(page_size) : -1;
    const bool aligned_queries = (reinterpret_cast<uint64_t>(args.q) % 16 == 0) && args.q_stride % 8 == 0;
    // Tiles of heads read the same keys.
    const uint64_t policy = args.head_tiles == 1 ? read_once_policy() : read_again_policy();
    if constexpr (kArch == Arch::kSm90) {
      // The tables are on their way into the second-level cache while this waits.
      if (!early_reads) {
        const int64_t line = static_cast<int64_t>(blockIdx.x) * Shape::kThreads + thread;
        constexpr int64_t kPointers = kLineBytes / 8;
        if (line * kPointers < args.num_page_ptrs) prefetch_line(args.kv_ptrs + line * kPointers);
        if (scan.begin < scan.end) {
          prefetch_line(args.kv_indptr + scan.begin);
          prefetch_line(args.last_page_offset + scan.begin);
        }
        if (thread == 0 && args.num_page_ptrs > 0) prefetch_line(args.kv_ptrs);
      }
      // Every block does this, for its multiprocessor has to learn anew where things lie: keys and values have made it
      // forget that.
      const void* place = args.q;
      if (warp == 1) place = args.o;
      if (warp == 2 && args.num_slots > 0) place = args.partial_sums;
      if (warp == 3 && merge.counters >= 0) place = decode_counter_sets[merge.counters];
      if (lane == 0) prefetch_line(place);
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
    const DecodeGuess guess = DecodeGuess::make(args, last_hint, group_bits, scan);
    typename Addresses::Guess guessed;
    if (guess.splits != 0) guessed = Addresses::Guess::template make<kDim>(args, guess, page_shift);
    if (!early_reads) grid_dependency_wait<kArch>();

    Addresses here, next, later;
    const DecodeTables first_tables =
        scan.begin < scan.end ? DecodeTables::load(args, scan.begin) : DecodeTables{0, 0, 0};
    if (guess.splits != 0) here.fetch(guessed);
    Warp work;
    // Queries come to shared memory while the split before them is summed, two taking turns.
    const uint32_t query_buffers = shared_address(notes) + Shape::kNoteBytes + Shape::kAngleBytes;
    uint32_t query_buffer = query_buffers;
    const auto copy_queries = [&](const DecodeSplit& of, uint32_t to) {
      const int kv_head = DecodeWalk::kv_head(args, of.part), head_tile = of.part - kv_head * args.head_tiles;
      const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * Shape::kHeads;
      copy_query_rows<T, kDim, Shape::kHeads, Shape::kThreads>(
          to, static_cast<const T*>(args.q) + static_cast<int64_t>(of.sequence) * args.q_stride + first_head * kDim,
          args.group_size - head_tile * Shape::kHeads, aligned_queries);
    };
    if (guess.splits != 0) {
      DecodeSplit guessed_split;
      guessed_split.part = guess.part;
      guessed_split.sequence = guess.sequence;
      copy_queries(guessed_split, query_buffer);
      copy_commit();
    }
    // The sums of the warps are not there yet.
    DecodeHint hint;
    DecodeWalk walk = find_share<Shape::kThreads, Shape::kSumBytes / static_cast<int>(sizeof(DecodePages))>(
        args, group_bits, scan, guess, first_tables, reinterpret_cast<int32_t*>(states),
        reinterpret_cast<DecodePages*>(all_sums), &hint);
    DecodeSplit split = walk.at, after, ahead;
    const int32_t first_left = walk.left;
    // What the first tiles need besides copies is asked for before these: it would wait behind those of all blocks.
    walk.look_ahead(args);
    if (guess.splits != 0 && guess.sequence == split.sequence && guess.part == split.part &&
        guess.first_page == split.first_page && guess.base == split.base) {
      here.finish(guessed, split);
    } else {
      here.fetch(args, split, page_shift);
      copy_wait<0>();  // of other queries to the same place
      if (!early_reads && split.valid) copy_queries(split, query_buffer);
      here.template finish<kDim>(args, split.part);
    }
    copy_commit();
    // Early reads: all but the newest token may be read now.
    const int newest = split.kv_len - 1 - split.base;  // from the split's base
    const auto newest_row = [&](int tile) {
      const int row = newest - (tile * Shape::kWarps + warp) * kTileTokens;
      return early_reads && row >= 0 && row < kTileTokens ? row : -1;
    };
    bool waits = false;
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      const uint32_t at = ring + i * 2 * Shape::kTileBytes;
      const int row = newest_row(i), first = (i * Shape::kWarps + warp) * kTileTokens;
      const bool whole = page_shift >= 4 && first >= split.begin && first + kTileTokens <= split.end;
      copy_tile_rows<kDim>(at, here.of_tile(i), i, args.value_bytes, row < 0 ? 0xffff : 0xffff ^ 1u << row,
                           args.kv_ptrs, policy, whole);
      waits = waits || row >= 0;
      copy_commit();
    }
    walk.advance(args);
    after = walk.at;
    next.fetch(args, after, page_shift);
    if (early_reads) {
      grid_dependency_wait<kArch>();
      if (split.valid) copy_queries(split, query_buffer);
      if (waits) {
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) {
          const int row = newest_row(i);
          if (row < 0) continue;
          copy_tile_rows<kDim>(ring + i * 2 * Shape::kTileBytes, here.of_tile(i), i, args.value_bytes, 1u << row,
                               args.kv_ptrs, policy, false);
        }
      }
      copy_commit();
      copy_wait<0>();
    } else {
      copy_wait<kStages>();  // the query
    }

    const bool aligned_outputs = (reinterpret_cast<uint64_t>(args.o) % 8 == 0) && args.o_stride % 4 == 0;
    // Where nothing is left to merge, the block counts itself at once: the answer takes a while.
    uint32_t ended = 0;
    if (merge.counters >= 0 && walk.whole_queries) ended = count_block(merge.counters);
    Total total, group;
    total.clear();
    group.clear();
    int stage = 0;
    bool fresh_query = true;
    bool has_start = false, has_group = false;  // of the query, of the group
    DecodePiece piece = {};
    const int parts = args.num_kv_heads * args.head_tiles;
    const bool by_query = merge.pieces != nullptr && args.num_sequences * parts <= gridDim.x;
    if (thread == 0) {
      notes[0] = notes[1] = {};
      if (merge.counters >= 0 && !walk.whole_queries && split.valid && split.index > 0) {
        notes[0] = DecodeNote::make(args, {split.count, split.sequence, split.part, split.slot, walk.each, walk.more},
                                    group_bits, Shape::kHeads);
      }
    }
    if (merge.counters >= 0 && !early_reads && blockIdx.x == 0 && thread == 0 &&
        (hint.splits != last_hint.splits || hint.pages != last_hint.pages)) {
      store_hint(merge.counters, hint);
    }
    int32_t left = first_left;  // splits of the block, with this one
    __syncthreads();            // the tables of angles are here, and `states` are free
    while (split.valid) {
      next.template finish<kDim>(args, after.part);
      walk.advance(args);
      ahead = walk.at;
      later.fetch(args, ahead, page_shift);

      const int kv_head = DecodeWalk::kv_head(args, split.part), head_tile = split.part - kv_head * args.head_tiles;
      const int64_t first_head = static_cast<int64_t>(kv_head) * args.group_size + head_tile * Shape::kHeads;
      const int heads_left = args.group_size - head_tile * Shape::kHeads;
      const int num_heads = heads_left < Shape::kHeads ? heads_left : Shape::kHeads;
      if (split.index == 0) {
        if (thread == 0 && merge.counters >= 0 && !walk.whole && split.count > left) {
          notes[1] = DecodeNote::make(args, {split.count, split.sequence, split.part, split.slot, walk.each, walk.more},
                                      group_bits, Shape::kHeads);
        }
      }
      --left;
      // Of a block's first split too where the query began before.
      if (fresh_query) work.load_queries(query_buffer);
      fresh_query = after.valid && after.index == 0;
      if (fresh_query) {
        query_buffer = query_buffers + (query_buffer == query_buffers ? Shape::kQueryBytes : 0);
        copy_queries(after, query_buffer);
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
        int64_t address = here.of_tile(of);
        if (!same) address = next.of_tile(of);
        if (its_first < its_end && its_first + kTileTokens > its_begin) {
          const bool whole = page_shift >= 4 && its_first >= its_begin && its_first + kTileTokens <= its_end;
          copy_tile_rows<kDim>(at, address, of, args.value_bytes, 0xffff, args.kv_ptrs, policy, whole);
        }
        copy_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }

      if (fresh_query) copy_wait<kTiles - 1>();  // the next query, for all warps behind the barrier

      // The sums of the warps, in their order, go to the group of the split or to the workspace.
      const int group_index = split.in_group;
      if (split.index == 0) {
        has_start = true;
        total.clear();
      }
      if (group_index == 0) {
        has_group = true;
        group.clear();
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
      for (int dims = 0; dims < kDim; dims += Shape::kSumDims) {
#pragma unroll
        for (int k = dims / 16; k < Warp::kSteps && 16 * k < dims + Shape::kSumDims; ++k) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int head = 8 * n + 2 * t + i % 2;
              if (head < num_heads) {
                warp_sums[head * Shape::kSumRow + 16 * k - dims + g + i / 2 * 8] = work.sums[k][n][i];
              }
            }
          }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < Total::kRows; ++r) {
          const int head = Total::head(r);
          if (head >= num_heads) continue;
          float top = minus_infinity(), weight = 0.0f, decay[Shape::kWarps];
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) top = fmaxf(top, states[w * Shape::kHeads + head].x);
          const float subtracted = finite_or_zero(top);
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) {
            const float2 state = states[w * Shape::kHeads + head];
            decay[w] = exp2_fast(__fsub_rn(state.x, subtracted));
            weight = __fmaf_rn(state.y, decay[w], weight);
          }
          float maximum = group.maximum[r];
          const Fold fold(maximum, top);
          const int64_t index = static_cast<int64_t>(split.slot + split.index) * args.num_heads() + first_head + head;
#pragma unroll
          for (int j = dims / 64; j < Total::kSlices && 64 * j < dims + Shape::kSumDims; ++j) {
            if (Total::dim(j) >= kDim) continue;
            float value[4] = {};
#pragma unroll
            for (int w = 0; w < Shape::kWarps; ++w) {
              const float4 v = *reinterpret_cast<const float4*>(all_sums + (w * Shape::kHeads + head) * Shape::kSumRow +
                                                                Total::dim(j) - dims);
              value[0] = __fmaf_rn(v.x, decay[w], value[0]);
              value[1] = __fmaf_rn(v.y, decay[w], value[1]);
              value[2] = __fmaf_rn(v.z, decay[w], value[2]);
              value[3] = __fmaf_rn(v.w, decay[w], value[3]);
            }
            if (has_group) {
#pragma unroll
              for (int i = 0; i < 4; ++i) fold(group.sums[r][4 * j + i], value[i]);
            } else {
              *Total::partial(args, index, j) = make_float4(value[0], value[1], value[2], value[3]);
            }
          }
          if (dims + Shape::kSumDims < kDim) continue;
          if (has_group) {
            fold(group.weight[r], weight);
            group.maximum[r] = maximum;
          } else if (thread % 16 == 0) {
            args.partial_states[index] = make_float2(top, weight);
          }
        }
        __syncthreads();
      }

      const bool query_ends = split.index == split.count - 1;
      const bool group_ends = query_ends || group_index == split.group - 1;
      if (has_start && group_ends) {
        total.fold_in(group);
      } else if (has_group && (group_ends || !after.valid)) {
        group.store_partial(args, split.slot + split.index - group_index, first_head, num_heads);
      }
      if (has_start && (query_ends || !after.valid)) {
        if (query_ends) {
          total.template store_output<T>(args, split, first_head, num_heads, aligned_outputs);
        } else {
          if (split.index + 1 >= split.group) total.store_partial(args, split.slot, first_head, num_heads);
          piece = {split.count, split.sequence, split.part, split.slot, walk.each, walk.more};
        }
        if (by_query && thread == 0) merge.pieces[split.sequence * parts + split.part] = piece;
      }
      if (query_ends) has_start = false;
      if (group_ends) has_group = false;
      split = after;
      after = ahead;
      here = next;
      next = later;
    }
    copy_wait<0>();
    if (merge.pieces != nullptr && !by_query && thread == 0) merge.pieces[blockIdx.x] = piece;
    if (merge.counters >= 0) {
      if (!walk.whole_queries) {
        ended = arrive_and_merge<T, kDim, Shape::kThreads>(
            args, notes, merge.counters, group_bits, aligned_outputs, reinterpret_cast<int32_t*>(states), *list,
            *reinterpret_cast<MergeShared<kDim, Shape::kThreads>*>(dynamic_shared));
      }
      reset_counters(merge.counters, ended);
    }
  }
}

}  // namespace punica::cuda
