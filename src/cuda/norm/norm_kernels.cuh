// Root-mean-square normalisation of rows: the kernels. norm.cu chooses among them.
//
// A row is divided into chunks of 16 bytes; thread t of the kThreads that share a row has the chunks t, t + kThreads,
// and so on. That division, and so every bit of the result, is a function of the number of columns alone. One kernel
// keeps the row in registers and reads it once, with 16-byte loads; the other takes what does not fit, or is not
// aligned, and reads it twice. Both do the same arithmetic in the same order.
#pragma once

#include <cstdint>

#include "src/cuda/common/device.cuh"

namespace punica::cuda::norm {

struct Args {
  void* output;
  const void* input;
  const void* weight;
  void* residual;                                        // nullptr: none
  int64_t output_stride, input_stride, residual_stride;  // elements between rows
  int64_t rows;
  int64_t columns;
  float inverse_columns;
  float epsilon;
};

// Rows of one warp have a block of several such rows.
inline constexpr int kMinBlock = 128;

// When a block asks for the weight. The arithmetic is the same.
enum class Weight { kWithRow, kAfterRow, kAfterSum };

// So few blocks that one row's chain of load, sum and store is all there is to wait for.
inline constexpr unsigned kFewBlocks = 16;
inline constexpr int64_t kFewRows = 16;  // of a block each, in rms_norm_few_rows

// 16 bytes of a row: kSize elements as they lie in memory.
template <class T>
struct Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4];

  __device__ __forceinline__ void unpack(float (&values)[kSize]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPerWord == 1) {
        values[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        values[2 * i] = two.x;
        values[2 * i + 1] = two.y;
      } else {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPerWord == 1) {
        words[i] = __float_as_uint(values[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 two = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&two);
      } else {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&two);
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = 0;
  }
};

// How a chunk travels. None of the loads takes the read-only path: what the kernel before wrote must be seen.
enum class Access {
  kCached,     // the weight, which every row reads
  kOnce,       // past the first-level cache
  kStreaming,  // and the first to leave the second-level cache: for tensors larger than that
};

// Predicated, so that a thread's loads stand in a row without branches. All zeros where not `wanted`.
template <Access kAccess, class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* from, bool wanted = true) {
  Chunk<T> c;
#define PUNICA_LOAD(instruction)                                                   \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"                                  \
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"           \
      "@p " instruction ".v4.u32 {%0, %1, %2, %3}, [%4];\n}"                       \
      : "=&r"(c.words[0]), "=&r"(c.words[1]), "=&r"(c.words[2]), "=&r"(c.words[3]) \
      : "l"(from), "r"(static_cast<int>(wanted))                                   \
      : "memory")
  if constexpr (kAccess == Access::kCached) {
    PUNICA_LOAD("ld.global");
  } else if constexpr (kAccess == Access::kOnce) {
    PUNICA_LOAD("ld.global.L1::no_allocate");
  } else {
    PUNICA_LOAD("ld.global.cs");
  }
#undef PUNICA_LOAD
  return c;
}

template <Access kAccess, class T>
__device__ __forceinline__ void store_chunk(T* to, const Chunk<T>& c, bool wanted = true) {
#define PUNICA_STORE(instruction)                                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p " instruction                                        \
               ".v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),                                                   \
               "r"(c.words[0]), "r"(c.words[1]), "r"(c.words[2]), "r"(c.words[3]), "r"(static_cast<int>(wanted)) \
               : "memory")
  if constexpr (kAccess == Access::kStreaming) {
    PUNICA_STORE("st.global.cs");
  } else {
    PUNICA_STORE("st.global");
  }
#undef PUNICA_STORE
}

// The same element by element; those from `count` on are zeros.
template <class T>
__device__ __forceinline__ Chunk<T> load_elements(const T* from, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const Bits* bits = reinterpret_cast<const Bits*>(from);
  Chunk<T> c;
  c.clear();
#pragma unroll
  for (int e = 0; e < Chunk<T>::kSize; ++e) {
    if (e < count) c.words[e / Chunk<T>::kPerWord] |= uint32_t{bits[e]} << (e % Chunk<T>::kPerWord * 16);
  }
  return c;
}

template <class T>
__device__ __forceinline__ void store_elements(T* to, const Chunk<T>& c, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Bits* bits = reinterpret_cast<Bits*>(to);
#pragma unroll
  for (int e = 0; e < Chunk<T>::kSize; ++e) {
    if (e < count) bits[e] = static_cast<Bits>(c.words[e / Chunk<T>::kPerWord] >> (e % Chunk<T>::kPerWord * 16));
  }
}

// a + b, rounded to T.
template <class T>
__device__ __forceinline__ Chunk<T> add(const Chunk<T>& a, const Chunk<T>& b) {
  float x[Chunk<T>::kSize], y[Chunk<T>::kSize];
  a.unpack(x);
  b.unpack(y);
#pragma unroll
  for (int e = 0; e < Chunk<T>::kSize; ++e) x[e] += y[e];
  Chunk<T> sum;
  sum.pack(x);
  return sum;
}

// The squares of a thread's chunks, in four sums: that many elements of a thread at most are added one after another.
struct Squares {
  float sums[4] = {0, 0, 0, 0};

  template <class T>
  __device__ __forceinline__ void add(const Chunk<T>& c) {
    float x[Chunk<T>::kSize];
    c.unpack(x);
#pragma unroll
    for (int e = 0; e < Chunk<T>::kSize; ++e) sums[e % 4] = fmaf(x[e], x[e], sums[e % 4]);
  }

  __device__ __forceinline__ float total() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};

// Each warp's part of a row's sum, in shared memory.
struct alignas(16) Partial {
  float of_warp[32];

  __device__ __forceinline__ float sum_of_four(int first) const {
    const float4 p = *reinterpret_cast<const float4*>(&of_warp[first]);
    return (p.x + p.y) + (p.z + p.w);
  }
};

// The sum over the `num_warps` warps of a row (1, 4, 8 or more), in every thread of them. All threads of the block call
// it. Nothing waits for it but the row's end, in a chain of small rows a third of all time: hence the short trees.
__device__ __forceinline__ float row_sum(float value, int num_warps, Partial& partial) {
  value = warp_sum(value);
  if (num_warps == 1) return value;
  if (threadIdx.x % 32 == 0) partial.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (num_warps > 8) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return warp_sum(lane < num_warps ? partial.of_warp[lane] : 0.0f);
  }
  const float sum = partial.sum_of_four(0);
  return num_warps == 4 ? sum : sum + partial.sum_of_four(4);
}

// Two units in the last place at most from the rounded root (CUDA's bound for rsqrtf): a correctly rounded root and a
// division cost as much as the sum.
__device__ __forceinline__ float scale_of(float sum, const Args& args) {
  return rsqrtf(fmaf(sum, args.inverse_columns, args.epsilon));
}

template <class T>
__device__ __forceinline__ Chunk<T> normalised(const Chunk<T>& c, const Chunk<T>& weight, float scale) {
  float x[Chunk<T>::kSize], w[Chunk<T>::kSize];
  c.unpack(x);
  weight.unpack(w);
#pragma unroll
  for (int e = 0; e < Chunk<T>::kSize; ++e) x[e] = x[e] * scale * w[e];
  Chunk<T> result;
  result.pack(x);
  return result;
}

// Blocks that must fit on a multiprocessor, or 0. Measured on an H200: 256 rows of two chunks a thread lose a sixth
// where only four blocks of 256 threads fit, for the next kernels' blocks then start later; more than five cost
// spilling.
constexpr int min_blocks(int threads, int chunks, bool streaming) {
  if (threads < kMinBlock) return 0;
  if (streaming) return chunks == 4 ? 1024 / threads : 0;
  return chunks == 2 ? 1280 / threads : 0;
}

// Rows of at most kThreads * kChunks chunks, all full and aligned. One row a block, or one a warp. With kStreaming many
// blocks hide each other's latency: registers are for rows in flight, so the weight is read when it is wanted, from
// the first-level cache mostly. Without, the weight is asked for together with the row; or, where few blocks run, as
// soon as the row is there, so that it does not stand in the row's way.
template <Arch kArch, class T, int kThreads, int kChunks, bool kStreaming>
__global__ void __launch_bounds__(kThreads < kMinBlock ? kMinBlock : kThreads,
                                  min_blocks(kThreads, kChunks, kStreaming))
    rms_norm_in_registers(const __grid_constant__ Args args) {
  if constexpr (kCompiled<kArch>) {
    static_assert(kThreads == 32 || kThreads >= kMinBlock, "a row has one warp, or the whole block");
    constexpr int kRowsPerBlock = kThreads < kMinBlock ? kMinBlock / kThreads : 1;
    constexpr int kSize = Chunk<T>::kSize;
    constexpr Access kRows = kStreaming ? Access::kStreaming : Access::kOnce;
    constexpr int kBatch = kChunks < 4 ? kChunks : 4;
    static_assert(kChunks % kBatch == 0);
    __shared__ Partial partial[2];

    launch_dependents<kArch>();
    const int thread = static_cast<int>(threadIdx.x) % kThreads;
    const int num_chunks = static_cast<int>(args.columns / kSize);
    const auto has = [&](int i) { return thread + i * kThreads < num_chunks; };
    const T* const weight_of_thread = static_cast<const T*>(args.weight) + thread * kSize;
    Chunk<T> weight[kChunks];
    const auto load_weight = [&](bool wanted = true) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        weight[i] = load_chunk<Access::kCached>(weight_of_thread + i * kThreads * kSize, wanted && has(i));
      }
    };
    int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
    if constexpr (!kStreaming) {
      if (thread % (kLineBytes / 16) == 0 && row < args.rows) {
        // One line of the output: its address is then translated when the stores come.
        if (thread == 0) prefetch_line(static_cast<const T*>(args.output) + row * args.output_stride);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          if (!has(i)) break;
          const int64_t element = (thread + i * kThreads) * kSize;
          prefetch_line(static_cast<const T*>(args.input) + row * args.input_stride + element);
          if (args.residual != nullptr) {
            prefetch_line(static_cast<const T*>(args.residual) + row * args.residual_stride + element);
          }
          prefetch_line(static_cast<const T*>(args.weight) + element);
        }
      }
    }
    const auto do_rows = [&](auto when) {
      constexpr Weight kWeight = decltype(when)::value;
      grid_dependency_wait<kArch>();
      bool again = false;
      // More than one turn only where the rows outnumber the largest grid. `row` is the same in all of a block's
      // threads where they meet in __syncthreads; two buffers, for a thread may be one turn ahead of another.
      for (; row < args.rows; row += static_cast<int64_t>(gridDim.x) * kRowsPerBlock, again = !again) {
        const T* const input = static_cast<const T*>(args.input) + row * args.input_stride + thread * kSize;
        Chunk<T> x[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          x[i] = load_chunk<kRows>(input + i * kThreads * kSize, has(i));
        }
        if constexpr (kWeight == Weight::kWithRow) load_weight();
        if (args.residual != nullptr) {
          T* const residual = static_cast<T*>(args.residual) + row * args.residual_stride + thread * kSize;
#pragma unroll
          for (int first = 0; first < kChunks; first += kBatch) {
            Chunk<T> old[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              old[i] = load_chunk<kRows>(residual + (first + i) * kThreads * kSize, has(first + i));
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              x[first + i] = add(x[first + i], old[i]);
              store_chunk<kRows>(residual + (first + i) * kThreads * kSize, x[first + i], has(first + i));
            }
          }
        }
        Squares squares;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) squares.add(x[i]);
        const float squared = squares.total();
        // Always wanted, but the compiler must think that it depends on the row.
        if constexpr (kWeight == Weight::kAfterRow) load_weight(!(squared < 0.0f));
        const float scale = scale_of(row_sum(squared, kThreads / 32, partial[again]), args);

        if constexpr (kWeight == Weight::kAfterSum) load_weight();
        T* const output = static_cast<T*>(args.output) + row * args.output_stride + thread * kSize;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          store_chunk<kRows>(output + i * kThreads * kSize, normalised(x[i], weight[i], scale), has(i));
        }
      }
    };
    using When = std::conditional_t<kStreaming, std::integral_constant<Weight, Weight::kAfterSum>,
                                    std::integral_constant<Weight, Weight::kWithRow>>;
    if constexpr (!kStreaming && kThreads < 1024) {  // 1024 threads have no registers left
      if (gridDim.x <= kFewBlocks) return do_rows(std::integral_constant<Weight, Weight::kAfterRow>{});
    }
    do_rows(When{});
  }
}

// row_sum() with the last addition of a warp's sum left to the readers: the same sum, a step of the warp's tree
// earlier.
struct alignas(16) PairedPartial {
  float terms[64];  // two of each warp

  // Of warps `warp` (even) and the next one.
  __device__ __forceinline__ float sum_of_two(int warp) const {
    const float4 p = *reinterpret_cast<const float4*>(&terms[2 * warp]);
    return (p.x + p.y) + (p.z + p.w);
  }
};

// Over 4, 8 or 16 warps.
__device__ __forceinline__ float paired_row_sum(float value, int num_warps, PairedPartial& partial) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int other = 16; other > 1; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  if (lane < 2) partial.terms[2 * warp + lane] = value;
  __syncthreads();
  if (num_warps > 8) {
    const float2 p = *reinterpret_cast<const float2*>(&partial.terms[2 * lane]);
    return warp_sum(lane < num_warps ? p.x + p.y : 0.0f);
  }
  const float sum = partial.sum_of_two(0) + partial.sum_of_two(2);
  return num_warps == 4 ? sum : sum + (partial.sum_of_two(4) + partial.sum_of_two(6));
}

// scale_of() without what rsqrtf does for denormal numbers.
__device__ __forceinline__ float normal_scale_of(float sum, const Args& args) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fmaf(sum, args.inverse_columns, args.epsilon)));
  return root;
}

// At most kFewRows rows, one a block, and an epsilon that is no denormal number. The same arithmetic, bit for bit; what
// is after the wait is as little code as can be, for that is all there is to wait for in a chain of such calls. The
// weight is asked for right behind the row: later, it would come after the row's sum. Blocks have a multiprocessor
// each: told so, the compiler spends the registers that it takes to ask for the sum's terms at once.
template <Arch kArch, class T, int kThreads, int kChunks, bool kResidual>
__global__ void __launch_bounds__(kThreads, 1) rms_norm_few_rows(const __grid_constant__ Args args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kSize = Chunk<T>::kSize;
    __shared__ PairedPartial partial;

    launch_dependents<kArch>();
    const int thread = static_cast<int>(threadIdx.x);
    const int num_chunks = static_cast<int>(args.columns / kSize);
    const auto has = [&](int i) { return thread + i * kThreads < num_chunks; };
    const int64_t row = blockIdx.x;
    const T* const input = static_cast<const T*>(args.input) + row * args.input_stride + thread * kSize;
    T* const residual = static_cast<T*>(args.residual) + (kResidual ? row * args.residual_stride + thread * kSize : 0);
    const T* const weight_of_thread = static_cast<const T*>(args.weight) + thread * kSize;
    T* const output = static_cast<T*>(args.output) + row * args.output_stride + thread * kSize;
    if (thread % (kLineBytes / 16) == 0) {
      // One line of the output: its address is then translated when the stores come.
      if (thread == 0) prefetch_line(output);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (!has(i)) break;
        prefetch_line(input + i * kThreads * kSize);
        if constexpr (kResidual) prefetch_line(residual + i * kThreads * kSize);
        prefetch_line(weight_of_thread + i * kThreads * kSize);
      }
    }
    grid_dependency_wait<kArch>();
    Chunk<T> x[kChunks], old[kResidual ? kChunks : 1], weight[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      x[i] = load_chunk<Access::kOnce>(input + i * kThreads * kSize, has(i));
      if constexpr (kResidual) old[i] = load_chunk<Access::kOnce>(residual + i * kThreads * kSize, has(i));
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      weight[i] = load_chunk<Access::kCached>(weight_of_thread + i * kThreads * kSize, has(i));
    }
    Squares squares;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if constexpr (kResidual) {
        x[i] = add(x[i], old[i]);
        store_chunk<Access::kOnce>(residual + i * kThreads * kSize, x[i], has(i));
      }
      squares.add(x[i]);
    }
    const float scale = normal_scale_of(paired_row_sum(squares.total(), kThreads / 32, partial), args);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      store_chunk<Access::kOnce>(output + i * kThreads * kSize, normalised(x[i], weight[i], scale), has(i));
    }
  }
}

// Any row: one a block, blockDim.x threads. A thread reads again what it alone read or wrote before.
template <Arch kArch, class T, bool kVector>
__global__ void __launch_bounds__(1024) rms_norm_in_two_passes(const __grid_constant__ Args args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kSize = Chunk<T>::kSize;
    __shared__ Partial partial[2];

    launch_dependents<kArch>();
    grid_dependency_wait<kArch>();
    const T* const weight = static_cast<const T*>(args.weight);
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize, step = static_cast<int64_t>(blockDim.x) * kSize;
    const auto read = [&](const T* from, int64_t c) {
      if constexpr (kVector) return load_chunk<Access::kCached>(from + c);
      return load_elements(from + c, args.columns - c);
    };
    const auto write = [&](T* to, int64_t c, const Chunk<T>& chunk) {
      if constexpr (kVector) {
        store_chunk<Access::kCached>(to + c, chunk);
      } else {
        store_elements(to + c, chunk, args.columns - c);
      }
    };
    bool again = false;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x, again = !again) {
      const T* const input = static_cast<const T*>(args.input) + row * args.input_stride;
      T* const output = static_cast<T*>(args.output) + row * args.output_stride;
      T* const residual =
          args.residual == nullptr ? nullptr : static_cast<T*>(args.residual) + row * args.residual_stride;
      Squares squares;
      if (residual == nullptr) {
#pragma unroll 4
        for (int64_t c = first; c < args.columns; c += step) squares.add(read(input, c));
      } else {
        for (int64_t c = first; c < args.columns; c += step) {
          const Chunk<T> sum = add(read(input, c), read(residual, c));
          write(residual, c, sum);
          squares.add(sum);
        }
      }
      const float scale = scale_of(row_sum(squares.total(), static_cast<int>(blockDim.x) / 32, partial[again]), args);
      const T* const x = residual == nullptr ? input : residual;
      for (int64_t c = first; c < args.columns; c += step) {
        write(output, c, normalised(read(x, c), read(weight, c), scale));
      }
    }
  }
}

}  // namespace punica::cuda::norm
