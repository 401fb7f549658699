// What the kernels of sgmv are made of: the tile of a block, tiles of 16-bit elements in shared memory, fragments.
#pragma once

#include <cstdint>

#include "src/cuda/common/device.cuh"
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv.h"

namespace punica::cuda {

// A block's rows and their weights.
template <class T>
struct SgmvTile {
  int64_t row;     // the first row in x and y
  int rows;        // 1..64, or what else a tile has
  const T* w;      // the layer's weights of the segment
  uint32_t tiles;  // of all segments; more than there are if not known
};

template <int kThreads>
struct SgmvScratch {
  uint32_t warp_tiles[kThreads / 32];
  int64_t segment, row, end;
  int found;
};

struct SgmvSegment {
  int64_t start;
  int64_t end;
  uint32_t tiles;
};

// A segment cut to the rows there are; one that is empty or backward has no tiles of kRows rows.
template <int kRows>
__device__ __forceinline__ SgmvSegment cut_segment(const SgmvArgs& args, int32_t start, int32_t end) {
  SgmvSegment segment = {max(int64_t{start}, int64_t{0}), min(int64_t{end}, args.rows), 0};
  if (segment.end > segment.start) {
    segment.tiles = static_cast<uint32_t>((segment.end - segment.start + kRows - 1) / kRows);
  }
  return segment;
}

// kEach adjacent entries of a table from `first`, a multiple of kEach, on; zeros behind its end.
template <int kEach>
__device__ __forceinline__ void load_entries(const int32_t* table, int64_t first, int64_t count,
                                             int32_t (&entries)[kEach]) {
  if (kEach % 4 == 0 && first + kEach <= count && reinterpret_cast<uintptr_t>(table) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(table + first + i);
      entries[i] = four.x, entries[i + 1] = four.y, entries[i + 2] = four.z, entries[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) entries[i] = first + i < count ? table[first + i] : 0;
  }
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Finds tile number `tile` in the order of the segments; false if there are fewer. The same answer in all threads of
// the block, all of which call it. Whatever the tables hold, the rows found are rows of x and y. meanwhile() is called
// once, when the first part of the tables has been asked for.
template <int kRows = kSgmvRows, int kThreads = kSgmvThreads, class T, class Meanwhile>
__device__ __forceinline__ bool find_tile(const SgmvArgs& args, uint32_t tile, SgmvScratch<kThreads>& scratch,
                                          SgmvTile<T>* found, Meanwhile meanwhile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t row, end;
  int64_t address;
  if (args.num_segments <= 32) {
    // Each warp for itself, without a barrier.
    const bool is_there = lane < args.num_segments;
    const int32_t first = is_there ? args.s_start[lane] : 0, behind = is_there ? args.s_end[lane] : 0;
    address = is_there ? args.w_ptr[lane] : 0;
    meanwhile();
    const SgmvSegment segment = cut_segment<kRows>(args, first, behind);
    const uint32_t sum = warp_inclusive_sum(segment.tiles, lane), before = sum - segment.tiles;
    found->tiles = __shfl_sync(0xffffffffu, sum, 31);
    const unsigned owner = __ballot_sync(0xffffffffu, tile - before < segment.tiles);
    if (owner == 0) return false;
    const int from = __ffs(owner) - 1;
    row = __shfl_sync(0xffffffffu, segment.start + int64_t{tile - before} * kRows, from);
    end = __shfl_sync(0xffffffffu, segment.end, from);
    address = __shfl_sync(0xffffffffu, address, from);
  } else {
    constexpr int kEach = 4;  // adjacent segments of a thread: a round covers 1024 of them with 256 threads
    // The address if all segments before are of one tile, asked for with the tables and not after them.
    const int64_t guess = min(int64_t{tile}, args.num_segments - 1);
    const int64_t guessed = args.w_ptr[guess];
    if (threadIdx.x == 0) scratch.found = 0;
    uint32_t rest = tile;  // tiles from the first one of this round on
    bool done = false, is_first = true;
    for (int64_t base = 0; base < args.num_segments && !done; base += kEach * kThreads) {
      int32_t start[kEach], end[kEach];
      const int64_t first = base + int64_t{threadIdx.x} * kEach;
      load_entries(args.s_start, first, args.num_segments, start);
      load_entries(args.s_end, first, args.num_segments, end);
      if (is_first) meanwhile();
      is_first = false;
      uint32_t tiles = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) tiles += cut_segment<kRows>(args, start[i], end[i]).tiles;
      const uint32_t sum = warp_inclusive_sum(tiles, lane);
      if (lane == 31) scratch.warp_tiles[warp] = sum;
      __syncthreads();
      uint32_t before = sum - tiles, all = 0;
#pragma unroll
      for (int i = 0; i < kThreads / 32; ++i) {
        if (i < warp) before += scratch.warp_tiles[i];
        all += scratch.warp_tiles[i];
      }
      done = rest < all;
      found->tiles = args.num_segments <= kEach * kThreads ? all : 0xffffffffu;
      if (done) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const SgmvSegment segment = cut_segment<kRows>(args, start[i], end[i]);
          if (rest - before < segment.tiles) {
            scratch.segment = first + i;
            scratch.row = segment.start + int64_t{rest - before} * kRows;
            scratch.end = segment.end;
            scratch.found = 1;
          }
          before += segment.tiles;
        }
      }
      rest -= all;
      __syncthreads();  // before warp_tiles is written again, and after the answer is
    }
    // A sum of tiles beyond 32 bits (segments that overlap) can hide the owner.
    if (!done || scratch.found == 0) return false;
    row = scratch.row;
    end = scratch.end;
    address = scratch.segment == guess ? guessed : args.w_ptr[scratch.segment];
  }
  found->row = row;
  found->rows = static_cast<int>(min(end - row, int64_t{kRows}));
  found->w = reinterpret_cast<const T*>(address) + args.w_offset;
  return true;
}

template <int kRows = kSgmvRows, int kThreads = kSgmvThreads, class T>
__device__ __forceinline__ bool find_tile(const SgmvArgs& args, uint32_t tile, SgmvScratch<kThreads>& scratch,
                                          SgmvTile<T>* found) {
  return find_tile<kRows>(args, tile, scratch, found, [] {});
}

// All tiles of up to kSegments segments, for a warp that keeps them.
template <class T, int kRows>
struct WarpTiles {
  static constexpr int kSegments = 32;

  int64_t start, end, address;  // of the lane's segment
  uint32_t before, tiles;       // of segments before it, its own
  uint32_t all;

  __device__ __forceinline__ explicit WarpTiles(const SgmvArgs& args) {
    const int lane = threadIdx.x % 32;
    const bool is_there = lane < args.num_segments;
    const int32_t first = is_there ? args.s_start[lane] : 0, behind = is_there ? args.s_end[lane] : 0;
    address = is_there ? args.w_ptr[lane] : 0;
    const SgmvSegment segment = cut_segment<kRows>(args, first, behind);
    const uint32_t sum = warp_inclusive_sum(segment.tiles, lane);
    start = segment.start, end = segment.end, tiles = segment.tiles, before = sum - tiles;
    all = __shfl_sync(0xffffffffu, sum, 31);
  }

  // Number `tile` of them, less than `all`, for the whole warp.
  __device__ __forceinline__ SgmvTile<T> at(const SgmvArgs& args, uint32_t tile) const {
    const int owner = __ffs(__ballot_sync(0xffffffffu, tile - before < tiles)) - 1;
    const int64_t row = __shfl_sync(0xffffffffu, start + int64_t{tile - before} * kRows, owner);
    const int64_t behind = __shfl_sync(0xffffffffu, end, owner);
    const int64_t w = __shfl_sync(0xffffffffu, address, owner);
    return {row, static_cast<int>(min(behind - row, int64_t{kRows})), reinterpret_cast<const T*>(w) + args.w_offset,
            all};
  }
};

// Asks for the first lines of the tables: enough for 32 segments.
__device__ __forceinline__ void prefetch_tables(const SgmvArgs& args) {
  if (threadIdx.x == 0) prefetch_line(args.s_start);
  if (threadIdx.x == 32) prefetch_line(args.s_end);
  if (threadIdx.x == 64) prefetch_line(args.w_ptr);
}

// Starts the reads of the tile that number `tile` would be if the segments covered all rows in order, as they mostly
// do, while the tables are still on their way: 512 bytes of each of its rows from `column` on, a line a thread. A wrong
// guess costs nothing but a line that another block is going to read.
template <class T>
__device__ __forceinline__ void prefetch_rows(const void* base, int64_t stride, const SgmvArgs& args, int64_t tile,
                                              int64_t column, int64_t columns) {
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  static_assert(kSgmvThreads == 4 * kSgmvRows);
  const int64_t row = tile * kSgmvRows + threadIdx.x / 4;
  column += threadIdx.x % 4 * kLine;
  if (row < args.rows && column < columns) prefetch_line(static_cast<const T*>(base) + row * stride + column);
}

// Copies `bytes` (0..16) bytes, which start at a multiple of 16, and zeros behind them.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Two adjacent elements plus a and b, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t old, float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&old));
    const __half2 result = __floats2half2_rn(values.x + a, values.y + b);
    return *reinterpret_cast<const uint32_t*>(&result);
  } else {
    const __nv_bfloat162 result =
        __floats2bfloat162_rn(__uint_as_float(old << 16) + a, __uint_as_float(old & 0xffff0000u) + b);
    return *reinterpret_cast<const uint32_t*>(&result);
  }
}

// The eight 16-bit elements at an address that is a multiple of 2, of which the first `count` are read; zeros behind.
__device__ __forceinline__ uint4 load_eight(const uint16_t* from, int count) {
  uint4 result = {0, 0, 0, 0};
  if (count == 8) {
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
      result = {__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3)};
    } else {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from + 1);
      const uint32_t first = __ldg(from), a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2);
      const uint32_t last = __ldg(from + 7);
      result = {first | a << 16, __funnelshift_l(a, b, 16), __funnelshift_l(b, c, 16), c >> 16 | last << 16};
    }
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      if (i < count) words[i / 2] |= uint32_t{__ldg(from + i)} << (16 * (i % 2));
    }
    result = {words[0], words[1], words[2], words[3]};
  }
  return result;
}

// The same in words of 4 bytes, but for an element that shares its word with one that is not asked for: behind it the
// tensor may end.
__device__ __forceinline__ uint4 load_eight_words(const uint16_t* from, int count) {
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(from) / 2 % 2);
  const uint32_t* const first = reinterpret_cast<const uint32_t*>(from - odd);
  uint32_t words[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = i * 2 >= odd && i * 2 + 1 - odd < count ? __ldg(first + i) : 0;
  if (odd != 0 && count > 0) words[0] = uint32_t{__ldg(from)} << 16;
  if (const int last = count - 1 + odd; count > 0 && last % 2 == 0) {
    const uint32_t element = __ldg(from + count - 1);
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = i * 2 == last ? element : words[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], odd * 16);
  return {words[0], words[1], words[2], words[3]};
}

// The chunks of a thread in a tile (SharedTile), kRowStep rows apart, `have_rows` rows with `count` elements each. Not
// inlined, so that its registers are not those of the loops that seldom need it.
template <int kEach, int kRowStep, int kThreads = kSgmvThreads>
__device__ __noinline__ void fill_unaligned(uint32_t shared, const uint16_t* from, int64_t stride, int count,
                                            int have_rows) {
  constexpr int kAtOnce = kEach < 4 ? kEach : 4;
  static_assert(kEach % kAtOnce == 0);
#pragma unroll 1
  for (int first = 0; first < kEach; first += kAtOnce) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = load_eight(from, (first + i) * kRowStep < have_rows ? count : 0);
      from += kRowStep * stride;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(values[i].x), "r"(values[i].y),
                   "r"(values[i].z), "r"(values[i].w)
                   : "memory");
      shared += kThreads * 16;
    }
  }
}

// A tile of 16-bit elements in shared memory, row-major, its 16-byte chunks turned within the row so that ldmatrix
// reads eight rows of one column of chunks without bank conflicts. kSpread: the eight rows are 0, 1, 8, 9, 16, 17, 24,
// 25 (of a row that is even) instead of adjacent ones. kThreads: of the block that fills it.
template <int kRows, int kColumns, bool kSpread = false, int kThreads = kSgmvThreads>
struct SharedTile {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kBytes = kRows * kColumns * 2;
  static_assert(kChunks == 2 || kChunks % 8 == 0);

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    int turn;
    if constexpr (kChunks == 2) {
      turn = (kSpread ? row >> 3 : row >> 2) & 1;
    } else {
      turn = kSpread ? (row >> 2 & 6) | (row & 1) : row & 7;
    }
    return static_cast<uint32_t>((row * kChunks + (chunk ^ turn)) * 16);
  }

  // From offset(row, chunk) to offset(row + rows, chunk), for whole turns (8 rows; any even number of them below 8,
  // from an even one, if kSpread), and to offset(row, chunk ^ chunks), which is a xor: what ldmatrix's addresses differ
  // by.
  static __device__ __forceinline__ uint32_t row_step(int rows) { return static_cast<uint32_t>(rows * kChunks * 16); }
  static __device__ __forceinline__ uint32_t chunk_turn(int chunks) { return static_cast<uint32_t>(chunks * 16); }

  // Fills the tile from `rows` rows of `columns` elements, either of which may be more than the tile has or none; zeros
  // elsewhere. Aligned: rows start at multiples of 16 bytes, and the copies are asynchronous, in the thread's open
  // group. Otherwise they are done when the block has passed a barrier.
  template <class T>
  static __device__ __forceinline__ void fill(uint32_t shared, const T* from, int64_t stride, int64_t rows,
                                              int64_t columns, bool aligned) {
    // A thread's chunks are in one column, kRowStep rows apart, which is a whole number of turns.
    constexpr int kRowStep = kThreads / kChunks;
    static_assert(kRowStep % (kSpread ? 32 : 8) == 0);
    constexpr int kEach = (kRows + kRowStep - 1) / kRowStep;
    constexpr bool kAll = kRows % kRowStep == 0;
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int have_rows = static_cast<int>(min(rows, int64_t{kRows})) - row;
    const int count = min(max(static_cast<int>(min(columns, int64_t{kColumns})) - chunk * 8, 0), 8);
    if (!kAll && row >= kRows) return;
    shared += offset(row, chunk);
    from += row * stride + chunk * 8;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        copy_async_16(shared + i * (kThreads * 16), from, i * kRowStep < have_rows ? count * 2 : 0);
        from += kRowStep * stride;
      }
      return;
    }
    fill_unaligned<kEach, kRowStep, kThreads>(shared, reinterpret_cast<const uint16_t*>(from), stride, count,
                                              have_rows);
  }
};

}  // namespace punica::cuda
