// batch_prefill of float16 and bfloat16 by tensor-core products of warps (mma.sync): any even head dim, rotation. The
// same on both paths; on sm_90 prefill_tensor.cuh goes before it where it serves.
//
// A block of four warps takes items: rows, pairs (query, head of the group), of one sequence and one KV head. Tiles of
// keys and of values take turns in a ring in shared memory that cp.async fills; one barrier a tile both says that it
// has come and that the place of the one before is free. Page addresses are looked up by one thread a token, two tiles
// ahead. Two blocks share a multiprocessor: one multiplies while the other computes weights.
//
// The arithmetic of a row knows of no other row: tiles and splits (kMmaSplitTokens) are counted from position 0, a
// split starts from nothing, splits are merged from left to right, and a tile that a row does not see changes no bit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/attention/prefill_mma_items.cuh"
#include "src/cuda/attention/prefill_mma_rope.cuh"
#include "src/cuda/attention/prefill_mma_tile.cuh"

namespace punica::cuda {

struct MmaAddress {
  int64_t key, value;  // 0: zeros in their place
};
struct MmaKeyAddress {
  int64_t key;
};
struct NoAngles {};

template <class Shape, bool kRope>
struct MmaShared {
  unsigned char queries[Shape::kRows * Shape::kDim * 2];
  unsigned char ring[Shape::kRing][Shape::kTileBytes];
  MmaAddress addresses[2][Shape::kKeys];
  MmaRow rows[Shape::kRows];
  float2 states[Shape::kRows];  // of merged splits
  MmaItem items[2];
  MmaWalk walk;
  int64_t index;  // of the item to find
  // How the block goes about it: `together`, rows that a thread copies lie in one page. Here because registers are
  // short.
  bool apart, rotated, together;
  int4 bounds[Shape::kWarps];
  std::conditional_t<kRope, KeyAngles<Shape::kDim, Shape::kKeys>, NoAngles> angles;
  uint64_t turns[kRope ? Shape::kDim / 2 : 1];
};

template <class T, int kDim_, bool kRope, class RopeArgument>
class MmaBlock {
 public:
  static constexpr int kDim = kDim_;
  using Shape = MmaShape<kDim, kRope>;
  using Shared = MmaShared<Shape, kRope>;
  using Warp = MmaWarp<T, Shape>;
  using Ahead = std::conditional_t<kRope, MmaAddress, MmaKeyAddress>;  // values lie as far from keys as ever
  static constexpr int kKeys = Shape::kKeys, kRing = Shape::kRing, kThreads = Shape::kThreads;

  __device__ __forceinline__ MmaBlock(const AttentionArgs& args, const MmaCall& call, const RopeArgument& rope,
                                      Shared& shared)
      : args_(args), call_(call), rope_(rope), shared_(shared) {}

  // Zeros behind the elements of a row: copies never reach them.
  __device__ __forceinline__ void clear_padding() const {
    if (args_.head_dim == kDim) return;
    uint4* const all = reinterpret_cast<uint4*>(&shared_);
    constexpr int kCount = (sizeof(shared_.queries) + sizeof(shared_.ring)) / 16;
    for (int i = threadIdx.x; i < kCount; i += kThreads) all[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void run() {
    const MmaWay way = find_way(args_, call_);
    if (threadIdx.x == 0) {
      shared_.rotated = way.rotated;
      shared_.apart = way.apart;
      shared_.together = args_.page_size % kGroup == 0 && args_.head_dim % 8 == 0;
      shared_.index = blockIdx.x;
    }
    if (threadIdx.x == 0) shared_.walk = {-1};
    __syncwarp();
    if (warp_ == 0) find_item<Shape::kRows>(args_, way, blockIdx.x, shared_.walk, shared_.items[0]);
    if constexpr (kRope) {
      for (int d = threadIdx.x; d < args_.head_dim / 2; d += kThreads) shared_.turns[d] = rope_.turns[d];
      __syncthreads();
      shared_.angles.set_near(shared_.turns, args_.head_dim / 2);
    }
    __syncthreads();
    for (int current = 0; shared_.items[current].kv_head >= 0; current ^= 1) {
      const MmaItem& item = shared_.items[current];
      start(item);
      // While its first tiles are on their way.
      if (warp_ == 0) {
        if (threadIdx.x == 0) {
          shared_.index = call_.next_item == nullptr ? shared_.index + gridDim.x
                                                     : int64_t{gridDim.x} + atomicAdd(call_.next_item, 1u);
        }
        __syncwarp();
        const MmaWay way = {shared_.apart, shared_.rotated};
        find_item<Shape::kRows>(args_, way, shared_.index, shared_.walk, shared_.items[current ^ 1]);
      }
      attend(item);
      __syncthreads();  // nobody reads what the next item writes
    }
  }

 private:
  // Where the token of this thread lies, of the tile at `first`. Tokens before those that the rows see may be gone;
  // those behind are there.
  __device__ __forceinline__ Ahead find_address(const MmaItem& item, int first) const {
    const int token = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= kKeys || token < item.begin || token >= item.limit) return {};
    // token / page_size: the product is the quotient or one more.
    const int size = static_cast<int>(args_.page_size);
    int page = size == 1 ? token : static_cast<int>(__umulhi(token, call_.page_inverse)), slot = token - page * size;
    if (slot < 0) --page, slot += size;
    const int64_t row = int64_t{slot} * (args_.head_dim * 2) + item.kv_head * args_.head_bytes;
    const int64_t key = args_.kv_ptrs[item.first_page + page] + args_.key_bytes + row;
    if constexpr (kRope) {
      if (shared_.rotated) {
        const int64_t place = (item.pages_before + page) * args_.num_kv_heads * args_.head_bytes + row;
        return {reinterpret_cast<int64_t>(call_.rotated) + place, key + args_.value_bytes};
      }
      return {key, key + args_.value_bytes};
    } else {
      return {key};
    }
  }
  __device__ __forceinline__ void put_address(int tile, const Ahead& address) const {
    if (threadIdx.x >= kKeys) return;
    if constexpr (kRope) {
      shared_.addresses[tile % 2][threadIdx.x] = address;
    } else {
      const int64_t key = address.key;
      shared_.addresses[tile % 2][threadIdx.x] = {key, key == 0 ? 0 : key + args_.value_bytes};
    }
  }

  // Copy number `step` of the item: the keys (even) or values (odd) of tile step / 2. A group of its own, even if
  // empty.
  __device__ __forceinline__ void copy(const MmaItem& item, int step, int steps) {
    if (step < steps) {
      const int64_t* const rows = &shared_.addresses[step / 2 % 2][0].key + step % 2;
      const uint32_t to = shared_address(shared_.ring[step % kRing]);
      const int first = first_key_ + step / 2 * kKeys;
      if (shared_.together && first >= item.begin && first + kKeys <= item.limit) {
        copy_whole(to, rows);
      } else {
        copy_rows(to, rows);
      }
      // The keys of a tile are the first of it: the addresses of the next one find their place, those of the one after
      // are asked for.
      if (step % 2 == 0) {
        put_address(step / 2 + 1, ahead_);
        ahead_ = find_address(item, first + 2 * kKeys);
      }
    }
    copy_commit();
  }

  // A tile all of whose tokens are there, and kGroup of them in one page. Side by side lie kLanes threads, each with
  // some chunks of kGroup rows.
  static constexpr int kChunks = kDim / 8;
  static constexpr int kLanes = kChunks % 16 == 0 ? 16 : kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kGroup = kKeys * kLanes / kThreads;
  static_assert(kGroup >= 1 && kKeys * kLanes % kThreads == 0);
  __device__ __forceinline__ void copy_whole(uint32_t to, const int64_t* rows) const {
    const int row = threadIdx.x / kLanes * kGroup, lane = threadIdx.x % kLanes;
    const unsigned char* const from = reinterpret_cast<const unsigned char*>(rows[2 * row]) + 16 * lane;
#pragma unroll
    for (int j = 0; j < kChunks / kLanes; ++j) {
      const int chunk = lane + j * kLanes;
      if (chunk >= args_.head_dim / 8) break;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        copy_chunk(to + tile_offset<kDim>(row + i, chunk), from + i * (args_.head_dim * 2) + 16 * j * kLanes);
      }
    }
  }

  // Any other.
  __device__ __forceinline__ void copy_rows(uint32_t to, const int64_t* rows) const {
    const bool wide = args_.head_dim % 8 == 0;
    const int pieces = wide ? args_.head_dim / 8 : args_.head_dim / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * pieces; i += kThreads) {
      const int row = i / pieces, piece = i - row * pieces;
      // Where no row is, nothing is read, whatever the address.
      const int64_t address = rows[2 * row];
      if (wide) {
        copy_chunk(to + tile_offset<kDim>(row, piece), reinterpret_cast<const unsigned char*>(address) + 16 * piece,
                   address != 0);
      } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + tile_offset<kDim>(row, piece / 4) +
                                                                          piece % 4 * 4),
                     "l"(address + 4 * piece), "r"(address != 0 ? 4 : 0)
                     : "memory");
      }
    }
  }

  __device__ __forceinline__ void start(const MmaItem& item) {
    const int thread = threadIdx.x;
    first_key_ = item.begin / kKeys * kKeys;
    tiles_ = item.end > item.begin ? (item.end - first_key_ + kKeys - 1) / kKeys : 0;
    ahead_ = find_address(item, first_key_);
    if (thread < Shape::kRows) {
      MmaRow row = {0, 0, 0, 0};
      if (thread < item.rows) {
        const int at = item.first_head + thread, query = at / args_.group_size;
        row.query = item.tile_query + query;
        row.head = at - query * args_.group_size;
        const int64_t position = item.first_position + row.query;
        if (position >= 0 && tiles_ > 0) {
          row.begin = static_cast<int>(args_.first_key(position));
          row.end = static_cast<int>(position) + 1;
        }
      }
      shared_.rows[thread] = row;
    }
    put_address(0, ahead_);
    ahead_ = find_address(item, first_key_ + kKeys);
    __syncthreads();
    load_queries(item);  // in the group of the first copy
#pragma unroll
    for (int step = 0; step < kRing - 1; ++step) {
      if (step > 0 && step % 2 == 0) __syncthreads();  // addresses of the next tile
      copy(item, step, 2 * tiles_);
    }
  }

  __device__ __forceinline__ const T* query_row(const MmaItem& item, const MmaRow& row) const {
    const int64_t head = item.kv_head * int64_t{args_.group_size} + row.head;
    return static_cast<const T*>(args_.q) + (item.first_query + row.query) * args_.q_stride + head * args_.head_dim;
  }

  // As they are; zeros in rows that the item has not.
  __device__ __forceinline__ void load_queries(const MmaItem& item) {
    if (call_.wide_q) {
      const uint32_t to = shared_address(shared_.queries);
#pragma unroll 4
      for (int i = threadIdx.x; i < Shape::kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        if (chunk >= args_.head_dim / 8) continue;
        copy_chunk(to + tile_offset<kDim>(row, chunk), query_row(item, shared_.rows[row]) + 8 * chunk, row < item.rows);
      }
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < Shape::kRows * kDim; i += kThreads) {
        const int row = i / kDim, d = i % kDim;
        if (d >= args_.head_dim) continue;
        query_element(row, d) = row < item.rows ? query_row(item, shared_.rows[row])[d] : from_float<T>(0.0f);
      }
    }
  }
  __device__ __forceinline__ T& query_element(int row, int d) const {
    return *reinterpret_cast<T*>(shared_.queries + tile_offset<kDim>(row, d / 8) + d % 8 * 2);
  }

  // Rotates the warp's queries, and gives them the sign of a factor below 0. A lane has the same pairs of elements in
  // all rows: heads of a query share its angles.
  __device__ __forceinline__ void prepare_queries(const MmaItem& item, int first_row, int last_row) const {
    const float sign = args_.scale < 0.0f ? -1.0f : 1.0f;
    const int half = args_.head_dim / 2, lane = threadIdx.x % 32;
    const auto angle_of = [&](int query, int d) {
      float2 angle = make_float2(1.0f, 0.0f);
      if constexpr (kRope) angle = turn(shared_.turns[d] * static_cast<uint64_t>(item.first_position + query));
      return make_float2(angle.x * sign, angle.y * sign);
    };
    if (half % 2 == 0) {
#pragma unroll 1
      for (int d = 2 * lane; d < half; d += 64) {
        float4 angles = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        int query = -1;
#pragma unroll 2
        for (int row = first_row; row <= last_row; ++row) {
          if (shared_.rows[row].query != query) {
            query = shared_.rows[row].query;
            const float2 a = angle_of(query, d), b = angle_of(query, d + 1);
            angles = make_float4(a.x, a.y, b.x, b.y);
          }
          rotate_pairs<T>(reinterpret_cast<uint32_t&>(query_element(row, d)),
                          reinterpret_cast<uint32_t&>(query_element(row, d + half)), angles);
        }
      }
    } else {
#pragma unroll 1
      for (int d = lane; d < half; d += 32) {
#pragma unroll 1
        for (int row = first_row; row <= last_row; ++row) {
          const float2 angle = angle_of(shared_.rows[row].query, d);
          T &low = query_element(row, d), &high = query_element(row, d + half);
          const float x = to_float(low), y = to_float(high);
          low = from_float<T>(__fmaf_rn(-y, angle.y, __fmul_rn(x, angle.x)));
          high = from_float<T>(__fmaf_rn(x, angle.y, __fmul_rn(y, angle.x)));
        }
      }
    }
    __syncwarp();
  }

  // From the scores of a tile at key `first` to sums.
  template <int kTiles>
  __device__ __forceinline__ void add_tile(Warp& work, const MmaRow* rows, uint32_t values, int first, float scale,
                                           float factor) const {
    if (args_.cap > 0.0f) work.template cap<kTiles>(scale);
    const int4 seen = shared_.bounds[warp_];
    if (first + kKeys > seen.x || first < seen.w) work.template mask<kTiles>(rows, first);
    work.template soften<kTiles>(factor);
    work.template multiply_values<kTiles>(values);
  }

  __device__ __forceinline__ void attend(const MmaItem& item) {
    Warp work;
    const int first_row = warp_ * Shape::kWarpRows, last_row = min(item.rows, first_row + Shape::kWarpRows) - 1;
    const MmaRow* const rows = shared_.rows + first_row;
    const bool few = Shape::kRowTiles > 1 && last_row < first_row + 16;
    // Tiles that all rows of the warp see whole need no mask; those that none sees are left out.
    // In shared memory, registers are short.
    int4& bounds = shared_.bounds[warp_];  // {least, last end, first, last begin}
    if (threadIdx.x % 32 == 0) {
      bounds = make_int4(0, 0, 0, 0);
      if (last_row >= first_row) {
        const MmaRow& last = shared_.rows[last_row];
        bounds = make_int4(rows[0].end, last.end, rows[0].begin, last.begin);
      }
    }
    __syncwarp();
    if (kRope || args_.scale < 0.0f) {
      copy_wait<kRing - 2>();
      __syncthreads();
      prepare_queries(item, first_row, last_row);
    }
    const uint32_t queries = shared_address(shared_.queries) + first_row * (kDim * 2);
    float4* const saved =
        reinterpret_cast<float4*>(call_.saved) + int64_t{blockIdx.x} * (Shape::kRows * kDim / 4) + threadIdx.x;
    float2* const states = shared_.states + first_row;
    const float scale = fabsf(args_.scale), factor = args_.cap > 0.0f ? args_.cap : scale;
    bool any_saved = false;
    work.clear_state();
    work.clear_sums();
#pragma unroll 1
    for (int i = 0; i < tiles_; ++i) {
      const int first = first_key_ + i * kKeys;
      const int4 seen = bounds;
      const bool active = first < seen.y && first + kKeys > seen.z;
      if (first % kMmaSplitTokens == 0 && i > 0) {
        work.template fold_split<false>(saved, states, any_saved, factor);
        work.clear_state();
        work.clear_sums();
        any_saved = true;
      }
      copy_wait<kRing - 2>();
      if constexpr (kRope) {
        if (!shared_.rotated) shared_.angles.set_far(shared_.turns, args_.head_dim / 2, first);
      }
      __syncthreads();
      copy(item, 2 * i + kRing - 1, 2 * tiles_);
      unsigned char* const keys = shared_.ring[2 * i % kRing];
      if constexpr (kRope) {
        if (!shared_.rotated) {
          rotate_tile<T, kDim, kKeys>(shared_.angles, keys, args_.head_dim);
          __syncthreads();
        }
      }
      if (active) {
        if (few) {
          work.template multiply_keys<1>(queries, shared_address(keys));
        } else {
          work.template multiply_keys<Shape::kRowTiles>(queries, shared_address(keys));
        }
      }
      copy_wait<kRing - 2>();
      __syncthreads();
      copy(item, 2 * i + kRing, 2 * tiles_);
      if (active) {
        const uint32_t values = shared_address(shared_.ring[(2 * i + 1) % kRing]);
        if (few) {
          add_tile<1>(work, rows, values, first, scale, factor);
        } else {
          add_tile<Shape::kRowTiles>(work, rows, values, first, scale, factor);
        }
      }
    }
    copy_wait<0>();
    // Without a tile no barrier stands between the copies of queries, by all warps, and what store() writes in their
    // place.
    if (tiles_ == 0) __syncthreads();
    if (any_saved) {
      work.template fold_split<true>(saved, states, true, factor);
    } else {
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          work.maximum[m][h] = __fmul_rn(work.maximum[m][h], factor);
          work.weight[m][h] = mma_quad_sum(work.weight[m][h]);
        }
      }
    }
    if (item.splits == 0) {
      store(item, work, first_row);
    } else if (tiles_ > 0) {
      store_partial(item, work, first_row);
    }
  }

  // What merge_prefill_kernel reads.
  __device__ __forceinline__ void store_partial(const MmaItem& item, const Warp& work, int first_row) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = first_row + 16 * m + 8 * h + g;
        if (at >= item.rows) continue;
        const MmaRow row = shared_.rows[at];
        const int64_t head = item.kv_head * int64_t{args_.group_size} + row.head;
        const int64_t index = (item.first_slot + int64_t{row.query} * item.splits) * args_.num_heads() + head;
        float2* const to = reinterpret_cast<float2*>(args_.partial_sums + index * args_.head_dim) + t;
#pragma unroll
        for (int j = 0; j < Shape::kSums; ++j) {
          if (8 * j + 2 * t < args_.head_dim) {
            to[4 * j] = make_float2(work.sums[m][j][2 * h], work.sums[m][j][2 * h + 1]);
          }
        }
        if (t == 0) args_.partial_states[index] = make_float2(work.maximum[m][h], work.weight[m][h]);
      }
    }
  }

  __device__ __forceinline__ void store(const MmaItem& item, const Warp& work, int first_row) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = first_row + 16 * m + 8 * h + g;
        const MmaRow row = shared_.rows[at];
        // No key seen: zeros. + 0: tiles of zero weights turn -0 into 0, wherever they are.
        const bool empty = row.end == 0;
        const float inverse = empty ? 0.0f : __fdiv_rn(1.0f, work.weight[m][h]);
        // The warp's queries are no longer needed.
#pragma unroll
        for (int j = 0; j < Shape::kSums; ++j) {
          const float a = empty ? 0.0f : __fadd_rn(__fmul_rn(work.sums[m][j][2 * h], inverse), 0.0f);
          const float b = empty ? 0.0f : __fadd_rn(__fmul_rn(work.sums[m][j][2 * h + 1], inverse), 0.0f);
          *reinterpret_cast<uint32_t*>(shared_.queries + tile_offset<kDim>(at, j) + 4 * t) = pack<T>(a, b);
        }
        if (args_.lse != nullptr && at < item.rows && t == 0) {
          args_.lse[(item.first_query + row.query) * args_.num_heads() + item.kv_head * int64_t{args_.group_size} +
                    row.head] = empty ? minus_infinity() : __fadd_rn(work.maximum[m][h], log2f(work.weight[m][h]));
        }
      }
    }
    __syncwarp();
    const auto output_row = [&](int at) {
      const MmaRow row = shared_.rows[at];
      const int64_t head = item.kv_head * int64_t{args_.group_size} + row.head;
      return static_cast<T*>(args_.o) + (item.first_query + row.query) * args_.o_stride + head * args_.head_dim;
    };
    if (call_.wide_o) {
      constexpr int kChunks = kDim / 8;
#pragma unroll 4
      for (int i = lane; i < Shape::kWarpRows * kChunks; i += 32) {
        const int at = first_row + i / kChunks, chunk = i % kChunks;
        if (at >= item.rows || chunk >= args_.head_dim / 8) continue;
        *reinterpret_cast<uint4*>(output_row(at) + 8 * chunk) =
            *reinterpret_cast<const uint4*>(shared_.queries + tile_offset<kDim>(at, chunk));
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < Shape::kWarpRows * kDim; i += 32) {
        const int at = first_row + i / kDim, d = i % kDim;
        if (at >= item.rows || d >= args_.head_dim) continue;
        output_row(at)[d] = *reinterpret_cast<const T*>(shared_.queries + tile_offset<kDim>(at, d / 8) + d % 8 * 2);
      }
    }
    // Elements behind the row's end are zeros again for the next queries.
    if (args_.head_dim != kDim) {
      __syncwarp();
      for (int i = lane; i < Shape::kWarpRows * (kDim - args_.head_dim); i += 32) {
        const int at = first_row + i / (kDim - args_.head_dim), d = args_.head_dim + i % (kDim - args_.head_dim);
        *reinterpret_cast<T*>(shared_.queries + tile_offset<kDim>(at, d / 8) + d % 8 * 2) = from_float<T>(0.0f);
      }
    }
  }

  const AttentionArgs& args_;
  const MmaCall& call_;
  const RopeArgument& rope_;
  Shared& shared_;
  const int warp_ = threadIdx.x / 32;
  int first_key_ = 0, tiles_ = 0;  // the item's first tile begins at first_key_
  Ahead ahead_ = {};
};

template <Arch kArch, class T, int kDim, bool kRope>
__global__ void __launch_bounds__(MmaShape<kDim, kRope>::kThreads, 2)
    prefill_mma_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ MmaCall call,
                       const __grid_constant__ std::conditional_t<kRope, RopeTable, NoRope> rope) {
  if constexpr (kCompiled<kArch>) {
    using Block = MmaBlock<T, kDim, kRope, std::conditional_t<kRope, RopeTable, NoRope>>;
    extern __shared__ __align__(128) unsigned char mma_shared[];
    Block block(args, call, rope, *reinterpret_cast<typename Block::Shared*>(mma_shared));
    launch_dependents<kArch>();
    block.clear_padding();
    grid_dependency_wait<kArch>();
    block.run();
  }
}

}  // namespace punica::cuda
