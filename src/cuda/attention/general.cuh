// The general attention kernel: any head dim, page size, group size and data type, decode and prefill.
//
// A block takes 16 rows of one sequence and one KV head: pairs (query, head of the group), in that order. Its four
// warps have every fourth row each, so that the four rows of a small group in decode are spread over all of them. Keys
// and values come in tiles through shared memory, by asynchronous copies: the values of a tile while its scores are
// computed, the keys of the next one while the values are summed. A lane has one or two keys of the tile in the
// scores, and four or eight columns in the sums; both are float32 multiply-adds in a fixed order.
//
// Nothing in the arithmetic of a row knows of other rows: a tile that a row does not see changes no bit of it, and
// neither does how many rows the warp has. Keys that a row does not see are left out, not multiplied by zero.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/find_work.cuh"
#include "src/cuda/attention/softmax.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kWarps = kAttentionThreads / 32;
inline constexpr int kWarpRows = 4;
inline constexpr int kTileRows = kWarps * kWarpRows;

// Head dims up to kDim = 128 or 256. Less keys with large heads, so that a block fits into the 99 KiB of any device.
constexpr int tile_keys(int dim_class) { return dim_class == 128 ? 64 : 32; }

// Where things lie in dynamic shared memory, in bytes. Rows of keys and values are an odd number of 16-byte units
// apart: lanes that read the same place of 32 rows meet no bank conflict.
struct SharedLayout {
  int key_stride, rotated_stride, query_stride;
  int values, rotated, queries, weights, bytes;

  __host__ __device__ static constexpr int row_stride(int row_bytes) {
    const int units = (row_bytes + 15) / 16;
    return 16 * (units % 2 == 0 ? units + 1 : units);
  }
  // `rotates`: rotated keys are kept in float32 beside the keys as they are.
  __host__ __device__ constexpr SharedLayout(int head_dim, int item, int keys, bool rotates)
      : key_stride(row_stride(head_dim * item)),
        rotated_stride(rotates ? row_stride(head_dim * 4) : key_stride),
        query_stride((head_dim + 7) / 8 * 32),
        values(keys * key_stride),
        rotated(rotates ? 2 * values : 0),
        queries(2 * values + (rotates ? keys * rotated_stride : 0)),
        weights(queries + kTileRows * query_stride),
        bytes(weights + kTileRows * keys * 4) {}
};

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(from) : "memory");
  }
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Starts the copy of the rows of a tile whose address is not null.
__device__ __forceinline__ void copy_tile(unsigned char* to, int stride, int keys, const unsigned char* const* rows,
                                          int64_t offset, int row_bytes) {
  const bool wide = row_bytes % 16 == 0;
  const int copies = row_bytes / (wide ? 16 : 4);
  int log2_lanes = 0;  // threads side by side on a row
  while (log2_lanes < 5 && (1 << log2_lanes) < copies) ++log2_lanes;
  const int first = threadIdx.x & ((1 << log2_lanes) - 1);
  for (int row = threadIdx.x >> log2_lanes; row < keys; row += kAttentionThreads >> log2_lanes) {
    const unsigned char* from = rows[row];
    if (from == nullptr) continue;
    from += offset;
    for (int i = first; i < copies; i += 1 << log2_lanes) {
      if (wide) {
        copy_async<16>(to + row * stride + i * 16, from + i * 16);
      } else {
        copy_async<4>(to + row * stride + i * 4, from + i * 4);
      }
    }
  }
}

// kCount elements at an address that is aligned to them.
template <class T, int kCount>
__device__ __forceinline__ void load_floats(const void* from, float* to) {
  const Vec<T, kCount> vector = load<T, kCount>(static_cast<const T*>(from));
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float(vector.values[i]);
}

struct Angle {
  float sin, cos;
  __device__ __forceinline__ explicit Angle(uint64_t turns) {
    sincospif(static_cast<float>(static_cast<int32_t>(turns >> 32)) * 0x1p-31f, &sin, &cos);
  }
};

// Element d of a rotated row pairs with d + D / 2.
__device__ __forceinline__ void rotate(const Angle& angle, float& a, float& b) {
  const float x = a, y = b;
  a = __fmaf_rn(-y, angle.sin, __fmul_rn(x, angle.cos));
  b = __fmaf_rn(x, angle.sin, __fmul_rn(y, angle.cos));
}

// What a row of the block is.
struct RowInfo {
  int64_t begin, end;  // keys that it sees
  int64_t query;       // row of q and o
  int64_t head;        // of q and o
};

// The rest of what a block shares. It stands at the start of dynamic shared memory: what a kernel declares as static
// would count against the limit that its launch asks for.
struct alignas(16) BlockShared {
  WorkScratch<kAttentionThreads> scratch;
  RowInfo rows[kTileRows];
  const unsigned char* key_rows[2][tile_keys(128)];  // addresses of the keys of this tile and of the next
  uint64_t turns[kMaxHeadDim / 2];
};

template <class T, int kDim, bool kRope>
struct GeneralAttention {
  static constexpr int kKeys = tile_keys(kDim);
  static constexpr int kLaneKeys = kKeys / 32;
  static constexpr int kColumns = kDim / 32;                 // of a lane: 4 * lane .. + 3, and the same 128 further on
  static constexpr bool kRotates = kRope && sizeof(T) != 4;  // float32 keys are rotated where they are
  using KT = std::conditional_t<kRotates, float, T>;         // of the keys that enter the scores
  using State = RowState<kColumns>;
  static_assert(kSplitTokens % kKeys == 0);

  const AttentionArgs& args;
  const SharedLayout layout;
  unsigned char* const shared;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  __device__ __forceinline__ unsigned char* key_rows() const { return shared + layout.rotated; }
  __device__ __forceinline__ float* query_row(int row) const {
    return reinterpret_cast<float*>(shared + layout.queries + row * layout.query_stride);
  }
  __device__ __forceinline__ float* weight_row(int row) const {
    return reinterpret_cast<float*>(shared + layout.weights) + row * kKeys;
  }
  // Columns of this lane in group c of four, 0 for lanes that have none (they compute what nobody reads).
  __device__ __forceinline__ int column(int c) const {
    const int first = c * 128 + 4 * lane;
    return first < args.head_dim ? first : 0;
  }

  // Zeros behind each key, up to where whole vectors of it end. No copy reaches them.
  __device__ void clear_padding() const {
    const int row_bytes = args.head_dim * static_cast<int>(sizeof(KT)), padding = -row_bytes & 15;
    if (padding == 0) return;
    for (int row = threadIdx.x; row < kKeys; row += kAttentionThreads) {
      KT* end = reinterpret_cast<KT*>(key_rows() + row * layout.rotated_stride + row_bytes);
      for (int i = 0; i < padding / static_cast<int>(sizeof(KT)); ++i) end[i] = from_float<KT>(0.0f);
    }
  }

  __device__ void load_query(const RowInfo& row, int slot, const uint64_t* turns) const {
    const T* from = static_cast<const T*>(args.q) + row.query * args.q_stride + row.head * args.head_dim;
    float* to = query_row(slot);
    for (int d = args.head_dim + lane; d < layout.query_stride / 4; d += 32) to[d] = 0.0f;
    if constexpr (kRope) {
      const int half = args.head_dim / 2;
      for (int d = lane; d < half; d += 32) {
        float a = to_float(from[d]), b = to_float(from[d + half]);
        rotate(Angle(turns[d] * static_cast<uint64_t>(row.end - 1)), a, b);
        to[d] = a;
        to[d + half] = b;
      }
    } else {
      for (int d = lane; d < args.head_dim; d += 32) to[d] = to_float(from[d]);
    }
  }

  // Keys of the tile that starts at position `first`, from where they were copied to where the scores read them.
  __device__ void rotate_keys(int64_t first, const uint64_t* turns) const {
    const int half = args.head_dim / 2;
    for (int d = lane; d < half; d += 32) {
      uint64_t angle = turns[d] * static_cast<uint64_t>(first + warp);
      const uint64_t step = turns[d] * kWarps;
#pragma unroll 1
      for (int key = warp; key < kKeys; key += kWarps, angle += step) {
        const T* from = reinterpret_cast<const T*>(shared + key * layout.key_stride);
        KT* to = reinterpret_cast<KT*>(key_rows() + key * layout.rotated_stride);
        float a = to_float(from[d]), b = to_float(from[d + half]);
        rotate(Angle(angle), a, b);
        to[d] = from_float<KT>(a);
        to[d + half] = from_float<KT>(b);
      }
    }
  }

  // Scores and weights of the warp's rows: weight_row(warp + kWarps * r)[key], and their state without the sums.
  template <int kRows>
  __device__ __forceinline__ void score(const int (&begin)[kWarpRows], const int (&end)[kWarpRows],
                                        State (&state)[kWarpRows]) const {
    constexpr int kVector = 16 / sizeof(KT);
    constexpr int kChains = sizeof(T) == 4 ? 4 : 2;  // shorter sums are more exact, which only float32 shows
    float dot[kRows][kLaneKeys][kChains] = {};
    const unsigned char* keys = key_rows() + lane * layout.rotated_stride;
    const int vectors = (args.head_dim + kVector - 1) / kVector;
#pragma unroll 1
    for (int i = 0; i < vectors; ++i) {
      float key[kLaneKeys][kVector];
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        load_floats<KT, kVector>(keys + k * 32 * layout.rotated_stride + i * 16, key[k]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float* query = query_row(warp + kWarps * r) + i * kVector;
#pragma unroll
        for (int d = 0; d < kVector; d += 4) {
          const float4 q = *reinterpret_cast<const float4*>(query + d);
#pragma unroll
          for (int k = 0; k < kLaneKeys; ++k) {
            dot[r][k][0] = __fmaf_rn(q.x, key[k][d], dot[r][k][0]);
            dot[r][k][1] = __fmaf_rn(q.y, key[k][d + 1], dot[r][k][1]);
            dot[r][k][2 % kChains] = __fmaf_rn(q.z, key[k][d + 2], dot[r][k][2 % kChains]);
            dot[r][k][3 % kChains] = __fmaf_rn(q.w, key[k][d + 3], dot[r][k][3 % kChains]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (begin[r] >= end[r]) continue;
      // The score is value * factor; the difference from the maximum is rounded once.
      const float factor = args.cap > 0.0f ? args.cap : args.scale;
      float values[kLaneKeys];
      float top = minus_infinity();
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        values[k] = __fadd_rn(dot[r][k][0], dot[r][k][1]);
        if constexpr (kChains == 4) values[k] = __fadd_rn(values[k], __fadd_rn(dot[r][k][2], dot[r][k][3]));
        if (args.cap > 0.0f) values[k] = tanhf(__fmul_rn(values[k], args.scale));
        const int key = lane + 32 * k;
        if (key >= begin[r] && key < end[r]) top = fmaxf(top, __fmul_rn(values[k], factor));
      }
      top = fmaxf(state[r].maximum, warp_max(top));
      const float subtracted = finite_or_zero(top);
      const float decay = exp2_fast(__fsub_rn(state[r].maximum, subtracted));  // 1 where the maximum stays
      float total = 0.0f;
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        const int key = lane + 32 * k;
        const bool seen = key >= begin[r] && key < end[r];
        const float weight = seen ? exp2_fast(__fmaf_rn(values[k], factor, -subtracted)) : 0.0f;
        weight_row(warp + kWarps * r)[key] = weight;
        total = __fadd_rn(total, weight);
      }
      state[r].maximum = top;
      state[r].weight = __fmaf_rn(state[r].weight, decay, warp_sum(total));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) state[r].sums[c] = __fmul_rn(state[r].sums[c], decay);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_value(int key, float (&value)[kColumns]) const {
    const T* row = reinterpret_cast<const T*>(shared + layout.values + key * layout.key_stride);
#pragma unroll
    for (int c = 0; c < kColumns / 4; ++c) load_floats<T, 4>(row + column(c), value + 4 * c);
  }

  // sums += weights @ values over the keys that each row sees, in ascending order. In float32 even and odd keys of a
  // tile are summed apart, from zero: the short sums are more exact.
  template <int kRows>
  __device__ __forceinline__ void add_values(const int (&begin)[kWarpRows], const int (&end)[kWarpRows], int num_rows,
                                             State (&state)[kWarpRows]) const {
    constexpr bool kApart = sizeof(T) == 4;
    float apart[kApart ? kRows : 1][2][kColumns] = {};
    const auto add = [&](int r, int parity, float weight, const float (&value)[kColumns]) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float& sum = kApart ? apart[kApart ? r : 0][parity][c] : state[r].sums[c];
        sum = __fmaf_rn(weight, value[c], sum);
      }
    };
    bool whole = true;
    int first = kKeys, last = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= num_rows) continue;
      whole = whole && begin[r] == 0 && end[r] == kKeys;
      if (begin[r] >= end[r]) continue;
      first = min(first, begin[r]);
      last = max(last, end[r]);
    }
    if (whole) {
#pragma unroll 2
      for (int key = 0; key < kKeys; key += 4) {
        float weights[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) load_floats<float, 4>(weight_row(warp + kWarps * r) + key, weights[r]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float value[kColumns];
          load_value(key + k, value);
#pragma unroll
          for (int r = 0; r < kRows; ++r) add(r, k % 2, weights[r][k], value);
        }
      }
    } else {
#pragma unroll 1
      for (int key = first & ~1; key < last; key += 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float value[kColumns];
          load_value(key + k, value);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (key + k < begin[r] || key + k >= end[r]) continue;
            add(r, k, weight_row(warp + kWarps * r)[key + k], value);
          }
        }
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (begin[r] >= end[r]) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          state[r].sums[c] = __fadd_rn(state[r].sums[c], __fadd_rn(apart[r][0][c], apart[r][1][c]));
        }
      }
    }
  }

  // Address of the key at `position`, null outside [begin, end).
  __device__ __forceinline__ const unsigned char* key_address(const SequencePages& pages, int64_t head_offset,
                                                              int64_t position, int64_t begin, int64_t end) const {
    if (position < begin || position >= end) return nullptr;
    TokenPlace place;
    if (((position | args.page_size) >> 32) == 0) {
      const uint32_t page = static_cast<uint32_t>(position) / static_cast<uint32_t>(args.page_size);
      place = {page, position - page * args.page_size};
    } else {
      place = token_place(position, args.page_size);
    }
    const int64_t address = args.kv_ptrs[pages.first_page + place.page];
    return reinterpret_cast<const unsigned char*>(address) + head_offset +
           place.slot * args.head_dim * static_cast<int64_t>(sizeof(T));
  }

  __device__ void store_output(const RowInfo& row, const State& state) const {
    T* to = static_cast<T*>(args.o) + row.query * args.o_stride + row.head * args.head_dim;
    const bool empty = row.begin >= row.end;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = c / 4 * 128 + 4 * lane + c % 4;
      if (d < args.head_dim) to[d] = from_float<T>(empty ? 0.0f : __fdiv_rn(state.sums[c], state.weight));
    }
    if (args.lse != nullptr && lane == 0) {
      args.lse[row.query * args.num_heads() + row.head] = empty ? minus_infinity() : state.log_sum();
    }
  }

  // Only what merge_kernel reads: D sums and the state.
  __device__ void store_partial(int64_t slot, const RowInfo& row, const State& state) const {
    const int64_t index = slot * args.num_heads() + row.head;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = c / 4 * 128 + 4 * lane + c % 4;
      if (d < args.head_dim) args.partial_sums[index * args.head_dim + d] = state.sums[c];
    }
    if (lane == 0) args.partial_states[index] = make_float2(state.maximum, state.weight);
  }
};

template <Arch kArch, class T, int kDim, bool kRope>
__global__ void __launch_bounds__(kAttentionThreads, kDim == 128 ? 3 : 2)
    attention_kernel(const __grid_constant__ AttentionArgs args,
                     const __grid_constant__ std::conditional_t<kRope, RopeTable, NoRope> rope) {
  if constexpr (kCompiled<kArch>) {
    using Attention = GeneralAttention<T, kDim, kRope>;
    using State = typename Attention::State;
    constexpr int kKeys = Attention::kKeys;
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    BlockShared& block = *reinterpret_cast<BlockShared*>(dynamic_shared);
    unsigned char* const shared = dynamic_shared + sizeof(BlockShared);
    auto& rows = block.rows;
    auto& key_rows = block.key_rows;
    uint64_t* const turns = block.turns;
    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();

    const Attention attention{
        args, SharedLayout(args.head_dim, static_cast<int>(sizeof(T)), kKeys, Attention::kRotates), shared};
    const int thread = threadIdx.x, warp = attention.warp;
    attention.clear_padding();
    if constexpr (kRope) {
      for (int d = thread; d < args.head_dim / 2; d += kAttentionThreads) turns[d] = rope.turns[d];
    }
    const bool decode = args.qo_indptr == nullptr;
    const int64_t parts = static_cast<int64_t>(args.num_kv_heads) * args.head_tiles;
    const int64_t grid = static_cast<int64_t>(gridDim.x);

    for (int64_t item = blockIdx.x;; item += grid) {
      const int64_t index = item / parts;
      const int part = static_cast<int>(item - index * parts);
      Work work = find_work(index, args.num_sequences, block.scratch, [&](int64_t i) {
        if (decode) return args.num_splits(args.pages(i).kv_len);
        return (args.num_queries(i) * args.group_size + kTileRows - 1) / kTileRows;
      });
      const bool whole = decode && work.total > args.num_slots;  // whole sequences: no room for partial results
      if (index >= (whole ? args.num_sequences : work.total)) break;
      if (whole) work = {index, 0, 0, 1, work.total};

      // The rows of the block, and what they see together.
      const SequencePages pages = args.pages(work.sequence);
      const int64_t q_len = args.num_queries(work.sequence);
      const int kv_head = decode ? part / args.head_tiles : part;
      // Late tiles of a prompt see the most keys: they start first.
      const int64_t tile = decode ? part - kv_head * args.head_tiles : work.count - 1 - work.local;
      const int64_t first_row = tile * kTileRows;
      const int64_t left = q_len * args.group_size - first_row;
      const int num_block_rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
      const int64_t first_position = pages.kv_len - q_len;
      const int64_t begin_all = args.first_key(first_position + first_row / args.group_size);
      const int64_t last = first_position + (first_row + num_block_rows - 1) / args.group_size;
      int64_t begin = begin_all, end = last + 1 > 0 && pages.kv_len > 0 ? last + 1 : 0;
      const bool partial = decode && work.count > 1;
      if (partial) {
        const int64_t split = begin_all / kSplitTokens + work.local;
        begin = begin > split * kSplitTokens ? begin : split * kSplitTokens;
        end = end < (split + 1) * kSplitTokens ? end : (split + 1) * kSplitTokens;
      }
      if (thread < num_block_rows) {
        const int64_t query = (first_row + thread) / args.group_size, position = first_position + query;
        const bool sees = position >= 0 && pages.kv_len > 0;
        rows[thread] = {sees ? args.first_key(position) : 0, sees ? position + 1 : 0,
                        args.row_begin(work.sequence) + query,
                        kv_head * static_cast<int64_t>(args.group_size) + (first_row + thread) % args.group_size};
      }
      const int64_t head_offset = args.key_bytes + kv_head * args.head_bytes;
      const int64_t first_tile = begin / kKeys * kKeys;
      if (thread < kKeys) {
        key_rows[0][thread] = attention.key_address(pages, head_offset, first_tile + thread, begin, end);
      }
      __syncthreads();
      const int row_bytes = args.head_dim * static_cast<int>(sizeof(T));
      copy_tile(shared, attention.layout.key_stride, kKeys, key_rows[0], 0, row_bytes);

      const int num_rows = (num_block_rows - warp + kWarps - 1) / kWarps;  // of this warp: warp, warp + kWarps, ...
      State total[kWarpRows], state[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        total[r].clear();
        state[r].clear();
        if (r < num_rows) attention.load_query(rows[warp + kWarps * r], warp + kWarps * r, turns);
      }
      int current = 0;
      for (int64_t first = first_tile; first < end; first += kKeys, current ^= 1) {
        wait_copies();
        __syncthreads();  // the keys are here, and nobody reads the values of the tile before
        const unsigned char* next_row = nullptr;
        if (thread < kKeys) {
          next_row = attention.key_address(pages, head_offset, first + kKeys + thread, begin, end);
        }
        copy_tile(shared + attention.layout.values, attention.layout.key_stride, kKeys, key_rows[current],
                  args.value_bytes, row_bytes);
        if constexpr (kRope) {
          attention.rotate_keys(first, turns);
          __syncthreads();
        }
        int seen_begin[kWarpRows], seen_end[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          seen_begin[r] = seen_end[r] = 0;
          if (r >= num_rows) continue;
          const RowInfo& row = rows[warp + kWarps * r];
          if (row.begin < first + kKeys && row.end > first) {
            seen_begin[r] = row.begin > first ? static_cast<int>(row.begin - first) : 0;
            seen_end[r] = row.end < first + kKeys ? static_cast<int>(row.end - first) : kKeys;
          }
        }
        if (num_rows == 1) {
          attention.template score<1>(seen_begin, seen_end, state);
        } else if (num_rows > 1) {
          attention.template score<kWarpRows>(seen_begin, seen_end, state);
        }
        if (thread < kKeys) key_rows[current ^ 1][thread] = next_row;
        wait_copies();
        __syncthreads();  // the values are here, and nobody reads the keys
        if (first + kKeys < end) {
          copy_tile(shared, attention.layout.key_stride, kKeys, key_rows[current ^ 1], 0, row_bytes);
        }
        if (num_rows == 1) {
          attention.template add_values<1>(seen_begin, seen_end, num_rows, state);
        } else if (num_rows > 1) {
          attention.template add_values<kWarpRows>(seen_begin, seen_end, num_rows, state);
        }
        if ((first + kKeys) % kSplitTokens == 0 || first + kKeys >= end) {
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            total[r].merge(state[r]);
            state[r].clear();
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        if (r >= num_rows) continue;
        const RowInfo& row = rows[warp + kWarps * r];
        if (partial) {
          attention.store_partial(work.first + work.local, row, total[r]);
        } else {
          attention.store_output(row, total[r]);
        }
      }
      __syncthreads();  // the next item writes what this one reads
    }
  }
}

}  // namespace punica::cuda
