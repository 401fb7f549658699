// Which tile a block of add_lora_ring.cuh serves, found in as few waits for memory as there can be, by one warp where
// there are few segments: what the first adapters have (addresses, ranks, scales) is asked for together with the
// segments, and the tile's rows while the block asks for weights already.
#pragma once

#include <climits>

#include "src/cuda/lora/add_lora.cuh"

namespace punica::cuda::fused_lora {

// Up to here each thread of the block looks at one segment.
inline constexpr int kFindWindow = 256;

// The block's slice, and its place among the blocks of it. Grid: x the blocks of a cluster, slice after slice; y and z
// the clusters of a slice. So what has work comes first in the order in which blocks start, and spreads over all
// multiprocessors.
__device__ __forceinline__ int block_slice(const Args& args) {
  return static_cast<int>(blockIdx.x) >> args.max_team_bits;
}
__device__ __forceinline__ uint32_t block_of_slice(const Args& args) {
  const uint32_t cluster = blockIdx.z * gridDim.y + blockIdx.y;
  return (cluster << args.max_team_bits) + (blockIdx.x & ((1u << args.max_team_bits) - 1));
}

// log2 of the blocks that share a tile, where there are so many tiles: as many as the grid has blocks for. The host
// knows only how many tiles there may be.
__device__ __forceinline__ int choose_team(const Args& args, uint32_t tiles) {
  int bits = args.team_bits;
#pragma unroll
  for (int more = 1; more <= kMaxTeamBits; ++more) {
    if (more <= args.max_team_bits && tiles <= args.slice_blocks >> more) bits = max(bits, more);
  }
  return bits;
}

// A slice of an adapter, whether it has anything to do, and whether nothing is in the way of the plain way (see
// add_lora_plain.cuh; offsets within A and B fit into 32 bits then).
struct FoundSlice {
  Slice slice;
  bool used, plain;
};
template <class T>
__device__ __forceinline__ FoundSlice make_slice(const Args& args, int number, int64_t a, int64_t b, int rank,
                                                 float scale) {
  FoundSlice r = {};
  Slice& slice = r.slice;
  slice.rank = rank;
  slice.scale = scale;
  slice.begin = args.slice_begin[number];
  slice.width = args.slice_begin[number + 1] - slice.begin;
  slice.b_stride = args.b_row_stride >= 0 ? args.b_row_stride : rank;
  r.used = a != 0 && b != 0 && rank > 0 && rank <= args.max_rank && rank <= slice.b_stride && slice.width > 0;
  slice.a = reinterpret_cast<const T*>(a) + (rank * args.a_of_rank + args.a_offset);
  slice.b = reinterpret_cast<const T*>(b) + (slice.b_stride * slice.width * args.b_of_size + args.b_offset);
  r.plain = ((reinterpret_cast<uintptr_t>(slice.a) | reinterpret_cast<uintptr_t>(slice.b)) % 16 == 0) &&
            slice.b_stride % 8 == 0 && rank % 8 == 0 && rank <= kPlainRank && args.h_in < 1 << 24 &&
            slice.b_stride < 1 << 16 &&
            static_cast<int>(slice.b_stride) * int64_t{slice.width + 4096} < int64_t{1} << 29;
  return r;
}

// By one lane.
__device__ __forceinline__ void publish_team(const Args& args, uint32_t tiles, int team_bits, Work<kTileRows>* work) {
  work->team_bits = team_bits;
  work->many = tiles > args.few_blocks >> team_bits;
}
__device__ __forceinline__ void publish_slice(const FoundSlice& found, Work<kTileRows>* work) {
  work->slices[0] = found.slice;
  work->plain = found.plain;
  work->num_slices = found.used;
}
template <class T>
__device__ __forceinline__ void find_slice(const Args& args, int number, int adapter, Work<kTileRows>* work) {
  const int64_t at = number * args.num_adapters + adapter;
  const FoundSlice found =
      make_slice<T>(args, number, args.a_ptr[at], args.b_ptr[at], args.ranks[number * args.rank_stride + adapter],
                    args.scales[number * args.scale_stride + adapter]);
  if (threadIdx.x % 32 == 0) publish_slice(found, work);
}

// What a lane knows of the tile's rows: the one at position `lane`, or -1. Stored by publish_rows().
__device__ __forceinline__ int load_row(const Args& args, int position, int end) {
  const int lane = threadIdx.x % 32;
  return lane < kTileRows && lane < end - position ? args.order[position + lane] : -1;
}

__device__ __forceinline__ void publish_rows(const Args& args, int row, Work<kTileRows>* work) {
  const int lane = threadIdx.x % 32;
  const bool valid = static_cast<unsigned>(row) < static_cast<unsigned>(args.rows_32);
  const uint32_t votes = __ballot_sync(0xffffffffu, valid);
  if (valid) work->rows[__popc(votes & ((1u << lane) - 1))] = row;
  if (lane == 0) work->count = __popc(votes);
}

// Up to 32 * kEach segments, by one warp. Comes back with load_row().
template <class T, int kEach>
__device__ __forceinline__ int find_tile_in(const Args& args, int number, Work<kTileRows>* work) {
  const int lane = threadIdx.x % 32;
  Segment segments[kEach];
  FoundSlice found[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) segments[i] = load_segment<kTileRows>(args, 32 * i + lane, args.max_segments);
  static_assert(kEach <= 2);  // more take too many registers
  const int64_t* const a_ptr = args.a_ptr + number * args.num_adapters;
  const int64_t* const b_ptr = args.b_ptr + number * args.num_adapters;
  const int32_t* const rank_of = args.ranks + number * args.rank_stride;
  const float* const scale_of = args.scales + number * args.scale_stride;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool there = 32 * i + lane < args.num_adapters_32;
    // Each lane does what there is to do for its adapter, while the segments are looked at: that makes the chain of
    // instructions shorter which all else waits for.
    found[i] = make_slice<T>(args, number, there ? a_ptr[32 * i + lane] : 0, there ? b_ptr[32 * i + lane] : 0,
                             there ? rank_of[32 * i + lane] : 0, there ? scale_of[32 * i + lane] : 0);
  }
  uint32_t before[kEach], total = 0;
  bool single = true;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    cut_segment<kTileRows>(args, &segments[i]);
    single = single && segments[i].tiles <= 1;
  }
  if (__all_sync(0xffffffffu, single)) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t votes = __ballot_sync(0xffffffffu, segments[i].tiles != 0);
      before[i] = total + __popc(votes & ((1u << lane) - 1));
      total += __popc(votes);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t sum = inclusive_sum(segments[i].tiles, lane);
      before[i] = total + sum - segments[i].tiles;
      total += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  const int team_bits = choose_team(args, total);
  const uint32_t tile = block_of_slice(args) >> team_bits;
  if (lane == 0) publish_team(args, total, team_bits, work);
  // The lane and window that has the tile; there is one at most.
  uint32_t owners = 0;
  int position = 0, end = 0, adapter = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool owns = owns_tile(tile, before[i], segments[i].tiles);
    owners |= __ballot_sync(0xffffffffu, owns);
    if (owns) {
      position = segments[i].start + static_cast<int>(tile - before[i]) * kTileRows;
      end = segments[i].end;
      adapter = segments[i].adapter;
    }
  }
  if (owners == 0) {
    if (lane == 0) work->num_slices = 0;
    return -1;
  }
  const int owner = __ffs(owners) - 1;
  position = __shfl_sync(0xffffffffu, position, owner);
  end = __shfl_sync(0xffffffffu, end, owner);
  adapter = __shfl_sync(0xffffffffu, adapter, owner);
  const int row = load_row(args, position, end);
  if (adapter < 32 * kEach) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (adapter == 32 * i + lane) publish_slice(found[i], work);
    }
  } else {
    find_slice<T>(args, number, adapter, work);
  }
  return row;
}

// What a lane of a warp that has not found the tile has instead of a row.
inline constexpr int kNotFound = INT_MIN;

// All tiles; those of the shares of the warps before `warp` are added to *before.
template <int kWarps>
__device__ __forceinline__ uint32_t add_shares(const TileScratch<kWarps>& scratch, int warp, uint32_t* before) {
  uint32_t total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) *before += scratch.share_tiles[i];
    total += scratch.share_tiles[i];
  }
  return total;
}

// The same for any number of segments, by the whole block. A function of its own: what it needs takes no registers of
// the common way.
template <class T, int kWarps>
__device__ __noinline__ int find_tile_among_many(const Args& args, int number, TileScratch<kWarps>* scratch,
                                                 Work<kTileRows>* work) {
  constexpr int kEach = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Each warp counts the tiles of a share of the segments; the one whose share has the tile goes over it again.
  const int share = ((args.max_segments + kWarps - 1) / kWarps + 31) & ~31;
  const int share_begin = static_cast<int>(min(int64_t{warp} * share, int64_t{args.max_segments}));
  const int share_end = min(share_begin + share, args.max_segments);
  uint32_t tiles = 0;
  for (int i = share_begin; i < share_end; i += 32 * kEach) {
    Segment segments[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) segments[j] = load_segment<kTileRows>(args, i + 32 * j + lane, share_end);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      cut_segment<kTileRows>(args, &segments[j]);
      tiles += segments[j].tiles;
    }
  }
  tiles = __shfl_sync(0xffffffffu, inclusive_sum(tiles, lane), 31);
  if (lane == 0) scratch->share_tiles[warp] = tiles;
  if (threadIdx.x == 0) work->num_slices = 0;
  __syncthreads();
  uint32_t before = 0;
  const uint32_t total = add_shares(*scratch, warp, &before);
  const int team_bits = choose_team(args, total);
  const uint32_t tile = block_of_slice(args) >> team_bits;
  if (threadIdx.x == 0) publish_team(args, total, team_bits, work);
  if (owns_tile(tile, before, tiles)) {
    for (int i = share_begin; i < share_end; i += 32) {
      Segment segment = load_segment<kTileRows>(args, i + lane, share_end);
      cut_segment<kTileRows>(args, &segment);
      const uint32_t sum = inclusive_sum(segment.tiles, lane);
      const uint32_t segment_before = before + sum - segment.tiles;
      const uint32_t owners = __ballot_sync(0xffffffffu, owns_tile(tile, segment_before, segment.tiles));
      if (owners != 0) {
        const int owner = __ffs(owners) - 1;
        const int position =
            __shfl_sync(0xffffffffu, segment.start + static_cast<int>(tile - segment_before) * kTileRows, owner);
        const int end = __shfl_sync(0xffffffffu, segment.end, owner);
        const int row = load_row(args, position, end);
        find_slice<T>(args, number, __shfl_sync(0xffffffffu, segment.adapter, owner), work);
        return row;
      }
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  return kNotFound;
}

// Up to kFindWindow segments, one a thread, by the whole block. What the adapter of the same number has is asked for
// together with the segment.
template <class T, int kWarps>
__device__ __noinline__ int find_tile_by_block(const Args& args, int number, TileScratch<kWarps>* scratch,
                                               Work<kTileRows>* work) {
  static_assert(32 * kWarps >= kFindWindow);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Segment segment = load_segment<kTileRows>(args, thread, args.max_segments);
  const bool there = thread < args.num_adapters_32;
  const int64_t at = number * args.num_adapters + thread;
  const FoundSlice found = make_slice<T>(args, number, there ? args.a_ptr[at] : 0, there ? args.b_ptr[at] : 0,
                                         there ? args.ranks[number * args.rank_stride + thread] : 0,
                                         there ? args.scales[number * args.scale_stride + thread] : 0);
  cut_segment<kTileRows>(args, &segment);
  const uint32_t sum = inclusive_sum(segment.tiles, lane);
  if (lane == 31) scratch->share_tiles[warp] = sum;
  if (thread == 0) {
    scratch->tiles = UINT_MAX;  // here: the adapter
    work->num_slices = 0;
  }
  __syncthreads();
  uint32_t before = sum - segment.tiles;
  const uint32_t total = add_shares(*scratch, warp, &before);
  const int team_bits = choose_team(args, total);
  const uint32_t tile = block_of_slice(args) >> team_bits;
  if (thread == 0) publish_team(args, total, team_bits, work);
  if (tile >= total) return kNotFound;
  const uint32_t owners = __ballot_sync(0xffffffffu, owns_tile(tile, before, segment.tiles));
  int row = kNotFound;
  if (owners != 0) {
    const int owner = __ffs(owners) - 1;
    const int position = __shfl_sync(0xffffffffu, segment.start + static_cast<int>(tile - before) * kTileRows, owner);
    const int end = __shfl_sync(0xffffffffu, segment.end, owner);
    row = load_row(args, position, end);
    const int adapter = __shfl_sync(0xffffffffu, segment.adapter, owner);
    if (adapter >= 32 * kWarps) find_slice<T>(args, number, adapter, work);
    if (lane == 0) scratch->tiles = adapter;
  }
  __syncthreads();
  if (scratch->tiles == static_cast<uint32_t>(thread)) publish_slice(found, work);
  return row;
}

// Finds the block's tile and what there is to do for slice `number`. Called by the whole block, before a barrier of it.
// The team and the slice are in `work` then (num_slices 0: nothing to do); one warp comes back with rows for
// publish_rows(), the others with kNotFound. Up to 32 * kEach segments are looked at in line: code that lies elsewhere
// has to be fetched first.
template <class T, int kEach, int kWarps>
__device__ __forceinline__ int find_tile(const Args& args, int number, TileScratch<kWarps>* scratch,
                                         Work<kTileRows>* work) {
  if (args.max_segments <= 32) return threadIdx.x < 32 ? find_tile_in<T, 1>(args, number, work) : kNotFound;
  if constexpr (kEach > 1) {
    if (args.max_segments <= 32 * kEach) {
      return threadIdx.x < 32 ? find_tile_in<T, kEach>(args, number, work) : kNotFound;
    }
  }
  if (args.max_segments > kFindWindow) return find_tile_among_many<T>(args, number, scratch, work);
  return find_tile_by_block<T>(args, number, scratch, work);
}

}  // namespace punica::cuda::fused_lora
