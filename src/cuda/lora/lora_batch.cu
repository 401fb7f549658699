// update_lora_batch on CUDA devices: the rows of a batch sorted by adapter.
//
// One block does it in one launch, so that a step of a model, or a captured graph, has it between two kernels without
// the host. A row's place is decided by counting, never by who comes first, so the same indices give the same tensors.
//
//   sort_by_counts   each warp counts the adapters of its own range of rows; places follow from the sums of the counts,
//                    by adapter and then by warp. Two passes over the rows.
//   sort_by_ranks    each row counts the rows that come before it. For few rows, or for more adapters than there is
//                    room for counters; the work grows with the square of the rows.
//
// Nothing here lets the next kernel start before this one has ended (launch_dependents), so that kernels that read the
// batch early, as early_reads allows them to, cannot overtake it.
#include <algorithm>
#include <cstdint>

#include "src/cuda/backend.h"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// Up to so many rows each row counts the others: that takes less time than clearing and adding up counters.
constexpr int64_t kFewRows = 256;
// Keys in shared memory at a time, for sort_by_ranks.
constexpr int kTile = 4096;
// With what Shared takes, what every device from sm_80 on has.
constexpr int64_t kCounterBytes = 80 << 10;
constexpr int64_t kMaxRows = int64_t{1} << 30;

struct BatchArgs {
  const void* given;  // int32 or int64 [n]
  int32_t* indices;
  int32_t* order;
  int32_t* segment_adapter;
  int32_t* segment_start;
  int32_t* counts;
  int n;
  int capacity;
  int max_segments;
  int num_adapters;
  int count_warps;  // of sort_by_counts; 0: sort_by_ranks
  bool is_int64;
};

struct Shared {
  int warp_sums[kWarps];
  int active;
  int tile[kTile];
};

__device__ int read_index(const BatchArgs& args, int row) {
  const int64_t index = args.is_int64 ? static_cast<const int64_t*>(args.given)[row]
                                      : int64_t{static_cast<const int32_t*>(args.given)[row]};
  return index < 0 || index >= args.num_adapters ? -1 : static_cast<int>(index);
}

// The sum of value over the threads before this one; *total: over all.
__device__ int block_prefix(Shared* shared, int value, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  __syncthreads();
  if (lane == 31) shared->warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared->warp_sums[w];
    all += shared->warp_sums[w];
  }
  *total = all;
  return before + inclusive - value;
}

__device__ void sort_by_ranks(const BatchArgs& args, Shared* shared) {
  for (int first = 0; first < args.n; first += kThreads) {
    const int row = first + static_cast<int>(threadIdx.x);
    const int mine = row < args.n ? args.indices[row] : 0;
    int place = 0;
    for (int begin = 0; begin < args.n; begin += kTile) {
      const int size = min(kTile, args.n - begin);
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += kThreads) shared->tile[i] = args.indices[begin + i];
      __syncthreads();
      if (row < args.n) {  // warps without rows leave the others the multiprocessor
#pragma unroll 8
        for (int i = 0; i < size; ++i) {
          const int other = shared->tile[i];
          place += other < mine || (other == mine && begin + i < row);
        }
      }
    }
    if (row < args.n) args.order[place] = row;
  }
}

// counters: [count_warps, num_adapters + 1], those of rows without an adapter first.
__device__ void sort_by_counts(const BatchArgs& args, Shared* shared, int* counters) {
  const int keys = args.num_adapters + 1, warps = args.count_warps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < keys * warps; i += kThreads) counters[i] = 0;
  __syncthreads();

  const int steps = (args.n + 32 * warps - 1) / (32 * warps);  // of 32 rows, for each warp
  const int64_t first = int64_t{warp} * steps * 32;
  const int64_t end = min(int64_t{args.n}, first + int64_t{steps} * 32);
  int* const mine = counters + int64_t{warp} * keys;
  // Calls body(row, key, rows of the same key among the 32). Only this warp touches its counters.
  const auto for_rows = [&](auto body) {
    for (int64_t base = first; base < end; base += 32) {
      const int row = static_cast<int>(base) + lane;
      const int key = row < end ? args.indices[row] + 1 : -1;
      const unsigned same = __match_any_sync(kFullWarp, key);
      body(row, key, same);
      __syncwarp();
    }
  };
  if (warp < warps) {
    for_rows([&](int, int key, unsigned same) {
      if (key >= 0 && lane == __ffs(same) - 1) mine[key] += __popc(same);
    });
  }
  __syncthreads();

  // Counts become places: a thread takes a run of keys.
  const int run = (keys + kThreads - 1) / kThreads;
  const int begin = min(keys, static_cast<int>(threadIdx.x) * run), stop = min(keys, begin + run);
  int sum = 0, total;
  for (int key = begin; key < stop; ++key) {
    for (int w = 0; w < warps; ++w) sum += counters[int64_t{w} * keys + key];
  }
  int place = block_prefix(shared, sum, &total);
  for (int key = begin; key < stop; ++key) {
    for (int w = 0; w < warps; ++w) {
      int& counter = counters[int64_t{w} * keys + key];
      const int count = counter;
      counter = place;
      place += count;
    }
  }
  __syncthreads();

  if (warp < warps) {
    for_rows([&](int row, int key, unsigned same) {
      if (key >= 0) args.order[mine[key] + __popc(same & ((1u << lane) - 1))] = row;
      __syncwarp();
      if (key >= 0 && lane == __ffs(same) - 1) mine[key] += __popc(same);
    });
  }
}

// The runs of equal adapters in `order`.
__device__ void write_segments(const BatchArgs& args, Shared* shared) {
  if (threadIdx.x == 0) shared->active = 0;
  int segments = 0;
  for (int first = 0; first < args.n; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int adapter = i < args.n ? args.indices[args.order[i]] : -1;
    const int before = i < args.n && i > 0 ? args.indices[args.order[i - 1]] : -1;
    const bool starts = i < args.n && (i == 0 || adapter != before);
    int total;
    const int segment = segments + block_prefix(shared, starts, &total);
    if (starts && segment < args.max_segments) {
      args.segment_adapter[segment] = adapter;
      args.segment_start[segment] = i;
      if (adapter >= 0 && before < 0) shared->active = args.n - i;
    }
    segments += total;
  }
  __syncthreads();
  for (int i = segments + static_cast<int>(threadIdx.x); i < args.max_segments; i += kThreads) {
    args.segment_adapter[i] = -1;
    args.segment_start[i + 1] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    args.segment_start[segments] = args.n;
    args.counts[0] = segments;
    args.counts[1] = shared->active;
  }
}

template <Arch kArch>
__global__ void __launch_bounds__(kThreads) lora_batch_kernel(const BatchArgs args) {
  if constexpr (kCompiled<kArch>) {
    __shared__ Shared shared;
    extern __shared__ int counters[];
    grid_dependency_wait<kArch>();
    for (int i = threadIdx.x; i < args.capacity; i += kThreads) {
      args.indices[i] = i < args.n ? read_index(args, i) : -1;
      if (i >= args.n) args.order[i] = -1;
    }
    __syncthreads();  // what a block has written to global memory, all of it sees behind a barrier
    if (args.count_warps == 0) {
      sort_by_ranks(args, &shared);
    } else {
      sort_by_counts(args, &shared, counters);
    }
    __syncthreads();
    write_segments(args, &shared);
  }
}

template <Arch kArch>
Status launch(const Launcher& launcher, const BatchArgs& args) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(kThreads);
  shape.shared_bytes =
      sizeof(int) * static_cast<size_t>(args.count_warps) * (static_cast<size_t>(args.num_adapters) + 1);
  return launcher.launch<lora_batch_kernel<kArch>>(shape, args);
}

}  // namespace

Status update_lora_batch(const LoraBatchParams& params, const Context& context) {
  const LoraBatch& batch = params.batch;
  if (batch.order.shape[0] > kMaxRows) {
    return {StatusCode::kUnsupported, "update_lora_batch: on CUDA the capacity must be at most 1073741824"};
  }
  BatchArgs args = {};
  args.given = params.indices.data;
  args.indices = batch.indices.as<int32_t>();
  args.order = batch.order.as<int32_t>();
  args.segment_adapter = batch.segment_adapter.as<int32_t>();
  args.segment_start = batch.segment_start.as<int32_t>();
  args.counts = batch.counts.as<int32_t>();
  args.n = static_cast<int>(params.indices.shape[0]);
  args.capacity = static_cast<int>(batch.order.shape[0]);
  args.max_segments = static_cast<int>(batch.segment_adapter.shape[0]);
  args.num_adapters = static_cast<int>(params.num_adapters);
  args.is_int64 = params.indices.dtype == DType::kInt64;
  if (args.n > kFewRows) {
    const int64_t row_bytes = static_cast<int64_t>(sizeof(int)) * (params.num_adapters + 1);
    args.count_warps =
        static_cast<int>(std::min({kCounterBytes / row_bytes, int64_t{kWarps}, (int64_t{args.n} + 31) / 32}));
  }
  return on_device("update_lora_batch", params.indices.device, context, [&](const Launcher& launcher) {
    return launcher.arch == Arch::kSm90 ? launch<Arch::kSm90>(launcher, args) : launch<Arch::kSm80>(launcher, args);
  });
}

}  // namespace punica::cuda
