// What the host side and the kernels of add_lora share: arguments, which rows a block serves, the parts of an adapter,
// the pair of 16-bit numbers that stands for one of float32.
//
// A tile is up to kTileRows rows of one segment. Tiles are numbered through the segments in order; a block finds its
// own on the device, so that the host needs to know nothing of the batch. Whatever the tables hold, rows, positions and
// slices that come out of here lie within their tensors.
#pragma once

#include <cstdint>

#include "punica/add_lora.h"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/launch.h"
#include "src/cuda/common/mma.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kTileRows = 8;
inline constexpr int kMaxTeamBits = 3;  // see Args

struct Args {
  void* y;
  const void* x;
  const int64_t* a_ptr;
  const int64_t* b_ptr;
  const int32_t* ranks;
  const float* scales;
  const int32_t* order;
  const int32_t* segment_adapter;
  const int32_t* segment_start;
  int64_t y_stride, x_stride;  // elements
  int64_t rank_stride, scale_stride, num_adapters;
  int64_t rows;
  int64_t layer_idx, a_layer_stride, b_layer_stride, b_row_stride;  // strides: -1 where they follow from the rank
  int capacity, max_segments;
  // The same as above, and in the plain way (add_lora_plain.cuh) alone, where they are small enough for that.
  int x_row_bytes, y_row_bytes, rows_32, num_adapters_32, width;
  int team_bits, max_team_bits;  // log2 of the blocks that share a tile in add_lora_ring.cuh; at most: of a cluster
  int h_in, max_rank, num_slices;
  int leaf_pieces;  // pieces of the first leaf of K, the longest one: see add_lora_ring.cuh
  // Elements before the layer: of A for each rank and in any case, of B for each of the slice's width x row stride, and
  // in any case.
  int64_t a_of_rank, a_offset, b_of_size, b_offset;
  int slice_begin[kMaxLoraSlices + 1];
  bool early_reads;
  bool x_vectors, y_vectors;  // rows start at multiples of 16 bytes
  uint32_t slice_blocks;      // the grid's blocks for each slice in add_lora_ring.cuh
  uint32_t few_blocks;        // of a slice, with which each block has a multiprocessor to itself
};

// Enough tiles of n rows for segments that do not overlap: one of m rows has (m + n - 1) / n of them, and at most m.
inline int64_t max_tiles(const Args& args, int tile_rows) {
  const int64_t tiles = (args.rows + int64_t{tile_rows - 1} * args.max_segments) / tile_rows;
  return tiles < args.rows ? tiles : args.rows;
}

// The kernels. float16 and bfloat16: in general; for many rows of an adapter, where everything is aligned (the same
// bits). float32.
Status launch_ring_float16(const Launcher& launcher, const Args& args);
Status launch_ring_bfloat16(const Launcher& launcher, const Args& args);
bool is_tiles(const Launcher& launcher, const Args& args);
Status launch_tiles(const Launcher& launcher, DType dtype, const Args& args);
Status launch_float32(const Launcher& launcher, const Args& args);

// ---- The rows of a block -------------------------------------------------------------------------------------------

inline constexpr int kPlainRank = 64;

// A slice of an adapter that has something to do. Addresses are those of the layer.
struct Slice {
  const void* a;     // [rank, h_in]
  const void* b;     // [width, rank], rows b_stride apart
  int64_t b_stride;  // elements
  int rank;
  float scale;
  int begin, width;  // columns of y
};

template <int kRows>
struct Work {
  int count;  // rows; 0: nothing to do
  int num_slices;
  int team_bits;  // log2 of the blocks that share the tile, in add_lora_ring.cuh
  bool many;      // in add_lora_ring.cuh: more blocks have work than there are multiprocessors
  bool plain;     // all weights are aligned to 16 bytes, rows of B too, and no rank is more than kPlainRank
  int rows[kRows];
  Slice slices[kMaxLoraSlices];
};

struct Segment {
  int start, end, adapter;
  uint32_t tiles;
};

template <int kRows>
__device__ __forceinline__ Segment load_segment(const Args& args, int i, int end) {
  Segment s = {0, 0, -1, 0};
  if (i < end) {
    s.start = args.segment_start[i];
    s.end = args.segment_start[i + 1];
    s.adapter = args.segment_adapter[i];
  }
  return s;
}

template <int kRows>
__device__ __forceinline__ void cut_segment(const Args& args, Segment* s) {
  s->start = max(s->start, 0);
  s->end = min(s->end, args.capacity);
  const bool used =
      static_cast<unsigned>(s->adapter) < static_cast<unsigned>(args.num_adapters_32) && s->end > s->start;
  s->tiles = used ? (static_cast<uint32_t>(s->end - s->start) + kRows - 1) / kRows : 0u;
}

__device__ __forceinline__ uint32_t inclusive_sum(uint32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// What tables have of the adapter and the rows of a tile, asked for when the tile is known.
struct Tables {
  // By the whole of a warp; for the slice of the lane, if there is one.
  __device__ __forceinline__ void get_adapter(const Args& args, int adapter, int64_t* a, int64_t* b, int* rank,
                                              float* scale) const {
    const int lane = threadIdx.x % 32;
    if (lane >= args.num_slices) return;
    *a = args.a_ptr[lane * args.num_adapters + adapter];
    *b = args.b_ptr[lane * args.num_adapters + adapter];
    *rank = args.ranks[lane * args.rank_stride + adapter];
    *scale = args.scales[lane * args.scale_stride + adapter];
  }
  // The lane's of window `i`, of 32, behind `position`.
  __device__ __forceinline__ int row(const Args& args, int position, int i) const {
    return args.order[position + 32 * i + threadIdx.x % 32];
  }
};

// Rows and slices of `adapter` at positions [position, end), at most kRows. By the whole of one warp.
template <class T, int kRows, class TablesOf = Tables>
__device__ __forceinline__ void load_work(const Args& args, int position, int end, int adapter, Work<kRows>* work,
                                          const TablesOf& tables = {}) {
  static_assert(kMaxLoraSlices <= 32);
  const int lane = threadIdx.x % 32;
  const int n = end - position < kRows ? end - position : kRows;
  Slice slice = {};
  int64_t a = 0, b = 0;
  tables.get_adapter(args, adapter, &a, &b, &slice.rank, &slice.scale);
  if (lane < args.num_slices) {
    slice.begin = args.slice_begin[lane];
    slice.width = args.slice_begin[lane + 1] - slice.begin;
  }
  int count = 0;
#pragma unroll
  for (int first = 0; first < kRows; first += 32) {
    const int row = first + lane < n ? tables.row(args, position, first / 32) : -1;
    const bool valid = row >= 0 && row < args.rows;
    const uint32_t votes = __ballot_sync(0xffffffffu, valid);
    if (valid) work->rows[count + __popc(votes & ((1u << lane) - 1))] = row;
    count += __popc(votes);
  }
  slice.b_stride = args.b_row_stride >= 0 ? args.b_row_stride : slice.rank;
  const bool used = a != 0 && b != 0 && slice.rank > 0 && slice.rank <= args.max_rank && slice.rank <= slice.b_stride &&
                    slice.width > 0;
  const uint32_t votes = __ballot_sync(0xffffffffu, used);
  if (used) {
    const int64_t a_layer = args.a_layer_stride >= 0 ? args.a_layer_stride : int64_t{slice.rank} * args.h_in;
    const int64_t b_layer = args.b_layer_stride >= 0 ? args.b_layer_stride : slice.b_stride * slice.width;
    slice.a = reinterpret_cast<const T*>(a) + args.layer_idx * a_layer;
    slice.b = reinterpret_cast<const T*>(b) + args.layer_idx * b_layer;
    work->slices[__popc(votes & ((1u << lane) - 1))] = slice;
  }
  const bool plain = (reinterpret_cast<uintptr_t>(slice.a) | reinterpret_cast<uintptr_t>(slice.b)) % 16 == 0 &&
                     slice.b_stride % (16 / sizeof(T)) == 0 && slice.rank <= kPlainRank;
  const bool all_plain = __all_sync(0xffffffffu, plain || !used);
  if (lane == 0) {
    work->plain = all_plain;
    work->num_slices = __popc(votes);
    work->count = votes == 0 ? 0 : count;
  }
}

// Up to here one warp looks at all segments at once.
inline constexpr int kWindow = 128;

template <int kWarps>
struct TileScratch {
  uint32_t share_tiles[kWarps];
  uint32_t tiles;
};

__device__ __forceinline__ bool owns_tile(uint32_t tile, uint32_t before, uint32_t tiles) {
  return tile - before < tiles;
}

// The same for up to 32 * kEach segments, by one warp.
template <class T, int kRows, int kEach, class Choose, class TablesOf = Tables>
__device__ __forceinline__ void find_work_in(const Args& args, uint32_t* all_tiles, Work<kRows>* work, Choose choose,
                                             const TablesOf& tables = {}) {
  const int lane = threadIdx.x % 32;
  Segment segments[kEach];
  uint32_t before[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) segments[i] = load_segment<kRows>(args, 32 * i + lane, args.max_segments);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    cut_segment<kRows>(args, &segments[i]);
    before[i] = inclusive_sum(segments[i].tiles, lane);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t of_window = __shfl_sync(0xffffffffu, before[i], 31);
    before[i] += total - segments[i].tiles;
    total += of_window;
  }
  const uint32_t tile = choose(total);
  // The lane and window that has the tile; there is one at most.
  uint32_t owners = 0;
  int position = 0, end = 0, adapter = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool owns = owns_tile(tile, before[i], segments[i].tiles);
    owners |= __ballot_sync(0xffffffffu, owns);
    if (owns) {
      position = segments[i].start + static_cast<int>(tile - before[i]) * kRows;
      end = segments[i].end;
      adapter = segments[i].adapter;
    }
  }
  if (owners != 0) {
    const int owner = __ffs(owners) - 1;
    load_work<T>(args, __shfl_sync(0xffffffffu, position, owner), __shfl_sync(0xffffffffu, end, owner),
                 __shfl_sync(0xffffffffu, adapter, owner), work, tables);
  }
  if (lane == 0) {
    *all_tiles = total;
    if (owners == 0) work->count = 0;
  }
}

// The same for any number of segments, by the whole block.
template <class T, int kRows, int kWarps, class Choose>
__device__ __noinline__ void find_work_among_many(const Args& args, TileScratch<kWarps>* scratch, Work<kRows>* work,
                                                  Choose choose) {
  constexpr int kEach = kWindow / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Each warp counts the tiles of a share of the segments; the one whose share has the tile goes over it again.
  const int share = ((args.max_segments + kWarps - 1) / kWarps + 31) & ~31;
  const int share_begin = static_cast<int>(min(int64_t{warp} * share, int64_t{args.max_segments}));
  const int share_end = min(share_begin + share, args.max_segments);
  uint32_t tiles = 0;
  for (int i = share_begin; i < share_end; i += kWindow) {
    Segment segments[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) segments[j] = load_segment<kRows>(args, i + 32 * j + lane, share_end);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      cut_segment<kRows>(args, &segments[j]);
      tiles += segments[j].tiles;
    }
  }
  tiles = __shfl_sync(0xffffffffu, inclusive_sum(tiles, lane), 31);
  if (lane == 0) scratch->share_tiles[warp] = tiles;
  if (threadIdx.x == 0) work->count = 0;
  __syncthreads();
  uint32_t before = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += scratch->share_tiles[i];
    total += scratch->share_tiles[i];
  }
  if (threadIdx.x == 0) scratch->tiles = total;
  const uint32_t tile = choose(total);
  if (owns_tile(tile, before, tiles)) {
    for (int i = share_begin; i < share_end; i += 32) {
      Segment segment = load_segment<kRows>(args, i + lane, share_end);
      cut_segment<kRows>(args, &segment);
      const uint32_t sum = inclusive_sum(segment.tiles, lane);
      const uint32_t segment_before = before + sum - segment.tiles;
      const uint32_t owners = __ballot_sync(0xffffffffu, owns_tile(tile, segment_before, segment.tiles));
      if (owners != 0) {
        const int owner = __ffs(owners) - 1;
        const int position =
            __shfl_sync(0xffffffffu, segment.start + static_cast<int>(tile - segment_before) * kRows, owner);
        const int end = __shfl_sync(0xffffffffu, segment.end, owner);
        load_work<T>(args, position, end, __shfl_sync(0xffffffffu, segment.adapter, owner), work);
        break;
      }
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  __syncthreads();
}

// Finds tile choose(tiles), given the number of all tiles, and what there is to do. Called by the whole block; on
// return the block sees `work`.
template <class T, int kRows, int kWarps, class Choose>
__device__ __forceinline__ void find_work(const Args& args, TileScratch<kWarps>* scratch, Work<kRows>* work,
                                          Choose choose) {
  if (args.max_segments > kWindow) {
    find_work_among_many<T>(args, scratch, work, choose);
    return;
  }
  if (threadIdx.x < 32) {
    if (args.max_segments <= 32) {
      find_work_in<T, kRows, 1>(args, &scratch->tiles, work, choose);
    } else {
      find_work_in<T, kRows, kWindow / 32>(args, &scratch->tiles, work, choose);
    }
  }
  __syncthreads();
}

// ---- v as a pair of 16-bit numbers ---------------------------------------------------------------------------------

// high + low is v to 2^-16 of it (bfloat16), or to 2^-22 (float16, for |v| from 2^-14 to 65504: see row_exponent).
// Where v is not finite low is zero: infinity minus infinity would make a NaN of it.
template <class T>
__device__ __forceinline__ void split(float v, uint16_t* high, uint16_t* low) {
  const T h = from_float<T>(v);
  const float rest = v - to_float(h);
  const T l = from_float<T>(isfinite(rest) ? rest : 0.0f);
  *high = *reinterpret_cast<const uint16_t*>(&h);
  *low = *reinterpret_cast<const uint16_t*>(&l);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // What would round to infinity is cut instead.
    const uint32_t bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) >= 0x7f7f8000u) {
      *high = static_cast<uint16_t>(bits >> 16);
      const float cut_rest = v - __uint_as_float(bits & 0xffff0000u);
      const T cut_low = from_float<T>(isfinite(cut_rest) ? cut_rest : 0.0f);
      *low = *reinterpret_cast<const uint16_t*>(&cut_low);
    }
  }
}

// float16 has not the range of v. So a row of v is multiplied by the power of two that brings its largest element into
// [2^14, 2^15), and the sums by the opposite one. What is smaller than the largest one by 2^28 or more loses bits then,
// those below 2^-39 of the largest one. The biased exponent of the largest element, within the range where both powers
// are normal numbers; where that is not finite: the power is 1.
__device__ __forceinline__ int row_exponent(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 0xff);
  return exponent == 255 ? 141 : max(exponent, 15);
}
__device__ __forceinline__ float down_scale(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
}
__device__ __forceinline__ float up_scale(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
}

}  // namespace punica::cuda::fused_lora
