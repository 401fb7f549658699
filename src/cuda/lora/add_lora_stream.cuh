// add_lora of float16 and bfloat16 on sm_90 where weights are many and rows of an adapter few: two kernels, shrink and
// expand, each of which streams its weights with one block a multiprocessor. The arithmetic is that of
// add_lora_ring.cuh, term by term.
//
// The weights of all tiles and slices are one list, cut into equal parts whatever the ranks are. So no multiprocessor
// has more to read than another, and each reads on from tile to tile: a ring of units in shared memory for each warp is
// always filled. A block of either kernel takes half of a multiprocessor. The expand starts when the blocks of the
// shrink have asked for the last of A, and asks for its first units of B while the shrink ends: memory never idles.
//
// In between v is in a workspace, as the sums of groups of leaves of K: fragments of 16 ranks and 8 rows. Those of a
// tile are next to each other, group after group; the expand adds them.
#pragma once

#include "src/cuda/lora/add_lora_find.cuh"
#include "src/cuda/lora/add_lora_plain.cuh"

namespace punica::cuda::fused_lora::stream {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kUnits = 6;     // of a warp's ring
inline constexpr int kGroups = 16;   // of leaves
inline constexpr int kRecords = 32;  // tiles that a block knows at a time

struct StreamArgs {
  Args args;
  float4* fragments;   // v
  uint32_t max_items;  // fragments that there is room for
  int experiment;
};

// A tile of a slice.
struct Record {
  const void* weights;
  int64_t stride;  // elements from row to row
  int rank;
  float scale;
  int begin, width;     // columns of y
  uint32_t first_item;  // of the shrink
  int position, end;    // in `order`
  bool fast;            // see is_plain()
  bool fits;            // v has room in the workspace, as it always has where segments do not overlap
  int rows[kTileRows];  // -1: none
};

struct Shared {
  uint32_t first[kRecords], count[kRecords];  // of the records: items, or chunks
  Record records[kRecords];
  uint2 warp_totals[kWarps];
  int num_records;
  float4 sums[2][kWarps][32];
};
inline constexpr size_t kHeadBytes = (sizeof(Shared) + 127) / 128 * 128;
inline constexpr size_t kSharedBytes = kHeadBytes + size_t{kWarps} * kUnits * kUnitBytes;
static_assert(2 * (kSharedBytes + 1024) <= 228 * 1024, "both kernels fit a multiprocessor together");

// An item of the shrink: a group of leaves and 16 ranks of a tile. A chunk of the expand: a unit of B for each warp.
__device__ __forceinline__ uint32_t tile_items(int rank) { return kGroups << rank_tile_bits(rank); }
__device__ __forceinline__ uint32_t tile_chunks(int rank, int width) {
  const int bits = 9 - rank_tile_bits(rank);
  return (static_cast<uint32_t>(width) + (1u << bits) - 1) >> bits;
}

// Part `number` of `parts` of `total` items begins here.
__device__ __forceinline__ uint32_t part_begin(uint32_t total, uint32_t number, uint32_t parts) {
  return static_cast<uint32_t>(uint64_t{total} * number / parts);
}

// Of the expand from L2: what stands in L1 may be older than the kernel before the shrink.
template <bool kExpand, class E>
__device__ __forceinline__ E load_table(const E* from) {
  if constexpr (!kExpand) return *from;
  return __ldcg(from);
}

// What there is to do for a slice of an adapter: items of each of its tiles, none where there is nothing.
struct Entry {
  Slice slice;
  uint32_t items, chunks;
};
inline constexpr int kTableEntries = kWarps * kUnits * kUnitBytes / sizeof(Entry);

template <class T, bool kExpand>
__device__ __forceinline__ Entry load_entry(const Args& args, int number, int adapter) {
  const int64_t at = number * args.num_adapters + adapter;
  Entry e = {};
  const int64_t a = load_table<kExpand>(reinterpret_cast<const long long*>(args.a_ptr + at));
  const int64_t b = load_table<kExpand>(reinterpret_cast<const long long*>(args.b_ptr + at));
  e.slice.rank = load_table<kExpand>(args.ranks + (number * args.rank_stride + adapter));
  e.slice.scale = load_table<kExpand>(args.scales + (number * args.scale_stride + adapter));
  e.slice.begin = args.slice_begin[number];
  e.slice.width = args.slice_begin[number + 1] - e.slice.begin;
  if (finish_slice<T>(args, a, b, &e.slice)) {
    e.items = tile_items(e.slice.rank);
    e.chunks = tile_chunks(e.slice.rank, e.slice.width);
  }
  return e;
}

// What a block has to do, and the tiles that it belongs to.
template <class T, bool kExpand>
struct Finder {
  const StreamArgs& stream;
  Shared& shared;
  Entry* table;         // of all slices and adapters, where the rings are later
  bool has_table;       // it fits, and the rings are not there yet
  int each;             // segments of a thread
  Segment segment;      // the first one
  int rows[kTileRows];  // of its first tile
  bool has_rows;
  uint2 before, own;  // items and chunks, of the threads before this one, of this one
  uint2 total;

  __device__ __forceinline__ int load_row(int position, int end) const {
    return position < end ? load_table<kExpand>(stream.args.order + position) : -1;
  }
  __device__ __forceinline__ Segment load(int j) const {
    const Args& args = stream.args;
    const int i = static_cast<int>(threadIdx.x) * each + j;
    Segment s = {0, 0, -1, 0};
    if (i < args.max_segments) {
      s.start = load_table<kExpand>(args.segment_start + i);
      s.end = load_table<kExpand>(args.segment_start + i + 1);
      s.adapter = load_table<kExpand>(args.segment_adapter + i);
    }
    return s;
  }
  // Calls visit(segment, entry) for all that have something to do of the thread's own segments, in order.
  template <class Visit>
  __device__ __forceinline__ void walk(Visit visit) const {
    const Args& args = stream.args;
#pragma unroll 1
    for (int j = 0; j < each; ++j) {
      Segment s = segment;
      if (j > 0) {
        s = load(j);
        cut_segment<kTileRows>(args, &s);
      }
      if (s.tiles == 0) continue;
#pragma unroll 1
      for (int number = 0; number < args.num_slices; ++number) {
        if (has_table) {
          visit(s, table[number * args.num_adapters_32 + s.adapter]);
        } else {
          visit(s, load_entry<T, kExpand>(args, number, s.adapter));
        }
      }
    }
  }

  // By the whole block. What all adapters have is asked for together with the segments, if there are few adapters.
  __device__ __forceinline__ void count() {
    const Args& args = stream.args;
    each = (args.max_segments + kThreads - 1) / kThreads;
    segment = load(0);
    has_table = args.num_adapters_32 <= kTableEntries / args.num_slices;
    if (has_table) {
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(args.num_slices * args.num_adapters_32); i += kThreads) {
        const uint32_t number = args.num_slices == 1 ? 0 : i / args.num_adapters_32;
        table[i] =
            load_entry<T, kExpand>(args, static_cast<int>(number), static_cast<int>(i - number * args.num_adapters_32));
      }
    }
    cut_segment<kTileRows>(args, &segment);
#pragma unroll
    for (int k = 0; k < kTileRows; ++k) {
      rows[k] = segment.tiles != 0 ? load_row(segment.start + k, segment.end) : -1;
    }
    has_rows = each == 1;
    __syncthreads();
    own = {0, 0};
    walk([&](const Segment& s, const Entry& e) {
      own.x += s.tiles * e.items;
      own.y += s.tiles * e.chunks;
    });
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint2 sum = {inclusive_sum(own.x, lane), inclusive_sum(own.y, lane)};
    if (lane == 31) shared.warp_totals[warp] = sum;
    if (threadIdx.x == 0) shared.num_records = 0;
    __syncthreads();
    before = {sum.x - own.x, sum.y - own.y};
    total = {0, 0};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const uint2 of_warp = shared.warp_totals[i];
      if (i < warp) before.x += of_warp.x, before.y += of_warp.y;
      total.x += of_warp.x, total.y += of_warp.y;
    }
  }

  // Writes the records of [from, to). There may be more than have room.
  __device__ __forceinline__ void publish(uint32_t from, uint32_t to) {
    const uint32_t begin = kExpand ? before.y : before.x, end = begin + (kExpand ? own.y : own.x);
    if (begin >= to || end <= from) return;
    uint2 at = before;
    walk([&](const Segment& s, const Entry& e) {
      const Slice& slice = e.slice;
#pragma unroll 1
      for (uint32_t tile = 0; tile < s.tiles; ++tile, at.x += e.items, at.y += e.chunks) {
        const uint32_t first = kExpand ? at.y : at.x, number = kExpand ? e.chunks : e.items;
        if (number == 0 || first >= to || first + number <= from) continue;
        const int i = atomicAdd(&shared.num_records, 1);
        if (i >= kRecords) continue;
        shared.first[i] = first;
        shared.count[i] = number;
        Record& r = shared.records[i];
        r.weights = kExpand ? slice.b : slice.a;
        r.stride = kExpand ? slice.b_stride : stream.args.h_in;
        r.rank = slice.rank;
        r.scale = slice.scale;
        r.begin = slice.begin;
        r.width = slice.width;
        r.first_item = at.x;
        r.position = s.start + static_cast<int>(tile) * kTileRows;
        r.end = min(s.end, r.position + kTileRows);
        r.fast = is_plain(stream.args, slice);
#pragma unroll
        for (int k = 0; k < kTileRows; ++k) {
          const int row = tile == 0 && has_rows ? rows[k] : load_row(r.position + k, r.end);
          r.rows[k] = static_cast<unsigned>(row) < static_cast<unsigned>(stream.args.rows_32) ? row : -1;
        }
        r.fits = at.x + e.items <= stream.max_items;
      }
    });
  }

  // The records of [from, to), or of a part of it from its beginning on. By the whole block; returns the part's end.
  // The table is gone then.
  __device__ __forceinline__ uint32_t find(uint32_t from, uint32_t to) {
    publish(from, to);
    __syncthreads();
    while (shared.num_records > kRecords) {
      to = from + max((to - from) / 2, 1u);
      __syncthreads();
      if (threadIdx.x == 0) shared.num_records = 0;
      __syncthreads();
      publish(from, to);
      __syncthreads();
    }
    has_table = false;
    return to;
  }
};

// The record that an item belongs to. By a whole warp.
__device__ __forceinline__ int record_of(const Shared& shared, uint32_t item, int lane) {
  const bool here = lane < shared.num_records && item - shared.first[lane] < shared.count[lane];
  return __ffs(__ballot_sync(0xffffffffu, here)) - 1;
}

// ---- Shrink --------------------------------------------------------------------------------------------------------

template <Arch kArch, class T>
struct ShrinkWarp {
  const StreamArgs& stream;
  Shared& shared;
  uint32_t ring;
  int lane;

  // Copies: of unit `unit` of item `item`.
  uint32_t item, end;
  int unit = 0;
  uint32_t copy_at = 0;  // bytes into the ring
  const char* from = nullptr;
  int first_k = 0;  // of the group
  uint32_t next_rows = 0, lower = 0;
  uint32_t has = 0;
  bool fast = true;

  __device__ __forceinline__ void begin_item() {
    const Args& args = stream.args;
    const int i = record_of(shared, item, lane);
    const Record& r = shared.records[i];
    const uint32_t local = item - shared.first[i];
    const int bits = rank_tile_bits(r.rank), q = static_cast<int>(local / kGroups), row = lane >> 3;
    const int rank = bits == 0 ? plain_rank_of<0>(q, row) : plain_rank_of<1>(q, row);
    const int step = bits == 0 ? 8 : 16;  // ranks between rows of A that are four apart in the unit
    first_k = static_cast<int>(local % kGroups) * kPiece + 8 * (lane & 7);
    from = static_cast<const char*>(r.weights) + 2 * (int64_t{rank} * args.h_in);
    next_rows = 2 * step * args.h_in;
    lower = 4 * args.h_in;
    has = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (rank + (j & 1) * step + (j & 2) < r.rank && r.fits) has |= 1u << j;
    }
    fast = r.fast;
  }
  // Asks for the next unit, if there is one.
  __device__ __forceinline__ void copy_next() {
    if (item < end) {
      if (unit == 0) begin_item();
      const int k = first_k + (16 * (unit & 3) + 64 * (unit >> 2)) * kPiece;
      const bool inside = k < stream.args.h_in;
      const uint32_t to = ring + copy_at + 16 * place<3>(lane >> 3, lane & 7);
      const char* const at = from + 2 * k;
      if (fast) [[likely]] {
        copy_16_if(to, at, inside && (has & 1) != 0);
        copy_16_if(to + 512, at + next_rows, inside && (has & 2) != 0);
        copy_16_if(to + 1024, at + lower, inside && (has & 4) != 0);
        copy_16_if(to + 1536, at + (next_rows + lower), inside && (has & 8) != 0);
      } else {
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const char* const row = at + (j & 1) * int64_t{next_rows} + (j >> 1) * int64_t{lower};
          const bool valid = inside && (has >> j & 1) != 0;
          const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(valid ? row : at), valid ? 8 : 0);
          asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + 512 * j), "r"(v.x), "r"(v.y), "r"(v.z),
                       "r"(v.w)
                       : "memory");
        }
      }
      copy_at = copy_at + kUnitBytes == kUnits * kUnitBytes ? 0 : copy_at + kUnitBytes;
      if (++unit == 4 * stream.args.leaf_pieces) {
        unit = 0;
        item += kWarps;
      }
    }
    copy_commit();
  }

  // x: for the four units from unit 4 * x_step of item x_item on.
  uint32_t x_item;
  int x_step = 0;
  const T* x = nullptr;
  int x_k = 0;
  bool has_x = false;

  __device__ __forceinline__ void begin_x() {
    if (x_item >= end) {
      has_x = false;
      return;
    }
    const int i = record_of(shared, x_item, lane), g = lane >> 2;
    const Record& r = shared.records[i];
    const int group = static_cast<int>((x_item - shared.first[i]) % kGroups), row = r.rows[g];
    has_x = row >= 0;
    x_k = group * kPiece + 8 * (lane & 3);
    x = reinterpret_cast<const T*>(static_cast<const char*>(stream.args.x) +
                                   int64_t{has_x ? row : 0} * stream.args.x_row_bytes);
  }
  __device__ __forceinline__ void load_x(bgmv::Words<4> (&to)[2], int i) const {
    const int k = x_k + (16 * i + 64 * x_step) * kPiece;
#pragma unroll
    for (int c = 0; c < 2; ++c) to[c] = bgmv::load_if(has_x && k + 32 * c < stream.args.h_in, x + k + 32 * c);
  }
  __device__ __forceinline__ void advance_x() {
    if (++x_step == stream.args.leaf_pieces) {
      x_step = 0;
      x_item += kWarps;
      begin_x();
    }
  }

  __device__ __forceinline__ void start(uint32_t begin, uint32_t to) {
    item = begin, end = to;
#pragma unroll 1
    for (int i = 0; i < kUnits; ++i) copy_next();
  }
  // When rows are known.
  __device__ __forceinline__ void run(uint32_t begin) {
    x_item = begin;
    begin_x();
    bgmv::Words<4> xs[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_x(xs[i], i);
    const int g = lane >> 2, t = lane & 3;
    uint32_t read_at = ring + 16 * place<3>(g, t);
    const uint32_t ring_end = read_at + kUnits * kUnitBytes;
#pragma unroll 1
    for (uint32_t at = begin; at < end; at += kWarps) {
      float sums[4][4] = {};
#pragma unroll 1
      for (int step = 0; step < stream.args.leaf_pieces; ++step) {
        advance_x();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          copy_wait<kUnits - 1>();
          __syncwarp();
          const uint4 upper0 = load_shared_16(read_at), upper1 = load_shared_16(read_at ^ 64);
          const uint4 lower0 = load_shared_16(read_at + 1024), lower1 = load_shared_16((read_at ^ 64) + 1024);
          const bgmv::Words<4>(&xi)[2] = xs[i];
          mma_m16n8k16<T>(sums[i], {upper0.x, lower0.x, upper0.y, lower0.y}, {xi[0].values[0], xi[0].values[1]});
          mma_m16n8k16<T>(sums[i], {upper0.z, lower0.z, upper0.w, lower0.w}, {xi[0].values[2], xi[0].values[3]});
          mma_m16n8k16<T>(sums[i], {upper1.x, lower1.x, upper1.y, lower1.y}, {xi[1].values[0], xi[1].values[1]});
          mma_m16n8k16<T>(sums[i], {upper1.z, lower1.z, upper1.w, lower1.w}, {xi[1].values[2], xi[1].values[3]});
          load_x(xs[i], i);
          __syncwarp();  // all lanes have read
          copy_next();
          read_at += kUnitBytes;
          if (read_at == ring_end) read_at -= kUnits * kUnitBytes;
        }
      }
      const auto sum = [&](int i) { return float4{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}; };
      const float4 group = ((sum(0) + sum(1)) + sum(2)) + sum(3);
      const int i = record_of(shared, at, lane);
      const Record& r = shared.records[i];
      if (2 * t < r.end - r.position && r.fits) {
        stream.fragments[(r.first_item + (at - shared.first[i])) * 32 + t * 8 + g] = group;
      }
    }
  }
};

template <Arch kArch, class T>
__global__ void __launch_bounds__(kThreads, 2) add_lora_shrink_kernel(const __grid_constant__ StreamArgs stream) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Args& args = stream.args;
    const uint32_t warp = threadIdx.x / 32;
    bool waited = !args.early_reads;
    if (waited) grid_dependency_wait<kArch>();
    // Everything before this kernel has ended: see the expand.
    if (waited) launch_dependents<kArch>();
    Finder<T, false> finder = {stream, shared, reinterpret_cast<Entry*>(memory + kHeadBytes)};
    finder.count();
    uint32_t at = part_begin(finder.total.x, blockIdx.x, gridDim.x);
    const uint32_t end = part_begin(finder.total.x, blockIdx.x + 1, gridDim.x);
#pragma unroll 1
    while (at < end) {
      const uint32_t to = finder.find(at, end);
      ShrinkWarp<kArch, T> work = {stream, shared, shared_address(memory + kHeadBytes) + warp * (kUnits * kUnitBytes),
                                   static_cast<int>(threadIdx.x % 32)};
      // Neighbouring groups at a time: whole runs of A.
      const uint32_t begin = at + warp;
      work.start(begin, to);
      if (!waited) {
        grid_dependency_wait<kArch>();
        waited = true;
        launch_dependents<kArch>();
      }
      work.run(begin);
      at = to;
      if (at < end) {
        __syncthreads();
        if (threadIdx.x == 0) shared.num_records = 0;
        __syncthreads();
      }
    }
    if (!waited) grid_dependency_wait<kArch>();
    copy_wait<0>();
  }
}

// From L2, for the same reason.
template <int kWords>
__device__ __forceinline__ bgmv::Words<kWords> load_y_words(const void* from) {
  bgmv::Words<kWords> r;
  if constexpr (kWords == 4) {
    const uint4 v = __ldcg(static_cast<const uint4*>(from));
    r.values[0] = v.x, r.values[1] = v.y, r.values[2] = v.z, r.values[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = __ldcg(static_cast<const uint2*>(from));
    r.values[0] = v.x, r.values[1] = v.y;
  } else {
    r.values[0] = __ldcg(static_cast<const unsigned*>(from));
  }
  return r;
}

// ---- Expand --------------------------------------------------------------------------------------------------------

template <Arch kArch, class T>
struct ExpandWarp {
  const StreamArgs& stream;
  Shared& shared;
  uint32_t ring;
  int warp, lane;

  // Copies.
  uint32_t chunk, end;
  uint32_t record_end = 0;
  uint32_t copy_at = 0;
  const char* from = nullptr;
  int64_t unit_step = 0;  // bytes
  uint32_t copy_step = 0, to_first = 0, turn = 0;
  int rest = 0, unit_rows = 0, copy_rows = 0, columns = 0;
  bool fast = true;

  __device__ __forceinline__ void begin_record() {
    const int i = record_of(shared, chunk, lane);
    const Record& r = shared.records[i];
    record_end = shared.first[i] + shared.count[i];
    const int bits = rank_tile_bits(r.rank), piece_bits = 1 + bits;
    const int row = lane >> piece_bits, piece = lane & ((1 << piece_bits) - 1);
    const int outputs = 64 >> bits;
    const int first = (static_cast<int>(chunk - shared.first[i]) * kWarps + warp) * outputs + row;
    const int64_t row_bytes = 2 * r.stride;
    from = static_cast<const char*>(r.weights) + (first * row_bytes + 16 * piece);
    unit_rows = outputs * kWarps;
    unit_step = row_bytes * unit_rows;
    copy_rows = 32 >> piece_bits;
    copy_step = static_cast<uint32_t>(row_bytes) << (5 - piece_bits);
    to_first = 16 * (bits == 0 ? place<1>(row, piece) : bits == 1 ? place<2>(row, piece) : place<3>(row, piece));
    // With two pieces a row the swizzle of every other copy is turned too.
    turn = bits == 0 ? 64 : 0;
    columns = r.rank - 8 * piece;
    rest = columns > 0 && r.fits ? r.width - first : 0;
    fast = r.fast;
  }
  __device__ __forceinline__ void copy_next() {
    if (chunk < end) {
      if (chunk >= record_end) begin_record();
      const uint32_t to = ring + copy_at + to_first, turned = to ^ turn;
      if (fast) [[likely]] {
        copy_16_if(to, from, rest > 0);
        copy_16_if(turned + 512, from + copy_step, rest > copy_rows);
        copy_16_if(to + 1024, from + 2 * copy_step, rest > 2 * copy_rows);
        copy_16_if(turned + 1536, from + 3 * copy_step, rest > 3 * copy_rows);
      } else {
        const int64_t step = unit_step / (unit_rows / copy_rows);
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const bool valid = rest > j * copy_rows;
          const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(valid ? from + j * step : from),
                                           valid ? min(columns, 8) : 0);
          asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(((j & 1) != 0 ? turned : to) + 512 * j),
                       "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                       : "memory");
        }
      }
      from += unit_step;
      rest -= unit_rows;
      copy_at = copy_at + kUnitBytes == kUnits * kUnitBytes ? 0 : copy_at + kUnitBytes;
      ++chunk;
    }
    copy_commit();
  }
  __device__ __forceinline__ void start(uint32_t begin, uint32_t to) {
    chunk = begin, end = to, record_end = begin;
#pragma unroll 1
    for (int i = 0; i < kUnits; ++i) copy_next();
  }

  uint32_t read_at = 0;  // bytes into the ring

  // Chunks [at, to) of tile i.
  template <int kTileBits>
  __device__ __forceinline__ void run_tile(int i, uint32_t at, uint32_t to, int turn_of_sums, bool& waited) {
    constexpr int kMTiles = 4 >> kTileBits, kCount = 2 * kMTiles, kOutputs = 64 >> kTileBits;
    constexpr int kUnitRows = kOutputs * kWarps, kTiles = 1 << kTileBits, kShareBits = 3 - kTileBits;
    constexpr int kAheadY = kTileBits == 0 ? 2 : 4;
    const Args& args = stream.args;
    const Record& r = shared.records[i];
    const int g = lane >> 2, t = lane & 3, width = r.width, rank = r.rank;
    int column = (static_cast<int>(at - shared.first[i]) * kWarps + warp) * kOutputs + kCount * g;
    T* y[2];
    bool has_row[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = r.rows[2 * t + e];
      has_row[e] = row >= 0;
      y[e] = reinterpret_cast<T*>(static_cast<char*>(args.y) + int64_t{has_row[e] ? row : 0} * args.y_row_bytes) +
             (r.begin + column);
    }
    bgmv::Words<kMTiles> held[kAheadY][2];
    uint32_t y_chunk = at;
    const auto load_y = [&](bgmv::Words<kMTiles>(&to_y)[2], int ahead) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (has_row[e] && y_chunk < to && column + ahead * kUnitRows < width) {
          to_y[e] = load_y_words<kMTiles>(y[e] + ahead * kUnitRows);
        }
      }
      ++y_chunk;
    };
#pragma unroll
    for (int j = 0; j < kAheadY; ++j) load_y(held[j], j);
    if (!waited) {
      grid_dependency_wait<kArch>();
      waited = true;
    }
    // v: a warp adds up a share of the groups of 16 ranks.
    {
      const int q = warp >> kShareBits, share = warp & ((1 << kShareBits) - 1);
      constexpr int kEach = kGroups >> kShareBits;
      const bool there = 2 * t < r.end - r.position && r.fits;
      const float4* const first = stream.fragments + (r.first_item + q * kGroups + share * kEach) * 32 + t * 8 + g;
      float4 parts[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) parts[j] = there ? __ldcg(first + j * 32) : float4{0, 0, 0, 0};
#pragma unroll
      for (int n = kEach / 2; n > 0; n /= 2) {
#pragma unroll
        for (int j = 0; j < n; ++j) parts[j] = parts[2 * j] + parts[2 * j + 1];
      }
      shared.sums[turn_of_sums][warp][lane] = parts[0];
    }
    __syncthreads();
    PlainOperands<kTiles> operands;
    {
      float4 v[kTiles];
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        float4 parts[1 << kShareBits];
#pragma unroll
        for (int j = 0; j < 1 << kShareBits; ++j) parts[j] = shared.sums[turn_of_sums][(q << kShareBits) + j][lane];
#pragma unroll
        for (int n = (1 << kShareBits) / 2; n > 0; n /= 2) {
#pragma unroll
          for (int j = 0; j < n; ++j) parts[j] = parts[2 * j] + parts[2 * j + 1];
        }
        v[q] = parts[0];
      }
      make_operands<T, kTileBits>(v, rank, r.scale, lane, operands);
    }
    const auto expand_unit = [&](bgmv::Words<kMTiles>(&before)[2]) {
      copy_wait<kUnits - 1>();
      __syncwarp();
      float sums[kMTiles][4] = {};
      multiply_unit<T, kTileBits>(ring + read_at, lane, operands, sums);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (has_row[e] && column < width) add_outputs<T, kMTiles>(y[e], before[e], sums, operands.factors[e], e);
      }
      load_y(before, kAheadY);
      column += kUnitRows;
      y[0] += kUnitRows, y[1] += kUnitRows;
      __syncwarp();  // all lanes have read
      copy_next();
      read_at = read_at + kUnitBytes == kUnits * kUnitBytes ? 0 : read_at + kUnitBytes;
      ++at;
    };
#pragma unroll 1
    while (at < to) {
#pragma unroll
      for (int j = 0; j < kAheadY; ++j) {
        if (at < to) expand_unit(held[j]);
      }
    }
  }

  // By the whole block.
  __device__ __forceinline__ void run(uint32_t begin, bool& waited) {
    int turn_of_sums = 0;
#pragma unroll 1
    for (uint32_t at = begin; at < end;) {
      const int i = record_of(shared, at, lane);
      const uint32_t to = min(end, shared.first[i] + shared.count[i]);
      const int rank = shared.records[i].rank;
      if (rank <= 16) {
        run_tile<0>(i, at, to, turn_of_sums, waited);
      } else if (rank <= 32) {
        run_tile<1>(i, at, to, turn_of_sums, waited);
      } else {
        run_tile<2>(i, at, to, turn_of_sums, waited);
      }
      turn_of_sums ^= 1;
      at = to;
    }
  }
};

// Starts when all blocks of the shrink have seen the kernels before that end. So nothing but v is still to be written,
// and all else may be read before the wait, whether reads are early or not.
template <Arch kArch, class T>
__global__ void __launch_bounds__(kThreads, 2) add_lora_expand_kernel(const __grid_constant__ StreamArgs stream) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    bool waited = false;
    Finder<T, true> finder = {stream, shared, reinterpret_cast<Entry*>(memory + kHeadBytes)};
    finder.count();
    uint32_t at = part_begin(finder.total.y, blockIdx.x, gridDim.x);
    const uint32_t end = part_begin(finder.total.y, blockIdx.x + 1, gridDim.x);
    launch_dependents<kArch>();
#pragma unroll 1
    while (at < end) {
      const uint32_t to = finder.find(at, end);
      const int warp = threadIdx.x / 32;
      ExpandWarp<kArch, T> work = {stream, shared, shared_address(memory + kHeadBytes) + warp * (kUnits * kUnitBytes),
                                   warp, static_cast<int>(threadIdx.x % 32)};
      work.start(at, to);
      work.run(at, waited);
      at = to;
      if (at < end) {
        __syncthreads();
        if (threadIdx.x == 0) shared.num_records = 0;
        __syncthreads();
      }
    }
    if (!waited) grid_dependency_wait<kArch>();
    copy_wait<0>();
  }
}

}  // namespace punica::cuda::fused_lora::stream
