// sgmv_shrink for float16 and bfloat16 on the sm_90 path where d_out is at most 16, d_in at most 4096, rows of x start
// at multiples of 16 bytes, and segments are short, so that W is what moves, or rows are too few for sgmv_rows.cu. The
// sums are those of sgmv_stream.cu, term by term: a cluster of two has both halves of d_in.
//
// A block that finds its tile, then waits for its weights and then adds up leaves memory idle most of the time. So
// blocks stay: one warp goes over the tables and puts the tiles of the block's cluster into a queue in shared memory;
// sixteen copy x and W of their columns of the tiles to come into a ring, each for itself, and multiply; two add up
// what those have of a tile, send the other block of the cluster its rows, and update y.
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kCols = 16, kRows = 16;
constexpr int kWarps = 16;
constexpr int kMainThreads = kWarps * 32, kAddThreads = 64, kThreads = kMainThreads + kAddThreads + 32;
constexpr int kChunk = 32;      // of K: two products
constexpr int kWarpChunks = 2;  // of a warp in a step
[[maybe_unused]] constexpr int kStep = kWarps * kWarpChunks * kChunk;
constexpr int kSteps = 2;                                  // of a half
constexpr int kUnitBytes = 16 * kWarpChunks * kChunk * 2;  // 16 rows x 128 bytes: what a warp takes in a step
constexpr int kStages = 3;                                 // of a warp's ring: a unit of x and one of W
constexpr int kCluster = 2;
constexpr int kBuffers = 2;                    // for the sums of the warps
[[maybe_unused]] constexpr int kReceived = 4;  // for what comes from the other block, which may be three tiles ahead
[[maybe_unused]] constexpr int kQueue = 8;
constexpr int kPartsBytes = kWarps * kRows * kCols * 4;
[[maybe_unused]] constexpr int kSentBytes = kRows / kCluster * kCols * 4;
constexpr int kRingBytes = kWarps * kStages * 2 * kUnitBytes;

struct Item {
  int64_t row;
  const void* w;
  int rows;  // 0: there are no more
};

template <Arch kArch, class T>
__global__ void __launch_bounds__(kThreads, 1) sgmv_short(const SgmvArgs args, const uint32_t tiles) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Item queue[kQueue];
  __shared__ __align__(16) float4 received[kReceived][kSentBytes / 16];
  __shared__ __align__(8) uint64_t queue_full[kQueue], queue_empty[kQueue], full[kBuffers], empty[kBuffers],
      arrived[kReceived];
  launch_dependents<kArch>();

  const uint32_t rank = blockIdx.x % kCluster;
  const int chunks = static_cast<int>((args.d_in + kChunk - 1) / kChunk);
  const int id = static_cast<int>(threadIdx.x), lane = id % 32, warp = id / 32, g = lane / 4, t = lane % 4;
  const int middle = chunks / 2 * kChunk;
  const int begin = rank == 0 ? 0 : middle, end = rank == 0 ? middle : static_cast<int>(args.d_in);

  if (id == kThreads - 1) {
    for (int i = 0; i < kQueue; ++i) {
      hopper::barrier_init(shared_address(queue_full + i), 1);
      hopper::barrier_init(shared_address(queue_empty + i), kWarps + kAddThreads / 32);
    }
    for (int i = 0; i < kBuffers; ++i) {
      hopper::barrier_init(shared_address(full + i), kWarps);
      hopper::barrier_init(shared_address(empty + i), kAddThreads / 32);
    }
    for (int i = 0; i < kReceived; ++i) hopper::barrier_init(shared_address(arrived + i), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // waited for before the first remote store
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }

  if (warp == kWarps + kAddThreads / 32) {
    // Tables, 32 segments at a time, the next ones under way.
    int32_t next_start = 0, next_end = 0;
    int64_t next_address = 0;
    const auto ask = [&](int64_t segment) {
      const bool is_there = segment < args.num_segments;
      next_start = is_there ? args.s_start[segment] : 0;
      next_end = is_there ? args.s_end[segment] : 0;
      next_address = is_there ? args.w_ptr[segment] : 0;
    };
    ask(lane);
    uint32_t number = blockIdx.x / kCluster;
    uint64_t before = 0;  // tiles of the segments before
    int slot = 0, phase = 0;
    const auto put = [&](int64_t row, int rows, int64_t address) {
      hopper::barrier_wait(shared_address(queue_empty + slot), phase ^ 1);
      if (lane == 0) {
        queue[slot] = {row, reinterpret_cast<const T*>(address) + args.w_offset, rows};
        hopper::barrier_arrive(shared_address(queue_full + slot));
      }
      __syncwarp();
      if (++slot == kQueue) slot = 0, phase ^= 1;
    };
#pragma unroll 1
    for (int64_t base = 0; base < args.num_segments && number < tiles; base += 32) {
      const SgmvSegment segment = cut_segment<kRows>(args, next_start, next_end);
      const int64_t address = next_address;
      ask(base + 32 + lane);
      // Tiles of 32 segments are less than 2^32.
      const uint32_t sum = warp_inclusive_sum(segment.tiles, lane), first = sum - segment.tiles;
      const uint32_t all = __shfl_sync(0xffffffffu, sum, 31);
#pragma unroll 1
      while (number < tiles && number - before < all) {
        const uint32_t rest = static_cast<uint32_t>(number - before);
        const int owner = __ffs(__ballot_sync(0xffffffffu, rest - first < segment.tiles)) - 1;
        const int64_t row = segment.start + int64_t{rest - first} * kRows;
        const int rows = static_cast<int>(min(segment.end - row, int64_t{kRows}));
        put(__shfl_sync(0xffffffffu, row, owner), __shfl_sync(0xffffffffu, rows, owner),
            __shfl_sync(0xffffffffu, address, owner));
        number += gridDim.x / kCluster;
      }
      before += all;
    }
    put(0, 0, 0);
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;
  }

  int slot = 0, phase = 0;  // of the queue
  const auto wait_item = [&](int slot, int phase) {
    hopper::barrier_wait(shared_address(queue_full + slot), phase);
    return queue[slot];
  };
  const uint32_t parts = shared_address(memory) + kRingBytes;

  if (warp >= kWarps) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    const int j = id - kMainThreads, row = j / 4, column = j % 4 * 4;
    const bool mine = row / (kRows / kCluster) == static_cast<int>(rank);
    const int columns = static_cast<int>(min(args.d_out - column, int64_t{4}));
    const bool vectors = columns == 4 && args.y_aligned;
    const uint32_t read_at = parts + row * 64 + ((j % 4) ^ (row >> 1 & 1) * 2) * 16;
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    float4 own = {};
    Vec<T, 4> old = {};
    T* at = nullptr;  // of the tile before, null: the thread has no part of it
    const auto end_tile = [&](int number) {
      hopper::barrier_wait(shared_address(arrived + number % kReceived), number / kReceived & 1);
      if (at == nullptr) return;
      const float4 other = received[number % kReceived][j % (kAddThreads / kCluster)];
      const float4 a = rank == 0 ? own : other, b = rank == 0 ? other : own;
      const float sum[4] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
      Vec<T, 4> result;
#pragma unroll
      for (int i = 0; i < 4; ++i) result.values[i] = from_float<T>(to_float(old.values[i]) + sum[i]);
      if (vectors) {
        store(at, result);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < columns) at[i] = result.values[i];
        }
      }
    };
    int number = 0;
#pragma unroll 1
    for (;; ++number) {
      // Both warps have ended the tile before the last one. What this warp sends lets the other block go on, whose
      // sums may then take that tile's place in `received`.
      __syncwarp();
      hopper::named_barrier_sync(1, kAddThreads);
      const Item item = wait_item(slot, phase);
      __syncwarp();
      if (lane == 0) hopper::barrier_arrive(shared_address(queue_empty + slot));
      if (++slot == kQueue) slot = 0, phase ^= 1;
      if (item.rows == 0) break;
      if (j == 0) hopper::barrier_expect(shared_address(arrived + number % kReceived), kSentBytes);
      T* const y =
          mine && row < item.rows ? static_cast<T*>(args.y) + (item.row + row) * args.y_stride + column : nullptr;
      Vec<T, 4> next = {};
      if (y != nullptr) {
        if (vectors) {
          next = load<T, 4>(y);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i < columns) next.values[i] = y[i];
          }
        }
      }
      const int buffer = number % kBuffers;
      hopper::barrier_wait(shared_address(full + buffer), number / kBuffers & 1);
      float4 part[kWarps];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const uint4 v = load_shared_16(read_at + buffer * kPartsBytes + k * (kRows * kCols * 4));
        part[k] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
      }
      __syncwarp();
      if (lane == 0) hopper::barrier_arrive(shared_address(empty + buffer));
      float4 sum = add(part[0], part[1]);
#pragma unroll
      for (int k = 2; k < kWarps; k += 2) sum = add(sum, add(part[k], part[k + 1]));
      if (!mine) {
        const uint32_t to = shared_address(&received[number % kReceived][j % (kAddThreads / kCluster)]);
        hopper::store_async(hopper::remote_address(to, rank ^ 1), sum,
                            hopper::remote_address(shared_address(arrived + number % kReceived), rank ^ 1));
      }
      if (number > 0) end_tile(number - 1);
      own = sum, old = next, at = y;
    }
    if (number > 0) end_tile(number - 1);
    return;
  }

  // Steps of the tiles, each copied by the lanes that will read it.
  const int warp_k = begin + warp * (kWarpChunks * kChunk);
  const uint32_t ring = shared_address(memory) + warp * (kStages * 2 * kUnitBytes);
  const int fill_row = lane / 8, fill_chunk = lane % 8;
  const uint32_t fill_to = fill_row * 128 + ((fill_chunk ^ (fill_row & 1) * 4) * 16);
  Item ahead = {};  // whose steps are asked for
  int ahead_slot = 0, ahead_phase = 0, ahead_step = 0, fill_stage = 0;
  bool more = true;
  const auto fill_x = [&](const Item& item, int step, int stage) {
    const int k = warp_k + step * kStep + fill_chunk * 8;
    const T* from = static_cast<const T*>(args.x) + (item.row + fill_row) * args.x_stride + k;
    const uint32_t to = ring + stage * (2 * kUnitBytes) + fill_to;
    const int rest = k < end ? item.rows - fill_row : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async_16(to + i * 512, from, i * 4 < rest ? 16 : 0);
      from += 4 * args.x_stride;
    }
  };
  const auto fill_w = [&](const Item& item, int step, int stage) {
    const int k = warp_k + step * kStep + fill_chunk * 8;
    const T* from = static_cast<const T*>(item.w) + fill_row * args.d_in + k;
    const uint32_t to = ring + stage * (2 * kUnitBytes) + kUnitBytes + fill_to;
    const int rest = k < end ? static_cast<int>(args.d_out) - fill_row : 0;
    if (reinterpret_cast<uintptr_t>(item.w) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_async_16(to + i * 512, from, i * 4 < rest ? 16 : 0);
        from += 4 * args.d_in;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from), i * 4 < rest ? 8 : 0);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 512), "r"(v.x), "r"(v.y), "r"(v.z),
                     "r"(v.w)
                     : "memory");
        from += 4 * args.d_in;
      }
    }
  };
  const auto next_ahead = [&] {
    if (more && ahead_step == 0) {
      ahead = wait_item(ahead_slot, ahead_phase);
      if (++ahead_slot == kQueue) ahead_slot = 0, ahead_phase ^= 1;
      more = ahead.rows > 0;
    }
    return more;
  };
  const auto advance = [&] {
    if (++fill_stage == kStages) fill_stage = 0;
    if (++ahead_step == kSteps) ahead_step = 0;
  };
  if (args.early_reads) {
    // W before the wait: as far as it is of one tile.
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      if (next_ahead()) fill_w(ahead, ahead_step, fill_stage), advance();
    }
    grid_dependency_wait<kArch>();
    for (int i = 0; i < kSteps; ++i) {
      if (more) fill_x(ahead, i, i);
      copy_commit();
    }
  }
#pragma unroll 1
  for (int i = args.early_reads ? kSteps : 0; i < kStages - 1; ++i) {
    if (next_ahead()) fill_x(ahead, ahead_step, fill_stage), fill_w(ahead, ahead_step, fill_stage), advance();
    copy_commit();
  }

  // Where the lane reads in a unit, of row g and of the chunks of one half of the row.
  const uint32_t read_at = ring + g * 128 + ((t ^ (g & 1) * 4) * 16);
  const uint32_t write_at = parts + warp * (kRows * kCols * 4) + g * 64 + (t ^ (g >> 1 & 1) * 4) * 8;
  int stage = 0;
#pragma unroll 1
  for (int number = 0;; ++number) {
    const int rows = wait_item(slot, phase).rows;
    if (rows == 0) break;
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      copy_wait<kStages - 2>();
      __syncwarp();
      uint4 x[kWarpChunks][2], w[kWarpChunks][2];
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t at = (read_at ^ c * 64) + stage * (2 * kUnitBytes) + half * 1024;
          x[c][half] = load_shared_16(at);
          w[c][half] = load_shared_16(at + kUnitBytes);
        }
      }
      if (++stage == kStages) stage = 0;
      if (next_ahead()) fill_x(ahead, ahead_step, fill_stage), fill_w(ahead, ahead_step, fill_stage), advance();
      copy_commit();
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) {
        const uint4 v0 = x[c][0], v1 = x[c][1];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma_m16n8k16<T>(sums[n], {v0.x, v1.x, v0.y, v1.y}, {w[c][n].x, w[c][n].y});
          mma_m16n8k16<T>(sums[n], {v0.z, v1.z, v0.w, v1.w}, {w[c][n].z, w[c][n].w});
        }
      }
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(shared_address(queue_empty + slot));
    if (++slot == kQueue) slot = 0, phase ^= 1;
    const int buffer = number % kBuffers;
    hopper::barrier_wait(shared_address(empty + buffer), (number / kBuffers & 1) ^ 1);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t to = (write_at ^ n * 32) + buffer * kPartsBytes;
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sums[n][0]), "f"(sums[n][1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * 64), "f"(sums[n][2]), "f"(sums[n][3]) : "memory");
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(shared_address(full + buffer));
  }
  copy_wait<0>();
#endif
}

template <class T>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  const uint32_t tiles = static_cast<uint32_t>(max_tiles(args, kRows));
  const uint32_t clusters = static_cast<uint32_t>(launcher.num_multiprocessors() / kCluster);
  LaunchShape shape;
  shape.grid = (tiles < clusters ? tiles : clusters) * kCluster;
  shape.block = kThreads;
  shape.shared_bytes = kRingBytes + kBuffers * kPartsBytes;
  shape.cluster = kCluster;
  return launcher.launch<sgmv_short<Arch::kSm90, T>>(shape, args, tiles);
}

}  // namespace

bool is_sgmv_short(const SgmvArgs& args) {
  return args.d_in <= kCluster * kSteps * kStep && args.d_in % 8 == 0 && args.x_aligned;
}

Status launch_sgmv_short(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda
