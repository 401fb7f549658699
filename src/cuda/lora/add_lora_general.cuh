// The general way through add_lora_ring.cuh: any alignment, any rank. What it computes and how stands there.
#pragma once

#include <algorithm>
#include <climits>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"
#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kRingWarps = 8;
inline constexpr int kRingThreads = 32 * kRingWarps;

// Ranks that v is exchanged for at a time: 16 << chunk_bits. Fewer where room is needed for v of a large rank.
__host__ __device__ constexpr int chunk_bits(int team_bits, int max_rank) {
  return team_bits == 3 ? 1 : team_bits == 2 ? 2 : team_bits + (max_rank <= 128 ? 1 : 0);
}
// Floats from row to row of the chains' parts of v, so that the stores of a warp meet no bank twice.
__host__ __device__ constexpr int part_pitch(int chunk_bits) { return (16 << chunk_bits) + 4; }
__host__ __device__ constexpr int part_floats(int team_bits, int max_rank) {
  return (kChains >> team_bits) * kTileRows * part_pitch(chunk_bits(team_bits, max_rank));
}
inline constexpr int part_floats(int max_rank) {
  return std::max(std::max(part_floats(0, max_rank), part_floats(1, max_rank)),
                  std::max(part_floats(2, max_rank), part_floats(3, max_rank)));
}
inline constexpr int kPartFloats = part_floats(128), kFewPartFloats = part_floats(129);
// What blocks send each other, of one of two buffers: [block of the team][row][rank].
inline constexpr int kReceiveFloats = 8 * kTileRows * 32;

struct RingShared {
  uint64_t received[2];  // barriers, one a buffer
  Work<kTileRows> work;
  TileScratch<kRingWarps> scratch;
  float up[kTileRows];  // float16: see row_exponent()
};

// Behind it, in general: what the blocks of a team send each other, the chains' parts of v, v in float32 (float16
// alone), v's high and low numbers, the rings.
inline constexpr int kGeneralDepth = 2;
__host__ __device__ constexpr int v_pitch(int max_rank) { return (max_rank + 63) / 64 * 64 + 32; }  // 16-bit numbers
__host__ __device__ constexpr int v_float_pitch(int max_rank) { return (max_rank + 63) / 64 * 64 + 4; }
inline constexpr size_t kHeadBytes = (sizeof(RingShared) + 127) / 128 * 128;
constexpr size_t general_shared_bytes(int max_rank, bool half) {
  return sizeof(float) * 2 * kReceiveFloats + sizeof(float) * part_floats(max_rank) +
         (half ? (sizeof(float) * kTileRows * v_float_pitch(max_rank) + 127) / 128 * 128 : 0) +
         (size_t{2} * 2 * kTileRows * v_pitch(max_rank) + 127) / 128 * 128 +
         size_t{kUnitBytes} * kRingWarps * kGeneralDepth;
}
// Of a slice's expand: outputs of a unit follow from the rank.
__device__ __forceinline__ int row_bits(int rank) { return rank <= 16 ? 1 : rank <= 32 ? 2 : 3; }

template <class T>
struct Warp {
  const Args& args;
  RingShared& shared;
  float* parts;  // of v, of the chains: see block_part()
  float* receive;
  int team_bits, team_rank, warp, lane;
  int chunk_bits, pitch;

  // The block's chains are the next ones after those of the blocks of the team before it. A task is a chain of a tile
  // of 16 ranks; the block's warps take tasks in turn.
  __device__ __forceinline__ int chain_bits() const { return kChainBits - team_bits; }
  __device__ __forceinline__ int local_chain(int task) const { return task & ((1 << chain_bits()) - 1); }
  __device__ __forceinline__ int tile(int task) const { return task >> chain_bits(); }
  __device__ __forceinline__ int chain(int task) const { return (team_rank << chain_bits()) + local_chain(task); }
  __device__ __forceinline__ int length(int task) const {
    return ((args.h_in + kPiece - 1) / kPiece - chain(task) + kChains - 1) >> kChainBits;
  }
  // Goes to the next piece of the warp's tasks before `end`; false behind the last one. To begin: task = warp - 8, m =
  // any.
  __device__ __forceinline__ bool next_piece(int* task, int* m, int end) const {
    if (*task >= 0 && ++*m < length(*task)) return true;
    *m = 0;
    for (*task += kRingWarps; *task < end; *task += kRingWarps) {
      if (length(*task) > 0) return true;
    }
    return false;
  }
  __device__ __forceinline__ int first_task() const { return warp - kRingWarps; }
  __device__ __forceinline__ int tasks(int rank) const { return (rank + 15) / 16 << chain_bits(); }
  // A chain is the pieces of a group (add_lora_ring.cuh). They come leaf by leaf: every fourth of the chain's own.
  __device__ __forceinline__ int leaf_of(int task, int m) const {
    const int count = length(task), size = count >> 2, larger = count & 3, of_larger = larger * (size + 1);
    return m < of_larger ? m / (size + 1) : larger + (m - of_larger) / size;
  }
  __device__ __forceinline__ int k_of(int task, int m) const {
    const int count = length(task), size = count >> 2, larger = count & 3, leaf = leaf_of(task, m);
    const int before = leaf * size + min(leaf, larger);
    return ((leaf + 4 * (m - before)) * kChains + chain(task)) * kPiece;
  }
};

// What a warp copies next.
template <class T, int kDepth>
struct Producer {
  const Warp<T>& w;
  uint32_t ring;  // of the warp
  int slice = 0, slot = 0;
  bool expands = false;
  int task, m = 0;          // of A
  int group = 0, unit = 0;  // of B

  __device__ __forceinline__ Producer(const Warp<T>& w, uint32_t ring) : w(w), ring(ring), task(w.first_task()) {}

  // To the first unit at or after the present place; false if there is none.
  __device__ __forceinline__ bool advance() {
    while (slice < w.shared.work.num_slices) {
      const Slice& s = w.shared.work.slices[slice];
      if (!expands) {
        if (w.next_piece(&task, &m, w.tasks(s.rank))) return true;
        task = w.first_task();
        expands = true;
        group = (w.team_rank * kRingWarps + w.warp);
        unit = -1;
      }
      const int units = (s.rank + 63) / 64, outputs = 128 >> row_bits(s.rank);
      if (++unit == units) {
        unit = 0;
        group += kRingWarps << w.team_bits;
      }
      if (int64_t{group} * outputs < s.width) return true;
      expands = false;
      ++slice;
    }
    return false;
  }

  // Starts the copy of the next unit, if there is one.
  __device__ __forceinline__ void start() {
    if (advance()) {
      const Slice& s = w.shared.work.slices[slice];
      const uint32_t to = ring + slot * kUnitBytes;
      if (!expands) {
        const int k = w.k_of(task, m), h_in = w.args.h_in, tile = w.tile(task);
        const T* const a = static_cast<const T*>(s.a);
        copy_unit<T, 3>(to, a + int64_t{16 * tile} * h_in + k, h_in, s.rank - 16 * tile, h_in - k,
                        reinterpret_cast<uintptr_t>(a) % 16 == 0 && h_in % 8 == 0, w.args.x, w.lane);
      } else {
        const int bits = row_bits(s.rank), first = group * (128 >> bits);
        const T* const b = static_cast<const T*>(s.b) + first * s.b_stride + 64 * unit;
        const bool aligned = reinterpret_cast<uintptr_t>(s.b) % 16 == 0 && s.b_stride % 8 == 0;
        if (bits == 1) {
          copy_unit<T, 1>(to, b, s.b_stride, s.width - first, s.rank, aligned, w.args.x, w.lane);
        } else if (bits == 2) {
          copy_unit<T, 2>(to, b, s.b_stride, s.width - first, s.rank, aligned, w.args.x, w.lane);
        } else {
          copy_unit<T, 3>(to, b, s.b_stride, s.width - first, s.rank - 64 * unit, aligned, w.args.x, w.lane);
        }
      }
    }
    copy_commit();
    slot = (slot + 1) % kDepth;
  }
};

// kCount 16-bit elements of a row, all or the first `count`; zeros elsewhere. kWhole: aligned, and all or none.
template <int kCount, bool kWhole>
__device__ __forceinline__ bgmv::Words<kCount / 2> load_part(const void* from, int count) {
  bgmv::Words<kCount / 2> r = {};
  if constexpr (kWhole) {
    if (count > 0) r = *static_cast<const bgmv::Words<kCount / 2>*>(from);
  } else {
    const uint16_t* const elements = static_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) r.values[i / 2] |= uint32_t{elements[i]} << (16 * (i % 2));
    }
  }
  return r;
}

// The outputs of a group that a lane ends with: 2 * kTiles neighbours of each of two rows of the batch.
template <class T, int kTiles>
struct Outputs {
  static constexpr int kCount = 2 * kTiles;
  bgmv::Words<kTiles> values[2];
};

// Which outputs those are, in y.
template <class T, int kTiles>
struct OutputPlace {
  static constexpr int kCount = 2 * kTiles;
  T* rows[2];
  int columns[2];  // there are from the slice's first one on, less what is before this lane's; none: below 1
  bool vectors;

  __device__ __forceinline__ OutputPlace(const Warp<T>& w, const Slice& s) {
    const Work<kTileRows>& work = w.shared.work;
    const int g = w.lane / 4, t = w.lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = 2 * t + e < work.count;
      rows[e] = static_cast<T*>(w.args.y) + work.rows[there ? 2 * t + e : 0] * w.args.y_stride + s.begin + g * kCount;
      columns[e] = there ? s.width - g * kCount : 0;
    }
    vectors = w.args.y_vectors && s.begin % 8 == 0;
  }

  __device__ __forceinline__ Outputs<T, kTiles> load(int first) const {
    Outputs<T, kTiles> r;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int count = min(columns[e] - first, kCount);
      r.values[e] = vectors && count == kCount ? load_part<kCount, true>(rows[e] + first, count)
                                               : load_part<kCount, false>(rows[e] + first, count);
    }
    return r;
  }

  // Adds factor * sums of the products of kTiles tiles.
  __device__ __forceinline__ void add(const Outputs<T, kTiles>& before, int first, const float (&sums)[kTiles][4],
                                      const float (&factors)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Vec<T, kCount> after;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint16_t bits = static_cast<uint16_t>(before.values[e].values[i / 2] >> (16 * (i % 2)));
        const float value = to_float(*reinterpret_cast<const T*>(&bits));
        after.values[i] = from_float<T>(fmaf(factors[e], sums[i / 2][2 * (i % 2) + e], value));
      }
      const int count = min(columns[e] - first, kCount);
      if (vectors && count == kCount) {
        store<T, kCount>(rows[e] + first, after);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (i < count) rows[e][first + i] = after.values[i];
        }
      }
    }
  }
};

// ---- Shrink --------------------------------------------------------------------------------------------------------

// This warp's tasks of the tiles [first_tile, last_tile), to shared memory.
template <Arch kArch, class T, int kDepth, bool kVectors>
__device__ __forceinline__ void shrink_tiles(const Warp<T>& w, Producer<T, kDepth>& producer, int& slot, int first_tile,
                                             int last_tile) {
  const Args& args = w.args;
  const Work<kTileRows>& work = w.shared.work;
  const int g = w.lane / 4, t = w.lane % 4, pitch = w.pitch;
  const bool has_row = g < work.count;
  const T* const x = static_cast<const T*>(args.x) + work.rows[has_row ? g : 0] * args.x_stride + 8 * t;
  const auto load_x = [&](int k, bgmv::Words<4>(&to)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int rest = has_row ? args.h_in - k - 32 * c - 8 * t : 0;
      if constexpr (kVectors) {
        to[c] = bgmv::load_if(rest > 0, x + k + 32 * c);
      } else {
        const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(x + k + 32 * c), min(max(rest, 0), 8));
        to[c] = {v.x, v.y, v.z, v.w};
      }
    }
  };
  const int chain_bits = w.chain_bits(), end = last_tile << chain_bits;
  int task = w.warp + (((first_tile << chain_bits) - w.warp + kRingWarps - 1) & -kRingWarps);
  // The piece whose x is being loaded.
  bgmv::Words<4> next[2] = {};
  int next_task = task - kRingWarps, next_m = 0;
  if (next_task < 0) next_task = w.first_task();
  next_m = INT_MAX - 1;
  bool more = w.next_piece(&next_task, &next_m, end);
  if (more) load_x(w.k_of(next_task, next_m), next);
#pragma unroll 1
  for (; task < end; task += kRingWarps) {
    float sum[4] = {}, total[4] = {};
    const int length = w.length(task);
#pragma unroll 1
    for (int m = 0; m < length; ++m) {
      const bgmv::Words<4> xs[2] = {next[0], next[1]};
      more = more && w.next_piece(&next_task, &next_m, end);
      if (more) load_x(w.k_of(next_task, next_m), next);
      copy_wait<kDepth - 1>();
      __syncwarp();
      const uint32_t from = producer.ring + slot * kUnitBytes;
      uint4 a[2][2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        a[c][0] = load_shared_16(from + 16 * place<3>(g, 4 * c + t));
        a[c][1] = load_shared_16(from + 16 * place<3>(g + 8, 4 * c + t));
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        mma_m16n8k16<T>(sum, {a[c][0].x, a[c][1].x, a[c][0].y, a[c][1].y}, {xs[c].values[0], xs[c].values[1]});
        mma_m16n8k16<T>(sum, {a[c][0].z, a[c][1].z, a[c][0].w, a[c][1].w}, {xs[c].values[2], xs[c].values[3]});
      }
      __syncwarp();  // all lanes have read
      slot = (slot + 1) % kDepth;
      producer.start();
      const int leaf = w.leaf_of(task, m);
      if (m + 1 == length || w.leaf_of(task, m + 1) != leaf) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[i] = leaf == 0 ? sum[i] : total[i] + sum[i];
          sum[i] = 0;
        }
      }
    }
    float* const to =
        w.parts + (w.local_chain(task) * kTileRows + 2 * t) * pitch + (w.tile(task) - first_tile) * 16 + g;
    to[0] = total[0], to[8] = total[2];
    to[pitch] = total[1], to[pitch + 8] = total[3];
  }
}

// The block's part of v[row][rank] from those of its chains.
template <class T>
__device__ __forceinline__ float block_part(const Warp<T>& w, int row, int rank) {
  const int stride = kTileRows * w.pitch;
  const float* const from = w.parts + row * w.pitch + rank;
  const auto two = [&](int i) { return from[i * stride] + from[(i + 1) * stride]; };
  const auto four = [&](int i) { return two(i) + two(i + 2); };
  switch (w.team_bits) {
    case 3:
      return two(0);
    case 2:
      return four(0);
    case 1:
      return four(0) + four(4);
    default:
      return (four(0) + four(4)) + (four(8) + four(12));
  }
}

// Where v goes.
template <class T>
struct V {
  float* floats;  // float16: before it is split
  uint16_t *high, *low;
  int pitch, float_pitch;

  __device__ __forceinline__ void store(int row, int rank, float value) const {
    if constexpr (std::is_same_v<T, __half>) {
      floats[row * float_pitch + rank] = value;
    } else {
      split<T>(value, &high[row * pitch + rank], &low[row * pitch + rank]);
    }
  }
  // Ranks from `rank` to the end of the last product are zero: what stands behind A in the sums may be anything.
  __device__ __forceinline__ void store_zero(int row, int rank) const {
    high[row * pitch + rank] = 0;
    low[row * pitch + rank] = 0;
  }
};

// v's ranks [first, first + count) from the blocks' parts of it. `number`: of exchanges before this one.
template <Arch kArch, class T>
__device__ __forceinline__ void exchange(const Warp<T>& w, const V<T>& v, int first, int count, int number) {
  RingShared& shared = w.shared;
  const int rows = shared.work.count, team_bits = w.team_bits;
  const int width_bits = 4 + w.chunk_bits, width = 1 << width_bits, values = rows << width_bits;
  __syncthreads();  // all parts are there
  if (team_bits == 0) {
    for (int i = threadIdx.x; i < values; i += kRingThreads) {
      const int row = i >> width_bits, rank = i & (width - 1);
      if (rank < count) v.store(row, first + rank, block_part(w, row, rank));
    }
  }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kArch == Arch::kSm90) {
    if (team_bits > 0) {
      // A block sends for the n-th time when it has received for the (n - 1)-th, and so when all others have read what
      // they received before: two buffers are enough.
      if (number == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      const int team = 1 << team_bits, buffer = number & 1;
      const uint32_t first_block = hopper::cluster_rank() & ~static_cast<uint32_t>(team - 1);
      const uint32_t barrier = shared_address(&shared.received[buffer]);
      if (threadIdx.x == 0) hopper::barrier_expect(barrier, 4 * team * rows * count);
      for (int i = threadIdx.x; i < values; i += kRingThreads) {
        const int row = i >> width_bits, rank = i & (width - 1);
        if (rank < count) {
          const float part = block_part(w, row, rank);
          const uint32_t to = shared_address(&w.receive[buffer * kReceiveFloats + w.team_rank * kTileRows * width + i]);
          for (int peer = 0; peer < team; ++peer) {
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                             hopper::remote_address(to, first_block + peer)),
                         "f"(part), "r"(hopper::remote_address(barrier, first_block + peer))
                         : "memory");
          }
        }
      }
      const uint32_t parity = number >> 1 & 1;
      uint32_t done;
      do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
      } while (done == 0);
      const int stride = kTileRows * width;
      for (int i = threadIdx.x; i < values; i += kRingThreads) {
        const int row = i >> width_bits, rank = i & (width - 1);
        if (rank < count) {
          const float* const from = &w.receive[buffer * kReceiveFloats + i];
          float sum = from[0] + from[stride];
          if (team_bits >= 2) sum += from[2 * stride] + from[3 * stride];
          if (team_bits == 3) {
            sum += (from[4 * stride] + from[5 * stride]) + (from[6 * stride] + from[7 * stride]);
          }
          v.store(row, first + rank, sum);
        }
      }
    }
  }
#endif
}

// ---- Expand --------------------------------------------------------------------------------------------------------

// 128 bytes or less of weights a row: kTiles tiles of 16 outputs, whose rows (g, g + 8) are outputs kCount * g + 2 *
// tile and the one behind it.
template <class T, int kTiles>
__device__ __forceinline__ void unit_products(float (&sums)[kTiles][4], uint32_t from, const V<T>& v, int unit,
                                              int chunks, int lane) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (kTiles == 4) {
    const uint2 high = *reinterpret_cast<const uint2*>(v.high + g * v.pitch + 4 * t);
    const uint2 low = *reinterpret_cast<const uint2*>(v.low + g * v.pitch + 4 * t);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint2 b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(b[h].x), "=r"(b[h].y)
                     : "r"(from + 16 * place<1>(8 * g + 2 * i + h, t / 2) + t % 2 * 8)
                     : "memory");
      }
      mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {high.x, high.y});
      mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {low.x, low.y});
    }
  } else {
    constexpr int kRowBits = kTiles == 2 ? 2 : 3;
#pragma unroll
    for (int c = 0; c < (kTiles == 2 ? 1 : 2); ++c) {
      if (c >= chunks) break;
      const int k = 64 * unit + 32 * c + 8 * t;
      const uint4 high = *reinterpret_cast<const uint4*>(v.high + g * v.pitch + k);
      const uint4 low = *reinterpret_cast<const uint4*>(v.low + g * v.pitch + k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int row = 2 * kTiles * g + 2 * i;
        const uint4 b0 = load_shared_16(from + 16 * place<kRowBits>(row, 4 * c + t));
        const uint4 b1 = load_shared_16(from + 16 * place<kRowBits>(row + 1, 4 * c + t));
        mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {high.x, high.y});
        mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {low.x, low.y});
        mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {high.z, high.w});
        mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {low.z, low.w});
      }
    }
  }
}

// A slice, once its units of A are used up: receives v through get_v() and adds to y.
template <class T, int kDepth, int kTiles, class GetV>
__device__ __forceinline__ void expand(const Warp<T>& w, Producer<T, kDepth>& producer, int& slot, const Slice& s,
                                       const V<T>& v, GetV get_v) {
  constexpr int kOutputs = 16 * kTiles;  // of a group
  const int units = (s.rank + 63) / 64, step = kRingWarps << w.team_bits;
  const OutputPlace<T, kTiles> place(w, s);
  int group = w.team_rank * kRingWarps + w.warp;
  // What y has is asked for before v is there.
  Outputs<T, kTiles> before = place.load(group * kOutputs);
  get_v();
  float factors[2] = {s.scale, s.scale};
  if constexpr (std::is_same_v<T, __half>) {
    factors[0] *= w.shared.up[2 * (w.lane % 4)];
    factors[1] *= w.shared.up[2 * (w.lane % 4) + 1];
  }
#pragma unroll 1
  for (; int64_t{group} * kOutputs < s.width; group += step) {
    float sums[kTiles][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
      copy_wait<kDepth - 1>();
      __syncwarp();
      unit_products<T, kTiles>(sums, producer.ring + slot * kUnitBytes, v, unit,
                               (min(s.rank - 64 * unit, 64) + 31) / 32, w.lane);
      __syncwarp();  // all lanes have read
      slot = (slot + 1) % kDepth;
      producer.start();
    }
    const Outputs<T, kTiles> now = before;
    const bool more = int64_t{group + step} * kOutputs < s.width;
    if (more) before = place.load((group + step) * kOutputs);
    place.add(now, group * kOutputs, sums, factors);
  }
}

// A function of its own: what it needs takes no registers of the plain way.
template <Arch kArch, class T, bool kVectors>
__device__ __noinline__ void general_block(const Args& args, RingShared& shared, int team_bits, int team_rank) {
  constexpr int kDepth = kGeneralDepth;
  unsigned char* const memory = reinterpret_cast<unsigned char*>(&shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* at = memory + kHeadBytes;
  float* const receive = reinterpret_cast<float*>(at);
  at += sizeof(float) * 2 * kReceiveFloats;
  const int chunk_shift = chunk_bits(team_bits, args.max_rank);
  const Warp<T> w = {args, shared,      reinterpret_cast<float*>(at), receive, team_bits, team_rank, warp,
                     lane, chunk_shift, part_pitch(chunk_shift)};
  at += args.max_rank <= 128 ? sizeof(float) * kPartFloats : sizeof(float) * kFewPartFloats;
  V<T> v;
  v.pitch = v_pitch(args.max_rank), v.float_pitch = v_float_pitch(args.max_rank);
  v.floats = reinterpret_cast<float*>(at);
  if (std::is_same_v<T, __half>) at += (sizeof(float) * kTileRows * v.float_pitch + 127) / 128 * 128;
  v.high = reinterpret_cast<uint16_t*>(at);
  v.low = v.high + kTileRows * v.pitch;
  at += (size_t{2} * 2 * kTileRows * v.pitch + 127) / 128 * 128;

  Producer<T, kDepth> producer = {w, shared_address(at) + warp * (kUnitBytes * kDepth)};
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) producer.start();
  if (args.early_reads) grid_dependency_wait<kArch>();

  int slot = 0, number = 0;
  const int chunk = 1 << chunk_shift;
#pragma unroll 1
  for (int i = 0; i < shared.work.num_slices; ++i) {
    const Slice& s = shared.work.slices[i];
    const int rank = s.rank, tiles = (rank + 15) / 16;
    int first = 0;
#pragma unroll 1
    for (; first + chunk < tiles; first += chunk) {
      shrink_tiles<kArch, T, kDepth, kVectors>(w, producer, slot, first, first + chunk);
      exchange<kArch>(w, v, 16 * first, 16 * chunk, number++);
      __syncthreads();  // the parts have been read
    }
    shrink_tiles<kArch, T, kDepth, kVectors>(w, producer, slot, first, tiles);
    const auto get_v = [&] {
      exchange<kArch>(w, v, 16 * first, rank - 16 * first, number++);
      const int end = rank <= 16 ? 16 : (rank + 31) & ~31;
      if constexpr (std::is_same_v<T, __half>) {
        __syncthreads();
        if (warp < shared.work.count) {
          const float* const from = v.floats + warp * v.float_pitch;
          float largest = 0;
          for (int k = lane; k < rank; k += 32) largest = fmaxf(largest, isfinite(from[k]) ? fabsf(from[k]) : 0.0f);
#pragma unroll
          for (int step = 16; step > 0; step /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
          }
          const int exponent = row_exponent(largest);
          const float down = down_scale(exponent);
          for (int k = lane; k < rank; k += 32) {
            split<T>(from[k] * down, &v.high[warp * v.pitch + k], &v.low[warp * v.pitch + k]);
          }
          if (lane == 0) shared.up[warp] = up_scale(exponent);
        }
      }
      if (warp < shared.work.count) {
        for (int k = rank + lane; k < end; k += 32) v.store_zero(warp, k);
      }
      __syncthreads();  // v is there
    };
    if (rank <= 16) {
      expand<T, kDepth, 4>(w, producer, slot, s, v, get_v);
    } else if (rank <= 32) {
      expand<T, kDepth, 2>(w, producer, slot, s, v, get_v);
    } else {
      expand<T, kDepth, 1>(w, producer, slot, s, v, get_v);
    }
  }
  copy_wait<0>();
}

}  // namespace punica::cuda::fused_lora
