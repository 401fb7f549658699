// add_lora of float16 and bfloat16 on sm_90 for batches of few rows an adapter that are bound by the bytes of the
// weights. The arithmetic is that of add_lora_ring.cuh, term by term.
//
// Clusters of two blocks, one block to a multiprocessor, take the tiles of all slices in order, each cluster as many as
// make an equal part of the bytes. Of a tile a block takes half of the groups of leaves of K, a warp one of them, all
// ranks after each other; and every other chunk of the outputs, of a unit of B for each warp.
//
// Four warps of a block do nothing but copy weights into rings in shared memory, each for two of the eight that
// compute. They run on over the borders of tiles: A of the next tile is on its way while B of this one is multiplied,
// and memory does not wait for the sums to meet.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora_find.cuh"
#include "src/cuda/lora/add_lora_plain.cuh"

namespace punica::cuda::fused_lora::stream {

inline constexpr int kWarps = 8;      // that compute
inline constexpr int kCopyWarps = 4;  // each for two of them
inline constexpr int kThreads = 32 * (kWarps + kCopyWarps);
inline constexpr int kBlocks = 2;                  // of a cluster
inline constexpr int kPairBytes = 2 * kUnitBytes;  // a unit for each of two warps
inline constexpr int kPairs = 12;                  // of a ring
inline constexpr int kRingBytes = kCopyWarps * kPairs * kPairBytes;
inline constexpr int kRecords = 32;  // tiles that a block knows at a time
inline constexpr int kMaxTiles = 4;  // of 16 ranks

// A tile of a slice.
struct Record {
  Slice slice;
  int position, end;    // in `order`
  bool fast;            // see is_plain()
  int rows[kTileRows];  // -1: none
};

struct Shared {
  uint64_t received[2];
  uint64_t full[kCopyWarps][kPairs], empty[kCopyWarps][kPairs];
  uint32_t first[kRecords], count[kRecords];  // of the records: where they are in the sum of all weights
  Record records[kRecords];
  uint32_t warp_totals[kWarps + kCopyWarps];
  int num_records;
  uint32_t begin;
  float4 parts[kMaxTiles][kWarps][32];     // v of each group of the block
  float4 sums[2][kBlocks][kMaxTiles][32];  // of each block, of a tile and the next one
};
inline constexpr size_t kHeadBytes = (sizeof(Shared) + 127) / 128 * 128;
inline constexpr size_t kSharedBytes = kHeadBytes + kRingBytes;
static_assert(kSharedBytes <= 227 * 1024);

__device__ __forceinline__ uint32_t tile_chunks(int rank, int width) {
  const int bits = 9 - rank_tile_bits(rank);
  return (static_cast<uint32_t>(width) + (1u << bits) - 1) >> bits;
}
// Units of a warp.
__device__ __forceinline__ uint32_t tile_weight(const Args& args, int rank, int width) {
  return (args.leaf_pieces * 8 << rank_tile_bits(rank)) + tile_chunks(rank, width);
}

// Those of B of a warp.
__device__ __forceinline__ int own_units_of_b(int rank, int width, int block) {
  return (static_cast<int>(tile_chunks(rank, width)) + kBlocks - 1 - block) / kBlocks;
}

// Part `number` of `parts` of `total` begins here.
__device__ __forceinline__ uint32_t part_begin(uint32_t total, uint32_t number, uint32_t parts) {
  return static_cast<uint32_t>(uint64_t{total} * number / parts);
}

// What there is to do for a slice of an adapter.
struct Entry {
  Slice slice;
  uint32_t weight;  // of each of its tiles; 0: nothing to do
};
inline constexpr int kTableEntries = kRingBytes / sizeof(Entry);

template <class T>
__device__ __forceinline__ Entry load_entry(const Args& args, int number, int adapter) {
  const int64_t at = number * args.num_adapters + adapter;
  Entry e = {};
  const int64_t a = args.a_ptr[at], b = args.b_ptr[at];
  e.slice.rank = args.ranks[number * args.rank_stride + adapter];
  e.slice.scale = args.scales[number * args.scale_stride + adapter];
  e.slice.begin = args.slice_begin[number];
  e.slice.width = args.slice_begin[number + 1] - e.slice.begin;
  if (finish_slice<T>(args, a, b, &e.slice)) e.weight = tile_weight(args, e.slice.rank, e.slice.width);
  return e;
}

// Finds the tiles of a cluster.
template <class T>
struct Finder {
  const Args& args;
  Shared& shared;
  Entry* table;         // of all slices and adapters, where the rings are later
  bool has_table;       // it fits, and the rings are not there yet
  int each;             // segments of a thread
  Segment segment;      // the first one
  int rows[kTileRows];  // of its first tile
  uint32_t before, own, total;

  __device__ __forceinline__ int load_row(int position, int end) const {
    return position < end ? args.order[position] : -1;
  }
  __device__ __forceinline__ Segment load(int j) const {
    return load_segment<kTileRows>(args, static_cast<int>(threadIdx.x) * each + j, args.max_segments);
  }
  // Calls visit(segment, entry, whether it is the first segment) for all of the thread's segments and slices, in order.
  template <class Visit>
  __device__ __forceinline__ void walk(Visit visit) const {
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
          visit(s, table[number * args.num_adapters_32 + s.adapter], j == 0);
        } else {
          visit(s, load_entry<T>(args, number, s.adapter), j == 0);
        }
      }
    }
  }

  // By the whole block. What all adapters have is asked for together with the segments, if there are few adapters.
  __device__ __forceinline__ void count(bool with_table) {
    each = (args.max_segments + kThreads - 1) / kThreads;
    segment = load(0);
    has_table = with_table && args.num_adapters_32 <= kTableEntries / args.num_slices;
    if (!with_table) __syncthreads();  // the records before are read
    if (has_table) {
      const uint32_t entries = args.num_slices * args.num_adapters_32;
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < entries; i += kThreads) {
        const uint32_t number = args.num_slices == 1 ? 0 : i / args.num_adapters_32;
        table[i] = load_entry<T>(args, static_cast<int>(number), static_cast<int>(i - number * args.num_adapters_32));
      }
    }
    cut_segment<kTileRows>(args, &segment);
#pragma unroll
    for (int k = 0; k < kTileRows; ++k) {
      rows[k] = segment.tiles != 0 ? load_row(segment.start + k, segment.end) : -1;
    }
    if (threadIdx.x == 0) {
      shared.num_records = 0;
      shared.begin = UINT32_MAX;
    }
    __syncthreads();
    own = 0;
    walk([&](const Segment& s, const Entry& e, bool) { own += s.tiles * e.weight; });
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t sum = inclusive_sum(own, lane);
    if (lane == 31) shared.warp_totals[warp] = sum;
    __syncthreads();
    before = sum - own;
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps + kCopyWarps; ++i) {
      const uint32_t of_warp = shared.warp_totals[i];
      if (i < warp) before += of_warp;
      total += of_warp;
    }
  }

  // Writes the records of tiles whose middle is in [from, to). There may be more than have room.
  __device__ __forceinline__ void publish(uint32_t from, uint32_t to) {
    if (before >= to || before + own <= from) return;
    uint32_t at = before;
    walk([&](const Segment& s, const Entry& e, bool is_first) {
#pragma unroll 1
      for (uint32_t tile = 0; tile < s.tiles && e.weight != 0; ++tile, at += e.weight) {
        const uint32_t middle = at + e.weight / 2;
        if (middle < from || middle >= to) continue;
        const int i = atomicAdd(&shared.num_records, 1);
        if (i >= kRecords) continue;
        atomicMin(&shared.begin, at);
        shared.first[i] = at;
        shared.count[i] = e.weight;
        Record& r = shared.records[i];
        r.slice = e.slice;
        r.position = s.start + static_cast<int>(tile) * kTileRows;
        r.end = min(s.end, r.position + kTileRows);
        r.fast = is_plain(args, e.slice);
#pragma unroll
        for (int k = 0; k < kTileRows; ++k) {
          const int row = tile == 0 && is_first ? rows[k] : load_row(r.position + k, r.end);
          r.rows[k] = static_cast<unsigned>(row) < static_cast<unsigned>(args.rows_32) ? row : -1;
        }
      }
    });
  }

  // The records of [from, to), or of a part of it from its beginning on. By the whole block; returns the part's end.
  __device__ __forceinline__ uint32_t find(uint32_t from, uint32_t to) {
    publish(from, to);
    __syncthreads();
    while (shared.num_records > kRecords) {
      to = from + max((to - from) / 2, 1u);
      reset();
      publish(from, to);
      __syncthreads();
    }
    return to;
  }
  __device__ __forceinline__ void reset() {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.num_records = 0;
      shared.begin = UINT32_MAX;
    }
    __syncthreads();
  }
};

// The record at a place, or -1. By a whole warp.
__device__ __forceinline__ int record_at(const Shared& shared, uint32_t at, int lane) {
  const bool here = lane < shared.num_records && at == shared.first[lane];
  return __ffs(__ballot_sync(0xffffffffu, here)) - 1;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The copies for two warps, unit after unit: those of A, a tile of ranks after the other, then those of B; tile after
// tile.
template <class T>
struct Copier {
  const Args& args;
  Shared& shared;
  uint32_t ring;
  int team, lane, block;
  int slot = 0;
  uint32_t parity = 1;

  // Where the next pair of units has room.
  __device__ __forceinline__ uint32_t wait_room() const {
    hopper::barrier_wait(shared_address(&shared.empty[team][slot]), parity);
    return ring + slot * kPairBytes;
  }
  __device__ __forceinline__ void advance(bool copies) {
    const uint32_t full = shared_address(&shared.full[team][slot]);
    if (copies) {
      hopper::barrier_arrive_copies(full);
    } else {
      hopper::barrier_arrive(full);
    }
    if (++slot == kPairs) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ static void copy_slowly(uint32_t to, const char* from, int count) {
    const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from), count);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }

  __device__ __forceinline__ void copy_a(const Slice& s, bool fast) {
    const int tiles = 1 << rank_tile_bits(s.rank), row = lane >> 3;
    const int step = tiles == 1 ? 8 : 16;  // ranks between rows that are four apart in the unit
    const int k = (block * kWarps + 2 * team) * kPiece + 8 * (lane & 7), rest = args.h_in - k;
    const uint32_t step1 = 2 * step * args.h_in, step2 = 4 * args.h_in, lane_to = 16 * place<3>(row, lane & 7);
#pragma unroll 1
    for (int q = 0; q < tiles; ++q) {
      const int rank = tiles == 1 ? plain_rank_of<0>(q, row) : plain_rank_of<1>(q, row);
      const char* const from = static_cast<const char*>(s.a) + 2 * (int64_t{rank} * args.h_in + k);
      bool has[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) has[j] = rank + (j & 1) * step + (j & 2) < s.rank;
#pragma unroll 1
      for (int unit = 0; unit < 4 * args.leaf_pieces; ++unit) {
        const int at = (16 * (unit & 3) + 64 * (unit >> 2)) * kPiece;
        const uint32_t to = wait_room() + lane_to;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const bool inside = at + w * kPiece < rest;
          const char* const base = from + 2 * (at + w * kPiece);
          const uint32_t to_unit = to + w * kUnitBytes;
          if (fast) [[likely]] {
            copy_16_if(to_unit, base, inside && has[0]);
            copy_16_if(to_unit + 512, base + step1, inside && has[1]);
            copy_16_if(to_unit + 1024, base + step2, inside && has[2]);
            copy_16_if(to_unit + 1536, base + (step1 + step2), inside && has[3]);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const bool there = inside && has[j];
              copy_slowly(to_unit + 512 * j,
                          there ? base + ((j & 1) * int64_t{step1} + (j >> 1) * int64_t{step2}) : from, there ? 8 : 0);
            }
          }
        }
        advance(fast);
      }
    }
  }
  __device__ __forceinline__ void copy_b(const Slice& s, bool fast) {
    const int bits = rank_tile_bits(s.rank), piece_bits = 1 + bits;
    const int row = lane >> piece_bits, piece = lane & ((1 << piece_bits) - 1), outputs = 64 >> bits;
    const int first = (block * kWarps + 2 * team) * outputs + row;
    const int64_t row_bytes = 2 * s.b_stride;
    const char* from = static_cast<const char*>(s.b) + (first * row_bytes + 16 * piece);
    const int copy_rows = 32 >> piece_bits, columns = min(s.rank - 8 * piece, 8);
    const int64_t copy_step = row_bytes << (5 - piece_bits);
    const uint32_t lane_to = 16 * (bits == 0   ? place<1>(row, piece)
                                   : bits == 1 ? place<2>(row, piece)
                                               : place<3>(row, piece));
    // With two pieces a row the swizzle of every other copy is turned too.
    const uint32_t turn = bits == 0 ? 64 : 0;
    int rest = columns > 0 ? s.width - first : 0;
    const int units = own_units_of_b(s.rank, s.width, block);
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
      const uint32_t to = wait_room() + lane_to;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint32_t to_unit = to + w * kUnitBytes;
        const char* at = from + w * 4 * copy_step;
#pragma unroll
        for (int j = 0; j < 4; ++j, at += copy_step) {
          const uint32_t to_row = ((j & 1) != 0 ? to_unit ^ turn : to_unit) + 512 * j;
          const bool there = rest > (4 * w + j) * copy_rows;
          if (fast) [[likely]] {
            copy_16_if(to_row, at, there);
          } else {
            copy_slowly(to_row, there ? at : from, there ? columns : 0);
          }
        }
      }
      from += copy_step * (4 * kWarps * kBlocks);
      rest -= outputs * kWarps * kBlocks;
      advance(fast);
    }
  }
  // All tiles of the records, from the one at `at` on.
  __device__ __forceinline__ void run(uint32_t at) {
#pragma unroll 1
    for (int i = record_at(shared, at, lane); i >= 0; i = record_at(shared, at, lane)) {
      const Record& r = shared.records[i];
      copy_a(r.slice, r.fast);
      copy_b(r.slice, r.fast);
      at += shared.count[i];
    }
  }
};

// x, four units ahead of the products.
template <class T>
struct Rows {
  const Args& args;
  const Shared& shared;
  int warp, lane, block;

  uint32_t next_tile;
  int left = 0;  // times that the row is read
  int step = 0;  // pieces of a leaf
  const T* x = nullptr;
  bool has = false;

  __device__ __forceinline__ void advance() {
    if (left > 0 && ++step < args.leaf_pieces) return;
    step = 0;
    if (--left > 0) return;
    const int i = record_at(shared, next_tile, lane);
    has = false;
    left = 1;
    if (i < 0) return;
    next_tile += shared.count[i];
    const Record& r = shared.records[i];
    left = 1 << rank_tile_bits(r.slice.rank);
    const int row = r.rows[lane >> 2];
    has = row >= 0;
    x = reinterpret_cast<const T*>(static_cast<const char*>(args.x) + int64_t{has ? row : 0} * args.x_row_bytes) +
        ((block * kWarps + warp) * kPiece + 8 * (lane & 3));
  }
  __device__ __forceinline__ void load(bgmv::Words<4> (&to)[2], int i) const {
    const int k = (16 * i + 64 * step) * kPiece;
    const int rest = args.h_in - ((block * kWarps + warp) * kPiece + 8 * (lane & 3));
#pragma unroll
    for (int c = 0; c < 2; ++c) to[c] = bgmv::load_if(has && k + 32 * c < rest, x + k + 32 * c);
  }
};

template <Arch kArch, class T>
struct Block {
  const Args& args;
  Shared& shared;
  uint32_t ring;
  int warp, lane, block;
  int slot = 0;  // of the ring
  uint32_t parity = 0;
  uint32_t number = 0;  // of tiles so far

  __device__ __forceinline__ uint32_t wait_unit() const {
    hopper::barrier_wait(shared_address(&shared.full[warp >> 1][slot]), parity);
    return ring + slot * kPairBytes;
  }
  __device__ __forceinline__ void release_unit() {
    __syncwarp();  // all lanes have read
    if (lane == 0) hopper::barrier_arrive(shared_address(&shared.empty[warp >> 1][slot]));
    if (++slot == kPairs) slot = 0, parity ^= 1;
  }

  // The group's sums of all ranks of the tile, to shared.parts.
  __device__ __forceinline__ void shrink(const Record& r, Rows<T>& rows, bgmv::Words<4> (&xs)[4][2]) {
    const int g = lane >> 2, t = lane & 3, tiles = 1 << rank_tile_bits(r.slice.rank);
#pragma unroll 1
    for (int q = 0; q < tiles; ++q) {
      float sums[4][4] = {};
#pragma unroll 1
      for (int step = 0; step < args.leaf_pieces; ++step) {
        rows.advance();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t at = wait_unit() + 16 * place<3>(g, t);
          const uint4 upper0 = load_shared_16(at), upper1 = load_shared_16(at ^ 64);
          const uint4 lower0 = load_shared_16(at + 1024), lower1 = load_shared_16((at ^ 64) + 1024);
          const bgmv::Words<4>(&xi)[2] = xs[i];
          mma_m16n8k16<T>(sums[i], {upper0.x, lower0.x, upper0.y, lower0.y}, {xi[0].values[0], xi[0].values[1]});
          mma_m16n8k16<T>(sums[i], {upper0.z, lower0.z, upper0.w, lower0.w}, {xi[0].values[2], xi[0].values[3]});
          mma_m16n8k16<T>(sums[i], {upper1.x, lower1.x, upper1.y, lower1.y}, {xi[1].values[0], xi[1].values[1]});
          mma_m16n8k16<T>(sums[i], {upper1.z, lower1.z, upper1.w, lower1.w}, {xi[1].values[2], xi[1].values[3]});
          rows.load(xs[i], i);
          release_unit();
        }
      }
      const auto sum = [&](int i) { return float4{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}; };
      if (2 * t < r.end - r.position) shared.parts[q][warp][lane] = ((sum(0) + sum(1)) + sum(2)) + sum(3);
    }
  }

  // Sends the block's part of v to both blocks.
  __device__ __forceinline__ void send(const Record& r) {
    const int bits = rank_tile_bits(r.slice.rank), n = r.end - r.position;
    const uint32_t barrier = shared_address(&shared.received[number & 1]);
    if (threadIdx.x == 0) hopper::barrier_expect(barrier, (kBlocks * 16 * 8 << bits) * ((n + 1) / 2));
    hopper::named_barrier_sync(1, 32 * kWarps);
    const int q = warp >> (3 - bits), peer = warp & ((8 >> bits) - 1);
    if (peer >= kBlocks || 2 * (lane & 3) >= n) return;
    const auto part = [&](int i) { return shared.parts[q][i][lane]; };
    const float4 sum = ((part(0) + part(1)) + (part(2) + part(3))) + ((part(4) + part(5)) + (part(6) + part(7)));
    hopper::store_async(hopper::remote_address(shared_address(&shared.sums[number & 1][block][q][lane]), peer), sum,
                        hopper::remote_address(barrier, peer));
  }

  template <int kTileBits>
  __device__ __forceinline__ void expand(const Record& r) {
    constexpr int kMTiles = 4 >> kTileBits, kCount = 2 * kMTiles, kOutputs = 64 >> kTileBits;
    constexpr int kUnitRows = kOutputs * kWarps * kBlocks, kTiles = 1 << kTileBits;
    constexpr int kAheadY = kTileBits == 0 ? 2 : 4;
    const int g = lane >> 2, t = lane & 3, width = r.slice.width;
    int column = (block * kWarps + warp) * kOutputs + kCount * g;
    T* y[2];
    bool has_row[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = r.rows[2 * t + e];
      has_row[e] = row >= 0;
      y[e] = reinterpret_cast<T*>(static_cast<char*>(args.y) + int64_t{has_row[e] ? row : 0} * args.y_row_bytes) +
             (r.slice.begin + column);
    }
    bgmv::Words<kMTiles> held[kAheadY][2];
    const auto load_y = [&](bgmv::Words<kMTiles>(&to)[2], int ahead) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (has_row[e] && column + ahead * kUnitRows < width) {
          to[e] = *reinterpret_cast<const bgmv::Words<kMTiles>*>(y[e] + ahead * kUnitRows);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAheadY; ++i) load_y(held[i], i);
    hopper::barrier_wait(shared_address(&shared.received[number & 1]), number >> 1 & 1);
    PlainOperands<kTiles> operands;
    {
      float4 v[kTiles];
      const bool there = 2 * t < r.end - r.position;
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        const uint32_t at = shared_address(&shared.sums[number & 1][0][q][lane]);
        v[q] = load_fragment(at, there) + load_fragment(at + kMaxTiles * kFragment, there);
      }
      make_operands<T, kTileBits>(v, r.slice.rank, r.slice.scale, lane, operands);
    }
    int left = own_units_of_b(r.slice.rank, width, block);
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < kAheadY; ++i) {
        if (left <= 0) break;
        float sums[kMTiles][4] = {};
        multiply_unit<T, kTileBits>(wait_unit(), lane, operands, sums);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (has_row[e] && column < width) add_outputs<T, kMTiles>(y[e], held[i][e], sums, operands.factors[e], e);
        }
        load_y(held[i], kAheadY);
        column += kUnitRows;
        y[0] += kUnitRows, y[1] += kUnitRows;
        release_unit();
        --left;
      }
    }
  }

  // All tiles of the records, from the one at `begin` on.
  __device__ __forceinline__ void run(uint32_t begin) {
    Rows<T> rows = {args, shared, warp, lane, block, begin};
    bgmv::Words<4> xs[4][2];
    rows.advance();
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.load(xs[i], i);
    uint32_t at = begin;
#pragma unroll 1
    for (int i = record_at(shared, at, lane); i >= 0; i = record_at(shared, at, lane), ++number) {
      const Record& r = shared.records[i];
      shrink(r, rows, xs);
      send(r);
      if (r.slice.rank <= 16) {
        expand<0>(r);
      } else if (r.slice.rank <= 32) {
        expand<1>(r);
      } else {
        expand<2>(r);
      }
      at += shared.count[i];
    }
  }
};

#endif

// The records of the cluster's tiles from `at` on, or of all: returns where they end, and where all end. What it knows
// is found anew each time, not kept: it takes registers.
template <class T>
__device__ __noinline__ uint2 find_tiles(const Args& args, Shared& shared, Entry* table, uint32_t at, bool first) {
  Finder<T> finder = {args, shared, table};
  finder.count(first);
  const uint32_t cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
  const uint32_t end = part_begin(finder.total, cluster + 1, clusters);
  return {finder.find(first ? part_begin(finder.total, cluster, clusters) : at, end), end};
}

template <Arch kArch, class T>
__global__ void __launch_bounds__(kThreads, 1) add_lora_stream_kernel(const __grid_constant__ Args args) {
  if constexpr (kArch == Arch::kSm90 && kCompiled<kArch>) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (args.early_reads) launch_dependents<kArch>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, number = static_cast<int>(blockIdx.x % kBlocks);
    if (warp >= kWarps) {
      const int team = warp - kWarps;
      if (lane < kPairs) {
        hopper::barrier_init(shared_address(&shared.full[team][lane]), 32);
        hopper::barrier_init(shared_address(&shared.empty[team][lane]), 2);
      }
      if (team == 0 && lane < 2) hopper::barrier_init(shared_address(&shared.received[lane]), 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // waited for below
    bool waited = !args.early_reads;
    if (waited) grid_dependency_wait<kArch>();
    Entry* const table = reinterpret_cast<Entry*>(memory + kHeadBytes);
    const uint32_t rings = shared_address(table);
    uint2 range = find_tiles<T>(args, shared, table, 0, true);
    if (waited) launch_dependents<kArch>();
    if (warp >= kWarps) {
      Copier<T> copier = {args, shared, rings + (warp - kWarps) * (kPairs * kPairBytes), warp - kWarps, lane, number};
#pragma unroll 1
      while (true) {
        copier.run(shared.begin);
        if (range.x >= range.y) break;
        range = find_tiles<T>(args, shared, table, range.x, false);
      }
      if (!waited) grid_dependency_wait<kArch>();
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      copy_wait<0>();
    } else {
      if (!waited) grid_dependency_wait<kArch>();
      // Before the first send: the other block's barriers are initialised.
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      Block<kArch, T> block = {args, shared, rings + (warp >> 1) * (kPairs * kPairBytes) + (warp & 1) * kUnitBytes,
                               warp, lane,   number};
#pragma unroll 1
      while (true) {
        block.run(shared.begin);
        if (range.x >= range.y) break;
        range = find_tiles<T>(args, shared, table, range.x, false);
      }
    }
#endif
  }
}

}  // namespace punica::cuda::fused_lora::stream
