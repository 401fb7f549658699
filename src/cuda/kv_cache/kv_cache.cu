// init_kv and append_kv on CUDA devices: copies of rows of k and v to their places in the paged cache, in one pass.
//
// init_kv: a block takes a few tokens. It finds the sequence of each (every thread compares some entries of
// seqlen_indptr with the block's rows, so that no table, however malformed, makes a row miss its sequence), then the
// place of each in its page, then copies. Source rows are loaded before the places are known, all of a thread's loads
// before its first store. The copy knows no data type, only the widest access that every row allows.
#include <algorithm>
#include <cstdint>
#include <string>

#include "src/cuda/backend.h"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlockTokens = 64;

// Sizes and strides of the copy are in bytes.
struct KvWriteArgs {
  const int64_t* kv_ptrs;
  const int32_t* kv_indptr;
  const int32_t* last_page_offset;
  const int32_t* seqlen_indptr;  // null in append_kv: row i is the newest token of sequence i
  const unsigned char* k;
  const unsigned char* v;
  int64_t k_stride, v_stride;  // from one row to the next
  int64_t num_rows, num_sequences, num_page_ptrs, page_size;
  int64_t key_offset, value_offset;  // from the page to head 0
  int64_t head_stride;               // in the page
  int64_t head_bytes;                // of one head of one token
  int64_t row_vectors;               // accesses of all heads of one token
  int32_t head_vectors;              // accesses of one head of one token
  bool early_reads;
};

__device__ __forceinline__ int64_t clamp_row(int64_t row, int64_t num_rows) {
  return row < 0 ? 0 : (row > num_rows ? num_rows : row);
}

// Where the row belongs: the address of its slot in head 0 without key_offset or value_offset. Null: nowhere.
__device__ unsigned char* place_of(const KvWriteArgs& args, int64_t row, int64_t sequence) {
  if (sequence < 0) return nullptr;
  const SequencePages pages = sequence_pages(args.kv_indptr[sequence], args.kv_indptr[sequence + 1],
                                             args.last_page_offset[sequence], args.num_page_ptrs, args.page_size);
  int64_t after = 1;  // rows of the sequence from this one to the last
  if (args.seqlen_indptr != nullptr) after = clamp_row(args.seqlen_indptr[sequence + 1], args.num_rows) - row;
  const int64_t position = pages.kv_len - after;
  if (position < 0) return nullptr;
  const TokenPlace place = token_place(position, args.page_size);
  return reinterpret_cast<unsigned char*>(args.kv_ptrs[pages.first_page + place.page]) + place.slot * args.head_bytes;
}

// blockDim.x threads side by side copy a row, kTokens rows each thread, of k and of v. V is the type of one access.
template <Arch kArch, class V, int kTokens>
__global__ void __launch_bounds__(kThreads) kv_write_kernel(const __grid_constant__ KvWriteArgs args) {
  if constexpr (kCompiled<kArch>) {
    __shared__ int sequences[kMaxBlockTokens];
    __shared__ unsigned char* places[kMaxBlockTokens];
    launch_dependents<kArch>();
    if (!args.early_reads) grid_dependency_wait<kArch>();

    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int num_threads = blockDim.x * blockDim.y;
    const int tokens = kTokens * blockDim.y;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * tokens;
    for (int t = thread; t < tokens; t += num_threads) sequences[t] = -1;
    __syncthreads();
    for (int64_t i = thread; i < args.num_sequences; i += num_threads) {
      const int64_t begin = clamp_row(args.seqlen_indptr[i], args.num_rows) - first;
      const int64_t end = clamp_row(args.seqlen_indptr[i + 1], args.num_rows) - first;
      const int last = static_cast<int>(end < tokens ? end : tokens);
      // Of sequences that overlap, which a valid table has not, the last one has the row.
      for (int t = begin > 0 ? static_cast<int>(begin < tokens ? begin : tokens) : 0; t < last; ++t) {
        atomicMax(&sequences[t], static_cast<int>(i));
      }
    }
    __syncthreads();
    // Only the first threads wait for these loads here. The loads of rows of all others are under way meanwhile.
    for (int t = thread; t < tokens; t += num_threads) places[t] = place_of(args, first + t, sequences[t]);
    if (args.early_reads) grid_dependency_wait<kArch>();

    for (int64_t e = threadIdx.x; e == threadIdx.x || e - threadIdx.x < args.row_vectors; e += blockDim.x) {
      const bool inside = e < args.row_vectors;
      V key[kTokens], value[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int64_t row = first + i * blockDim.y + threadIdx.y;
        if (!inside || row >= args.num_rows) continue;
        key[i] = *reinterpret_cast<const V*>(args.k + row * args.k_stride + e * static_cast<int64_t>(sizeof(V)));
        value[i] = *reinterpret_cast<const V*>(args.v + row * args.v_stride + e * static_cast<int64_t>(sizeof(V)));
      }
      if (e == threadIdx.x) __syncthreads();  // every thread comes here exactly once
      if (!inside) continue;
      int64_t head, vector;
      if (args.row_vectors <= INT32_MAX) {
        head = static_cast<uint32_t>(e) / static_cast<uint32_t>(args.head_vectors);
      } else {
        head = e / args.head_vectors;
      }
      vector = e - head * args.head_vectors;
      const int64_t offset = head * args.head_stride + vector * static_cast<int64_t>(sizeof(V));
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int t = i * blockDim.y + threadIdx.y;
        unsigned char* place = places[t];
        if (first + t >= args.num_rows || place == nullptr) continue;
        *reinterpret_cast<V*>(place + args.key_offset + offset) = key[i];
        *reinterpret_cast<V*>(place + args.value_offset + offset) = value[i];
      }
    }
  }
}

// Where the newest token of a sequence belongs, as place_of() has it: the last slot in use of the last page.
__device__ __forceinline__ unsigned char* newest_place(const KvWriteArgs& args, int64_t sequence) {
  const int32_t begin = args.kv_indptr[sequence], end = args.kv_indptr[sequence + 1];
  const int32_t last = args.last_page_offset[sequence];
  // Entries of the tables have 32 bits.
  const int32_t limit = static_cast<int32_t>(min(args.num_page_ptrs, int64_t{INT32_MAX}));
  const int32_t page_size = static_cast<int32_t>(min(args.page_size, int64_t{INT32_MAX}));
  const int32_t behind = min(end, limit);
  if (behind <= max(begin, 0) || last < 1 || last > page_size) return nullptr;
  return reinterpret_cast<unsigned char*>(args.kv_ptrs[behind - 1]) + (last - 1) * args.head_bytes;
}

// An access that stays where it is: the compiler moves others to where what they bring is used.
template <class V>
__device__ __forceinline__ V load_here(const unsigned char* from) {
  V value;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
  } else {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(from));
  }
  return value;
}

// append_kv: row i is the newest token of sequence i. A decode step is short, so every thread finds the place of its
// row by itself, side by side with the loads of the row, instead of waiting for others to find it; and what needs no
// memory that others write is computed before the wait.
template <Arch kArch, class V>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const __grid_constant__ KvWriteArgs args) {
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool there = row < args.num_rows, inside = there && threadIdx.x < args.row_vectors;
    const auto offset_of = [&](int64_t e) {
      const int64_t head =
          e <= UINT32_MAX ? static_cast<uint32_t>(e) / static_cast<uint32_t>(args.head_vectors) : e / args.head_vectors;
      return args.key_offset + head * args.head_stride +
             (e - head * args.head_vectors) * static_cast<int64_t>(sizeof(V));
    };
    const unsigned char* k = args.k + row * args.k_stride + threadIdx.x * static_cast<int64_t>(sizeof(V));
    const unsigned char* v = args.v + row * args.v_stride + threadIdx.x * static_cast<int64_t>(sizeof(V));
    int64_t to = offset_of(threadIdx.x);
    const int64_t to_value = args.value_offset - args.key_offset;
    if constexpr (kArch == Arch::kSm90) {
      // Rows and tables are on their way into the second-level cache while this waits.
      if (inside && threadIdx.x * sizeof(V) % kLineBytes == 0) {
        prefetch_line(k);
        prefetch_line(v);
      }
      const int64_t line = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.y * blockDim.x + threadIdx.x;
      if (!args.early_reads && line * (kLineBytes / 8) < args.num_page_ptrs) {
        prefetch_line(args.kv_ptrs + line * (kLineBytes / 8));
      }
      if (!args.early_reads && there && threadIdx.x == 0) {
        prefetch_line(args.kv_indptr + row);
        prefetch_line(args.last_page_offset + row);
      }
    }
    unsigned char* place = there && args.early_reads ? newest_place(args, row) : nullptr;
    asm volatile("" : "+l"(k), "+l"(v), "+l"(to), "+l"(place));  // the compiler would compute them after the wait
    grid_dependency_wait<kArch>();
    if (!inside) return;
    const V key = load_here<V>(k), value = load_here<V>(v);
    if (!args.early_reads) place = newest_place(args, row);
    if (place == nullptr) return;
    *reinterpret_cast<V*>(place + to) = key;
    *reinterpret_cast<V*>(place + to + to_value) = value;
    // Of longer rows the rest.
#pragma unroll 1
    for (int64_t e = threadIdx.x + blockDim.x; e < args.row_vectors; e += blockDim.x) {
      const int64_t from = (e - threadIdx.x) * static_cast<int64_t>(sizeof(V));
      unsigned char* const its_place = place + offset_of(e);
      *reinterpret_cast<V*>(its_place) = *reinterpret_cast<const V*>(k + from);
      *reinterpret_cast<V*>(its_place + to_value) = *reinterpret_cast<const V*>(v + from);
    }
  }
}

template <class V, int kTokens>
Status launch_write(const Launcher& launcher, KvWriteArgs args) {
  constexpr int64_t kWarp = 32;
  args.head_vectors = static_cast<int32_t>(args.head_bytes / static_cast<int64_t>(sizeof(V)));
  args.row_vectors *= args.head_vectors;  // num_kv_heads until now
  LaunchShape shape;
  shape.block.x = static_cast<unsigned>(std::min<int64_t>((args.row_vectors + kWarp - 1) / kWarp * kWarp, kThreads));
  shape.block.y = kThreads / shape.block.x;
  const int64_t tokens = kTokens * static_cast<int64_t>(shape.block.y);
  const int64_t blocks = (args.num_rows + tokens - 1) / tokens;
  if (blocks > INT32_MAX) {
    return {StatusCode::kUnsupported, std::string(launcher.op()) + ": at most " + std::to_string(INT32_MAX * tokens) +
                                          " rows a call, got " + std::to_string(args.num_rows)};
  }
  shape.grid.x = static_cast<unsigned>(blocks);
  static_assert(kTokens * kThreads / kWarp <= kMaxBlockTokens);
  if constexpr (kTokens == 1) {
    if (launcher.arch == Arch::kSm90) return launcher.launch<kv_append_kernel<Arch::kSm90, V>>(shape, args);
    return launcher.launch<kv_append_kernel<Arch::kSm80, V>>(shape, args);
  } else {
    if (launcher.arch == Arch::kSm90) return launcher.launch<kv_write_kernel<Arch::kSm90, V, kTokens>>(shape, args);
    return launcher.launch<kv_write_kernel<Arch::kSm80, V, kTokens>>(shape, args);
  }
}

template <int kTokens>
Status write(const char* op, const PagedKv& kv, const TensorView& k, const TensorView& v, const int32_t* seqlen_indptr,
             const Context& context) {
  if (k.numel() == 0 || kv.num_sequences() == 0) return {};
  const PageShape shape = kv.page_shape(k.shape[2]);
  const int64_t item = static_cast<int64_t>(dtype_size(k.dtype));
  KvWriteArgs args;
  args.kv_ptrs = kv.kv_ptrs.as<const int64_t>();
  args.kv_indptr = kv.kv_indptr.as<const int32_t>();
  args.last_page_offset = kv.last_page_offset.as<const int32_t>();
  args.seqlen_indptr = seqlen_indptr;
  args.k = k.as<const unsigned char>();
  args.v = v.as<const unsigned char>();
  // The stride of a single row may hold anything.
  args.k_stride = k.shape[0] > 1 ? k.stride[0] * item : 0;
  args.v_stride = v.shape[0] > 1 ? v.stride[0] * item : 0;
  args.num_rows = k.shape[0];
  args.num_sequences = kv.num_sequences();
  args.num_page_ptrs = kv.kv_ptrs.shape[0];
  args.page_size = kv.page_size;
  args.key_offset = shape.head_offset(kv.layer_idx, KvPart::kKey, 0) * item;
  args.value_offset = shape.head_offset(kv.layer_idx, KvPart::kValue, 0) * item;
  args.head_stride = shape.page_size * shape.head_dim * item;
  args.head_bytes = shape.head_dim * item;
  args.row_vectors = kv.num_kv_heads;
  args.head_vectors = 0;
  // Pages are aligned to 16 bytes; a slot is where its head_bytes put it.
  const uint64_t bits = reinterpret_cast<uint64_t>(args.k) | reinterpret_cast<uint64_t>(args.v) |
                        static_cast<uint64_t>(args.k_stride | args.v_stride | args.head_bytes);
  return on_device(op, k.device, context, [&](const Launcher& launcher) {
    args.early_reads = launcher.early_reads;
    if (bits % 16 == 0) return launch_write<uint4, kTokens>(launcher, args);
    if (bits % 8 == 0) return launch_write<uint2, kTokens>(launcher, args);
    if (bits % 4 == 0) return launch_write<uint32_t, kTokens>(launcher, args);
    return launch_write<uint16_t, kTokens>(launcher, args);
  });
}

}  // namespace

Status init_kv(const InitKvParams& params, const Context& context) {
  return write<4>("init_kv", params.kv, params.k, params.v, params.seqlen_indptr.as<const int32_t>(), context);
}

// One row a thread: a decode step has few rows, which should reach every multiprocessor.
Status append_kv(const AppendKvParams& params, const Context& context) {
  return write<1>("append_kv", params.kv, params.k, params.v, nullptr, context);
}

}  // namespace punica::cuda
