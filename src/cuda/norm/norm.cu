// Root-mean-square normalisation on CUDA devices: which kernel of norm_kernels.cuh runs.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "src/cuda/backend.h"
#include "src/cuda/common/launch.h"
#include "src/cuda/norm/norm_kernels.cuh"

namespace punica::cuda {
namespace {

using norm::Args;
using norm::Chunk;
using norm::kMinBlock;

// Bytes moved from which on a call is larger than the second-level caches, so that nothing it leaves there is found.
constexpr int64_t kStreamingBytes = 64 << 20;

unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

// How a row is shared: by kThreads threads, with kChunks chunks of 16 bytes each in registers.
template <int kThreadsOfRow, int kChunksOfThread>
struct Split {
  static constexpr int kThreads = kThreadsOfRow;
  static constexpr int kChunks = kChunksOfThread;
};

// Calls body(Split) with the split of a row of so many chunks: a function of nothing else, for it decides the order of
// the row's sum. Rows of more than fits get the last. Measured on an H200: two chunks a thread where 256 threads then
// suffice, four above (more threads cost more at the barrier than they save).
template <class Body>
auto with_split(int64_t num_chunks, Body body) {
  if (num_chunks <= 32 * 4) return body(Split<32, 4>{});
  if (num_chunks <= 128 * 2) return body(Split<128, 2>{});
  if (num_chunks <= 256 * 2) return body(Split<256, 2>{});
  if (num_chunks <= 256 * 4) return body(Split<256, 4>{});
  if (num_chunks <= 512 * 4) return body(Split<512, 4>{});
  return body(Split<1024, 4>{});
}

bool is_aligned(const TensorView& t, int64_t rows) {
  const int64_t item = static_cast<int64_t>(dtype_size(t.dtype));
  return !t.has_value() ||
         (reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (rows == 1 || t.rank == 1 || t.stride[0] * item % 16 == 0));
}

template <Arch kArch, class T>
Status run(const RmsNormParams& params, const Launcher& launcher) {
  const Args args = {
      .output = params.output.data,
      .input = params.input.data,
      .weight = params.weight.data,
      .residual = params.residual.data,
      .output_stride = params.output.stride[0],
      .input_stride = params.input.stride[0],
      .residual_stride = params.residual.stride[0],
      .rows = params.input.shape[0],
      .columns = params.input.shape[1],
      .inverse_columns = 1.0f / static_cast<float>(params.input.shape[1]),
      .epsilon = params.epsilon,
  };
  const int64_t num_chunks = (args.columns + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  const bool vector = args.columns % Chunk<T>::kSize == 0 && is_aligned(params.output, args.rows) &&
                      is_aligned(params.input, args.rows) && is_aligned(params.residual, args.rows) &&
                      is_aligned(params.weight, args.rows);
  return with_split(num_chunks, [&](auto split) {
    constexpr int kThreads = decltype(split)::kThreads, kChunks = decltype(split)::kChunks;
    if (!vector || num_chunks > kThreads * kChunks) {
      const LaunchShape shape = {.grid = grid_of(args.rows), .block = kThreads};
      return vector ? launcher.launch<norm::rms_norm_in_two_passes<kArch, T, true>>(shape, args)
                    : launcher.launch<norm::rms_norm_in_two_passes<kArch, T, false>>(shape, args);
    }
    if constexpr (kThreads >= kMinBlock && kThreads < 1024) {  // 1024 threads have no registers for it
      if (args.rows <= norm::kFewRows && args.epsilon >= std::numeric_limits<float>::min()) {
        const LaunchShape shape = {.grid = grid_of(args.rows), .block = kThreads};
        return args.residual == nullptr
                   ? launcher.launch<norm::rms_norm_few_rows<kArch, T, kThreads, kChunks, false>>(shape, args)
                   : launcher.launch<norm::rms_norm_few_rows<kArch, T, kThreads, kChunks, true>>(shape, args);
      }
    }
    constexpr int kRowsPerBlock = kThreads < kMinBlock ? kMinBlock / kThreads : 1;
    const LaunchShape shape = {.grid = grid_of((args.rows + kRowsPerBlock - 1) / kRowsPerBlock),
                               .block = kThreads * kRowsPerBlock};
    const int64_t bytes = args.rows * num_chunks * 16 * (args.residual == nullptr ? 2 : 4);
    return bytes > kStreamingBytes
               ? launcher.launch<norm::rms_norm_in_registers<kArch, T, kThreads, kChunks, true>>(shape, args)
               : launcher.launch<norm::rms_norm_in_registers<kArch, T, kThreads, kChunks, false>>(shape, args);
  });
}

}  // namespace

Status rms_norm(const RmsNormParams& params, const Context& context) {
  return on_device("rms_norm", params.output.device, context, [&](const Launcher& launcher) {
    return with_type(params.output.dtype, [&](auto type) {
      using T = decltype(type);
      return launcher.arch == Arch::kSm90 ? run<Arch::kSm90, T>(params, launcher)
                                          : run<Arch::kSm80, T>(params, launcher);
    });
  });
}

}  // namespace punica::cuda
