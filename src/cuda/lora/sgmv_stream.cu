// sgmv_shrink for float16 and bfloat16 on the sm_90 path where d_in is large and d_out at most 16: x is what moves.
//
// A block has a tile of rows and, with the other of its cluster, a half of d_in, of which each warp takes 64 of every
// 1024. A warp copies its part of x, whole lines of 128 bytes, into a ring in shared memory of its own, with cp.async,
// so that no barrier of the block is in the way; W goes straight into registers, once for all rows of the tile, one
// step ahead. K is permuted within chunks of 32, in x and W alike, so that a lane's part of a chunk is eight adjacent
// elements: one 16-byte access of either, and two products of mma.m16n8k16. Rows at other addresses than multiples of
// 16 bytes go into registers in words of 4 bytes.
//
// In the end the warps' sums are added in the order of K, and the blocks' of a cluster, which travel through
// distributed shared memory to the block that owns the rows, in order of the blocks.
//
// Clusters are of two, with one block to a multiprocessor. Of four, with two blocks to a multiprocessor, this took a
// third more time on an H200.
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kCols = 16;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kChunk = 32;      // of K: two products
constexpr int kWarpChunks = 2;  // of a warp in a step
[[maybe_unused]] constexpr int kStep = kWarps * kWarpChunks * kChunk;
constexpr int kCluster = 2;
// A warp's ring in shared memory: units of 16 rows x 128 bytes.
constexpr int kUnitBytes = 16 * kWarpChunks * kChunk * 2;

template <int kGroups>
struct Stream {
  static constexpr int kRows = kGroups * 16;
  static constexpr int kUnits = kGroups == 1 ? 3 : 6;
  static constexpr int kRingBytes = kWarps * kUnits * kUnitBytes;
  // Of y, of a block of the cluster.
  static constexpr int kElements = kRows * kCols / kCluster;
  static constexpr int kReceivedBytes = kCluster * kElements * 4;
  static_assert(kWarps * kRows * kCols * 4 <= kRingBytes);
};

// kGroups: groups of 16 rows of a tile. kFast: rows of x start at multiples of 16 bytes, and d_in is a multiple of 8.
template <Arch kArch, class T, int kGroups, bool kFast>
__global__ void __launch_bounds__(kThreads, 1) sgmv_stream(const SgmvArgs args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Stream<kGroups>;
  constexpr int kRows = S::kRows, kElements = S::kElements;
  // Units of the ring that are asked for before it is known where the tile is: behind them W has to wait.
  [[maybe_unused]] constexpr int kGuessed = kGroups == 1 ? 2 : 3;
  extern __shared__ __align__(128) unsigned char memory[];
  float* const parts = reinterpret_cast<float*>(memory);  // over the ring, in the end: [warp][row][column]
  float* const received = reinterpret_cast<float*>(memory + S::kRingBytes);
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier;
  launch_dependents<kArch>();

  const uint32_t rank = blockIdx.x % kCluster;
  const uint32_t number = blockIdx.x / kCluster;
  const int64_t chunks = (args.d_in + kChunk - 1) / kChunk;
  const int64_t part_begin = chunks * rank / kCluster * kChunk;
  const int64_t part_end = min(chunks * (rank + 1) / kCluster * kChunk, args.d_in);
  const int steps = static_cast<int>((part_end - part_begin + kStep - 1) / kStep);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t warp_k = part_begin + warp * (kWarpChunks * kChunk);

  const uint32_t received_barrier = shared_address(&barrier);
  if (threadIdx.x == 0) {
    hopper::barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    hopper::barrier_expect(received_barrier, S::kReceivedBytes);
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // waited for before the first remote store

  // Fast: units of x in order of steps and, within a step, of groups, each copied by the lanes that will read it.
  const uint32_t ring = shared_address(memory) + warp * (S::kUnits * kUnitBytes);
  const int fill_row = lane / 8, fill_chunk = lane % 8;
  const uint32_t fill_to = fill_row * 128 + ((fill_chunk ^ (fill_row & 1) * 4) * 16);
  int fill_step = 0, fill_group = 0, fill_slot = 0;
  const auto fill = [&](int64_t first_row, int64_t rows, int groups) {
    if (fill_step < steps) {
      const int64_t k = warp_k + int64_t{fill_step} * kStep + fill_chunk * 8;
      const T* from = static_cast<const T*>(args.x) + (first_row + fill_group * 16 + fill_row) * args.x_stride + k;
      const int rest = k < part_end ? static_cast<int>(min(rows, int64_t{kRows})) - fill_group * 16 - fill_row : 0;
      const uint32_t to = ring + fill_slot * kUnitBytes + fill_to;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_async_16(to + i * 512, from, i * 4 < rest ? 16 : 0);
        from += 4 * args.x_stride;
      }
      if (++fill_slot == S::kUnits) fill_slot = 0;
      if (++fill_group == groups) fill_group = 0, ++fill_step;
    }
    copy_commit();
  };
  const auto start = [&](int64_t first_row, int64_t rows, int groups, int units) {
#pragma unroll 1
    for (int i = 0; i < units; ++i) fill(first_row, rows, groups);
  };
  const auto groups_of = [&](int64_t rows) { return static_cast<int>((min(rows, int64_t{kRows}) + 15) / 16); };

  // Without early reads x is read, in the time that the tables take, where the tile is if the segments cover all rows
  // in order, as they mostly do. Before the wait no more than the L2 cache is asked, where all writes of the kernel
  // before end up: that is no read.
  const int64_t guess = int64_t{number} * kRows;
  if (!args.early_reads) {
    prefetch_tables(args);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t row = guess + group * 16 + lane / 2, k = warp_k + lane % 2 * kStep;
      if (row < args.rows && k < part_end) prefetch_line(static_cast<const T*>(args.x) + row * args.x_stride + k);
    }
    grid_dependency_wait<kArch>();
  }
  const bool guesses = kFast && !args.early_reads && guess < args.rows;
  SgmvTile<T> tile;
  // Behind the tables and before W no more than a part of the ring, or W would wait for all of it.
  const bool found = find_tile<kRows, kThreads>(args, number, scratch, &tile, [&] {
    if (guesses) start(guess, args.rows - guess, groups_of(args.rows - guess), kGuessed);
  });
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    copy_wait<0>();
    return;  // the other blocks of the cluster find the same
  }

  // The lane's part of W in a step: [chunk][product of 8 columns]. kWhole: rows start at multiples of 16 bytes.
  const auto load_w = [&](int step, uint4(&w)[kWarpChunks][2], auto is_whole) {
    constexpr bool kWhole = decltype(is_whole)::value;
    const int64_t k = warp_k + int64_t{step} * kStep + t * 8;
    const T* const from = tile.w + g * args.d_in + k;
    if constexpr (kWhole) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
          w[c][n] = {0, 0, 0, 0};
          if (n * 8 + g < args.d_out && k + c * kChunk < part_end) {
            w[c][n] = __ldg(reinterpret_cast<const uint4*>(from + n * 8 * args.d_in + c * kChunk));
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
          const int64_t rest = n * 8 + g < args.d_out ? part_end - k - c * kChunk : 0;
          w[c][n] = load_eight_words(reinterpret_cast<const uint16_t*>(from + n * 8 * args.d_in + c * kChunk),
                                     static_cast<int>(min(max(rest, int64_t{0}), int64_t{8})));
          __syncwarp();  // one after the other: all at once take more registers than there are
        }
      }
    }
  };
  uint4 w[kWarpChunks][2];
  const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && args.d_in % 8 == 0;
  if (w_aligned) {
    load_w(0, w, std::true_type{});
  } else {
    load_w(0, w, std::false_type{});
  }
  if (args.early_reads) grid_dependency_wait<kArch>();
  const int groups = groups_of(tile.rows);
  if constexpr (kFast) {
    const bool guessed = guesses && tile.row == guess && groups == groups_of(args.rows - guess);
    if (!guessed) {
      copy_wait<0>();
      __syncwarp();
      fill_step = 0, fill_group = 0, fill_slot = 0;
    }
    start(tile.row, tile.rows, groups, S::kUnits - 1 - (guessed ? kGuessed : 0));
  }

  // What the thread has of y in the end: an element of the rows that the block owns.
  const int id = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(rank) * (kRows / kCluster) + id / kCols;
  const bool is_mine = id < kElements && row < tile.rows && id % kCols < args.d_out;
  T* const y = static_cast<T*>(args.y) + (tile.row + row) * args.y_stride + id % kCols;
  T old = from_float<T>(0.0f);
  if (is_mine) old = *y;

  float sums[kGroups][2][4] = {};
  int slot = 0;
  // Where the lane reads in a unit, of row g and of the chunks of one half of the row.
  const uint32_t read_at = ring + g * 128 + ((t ^ (g & 1) * 4) * 16);
  const auto walk = [&](auto is_whole) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint4 next[kWarpChunks][2];
      if (step + 1 < steps) load_w(step + 1, next, is_whole);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group < groups) {
          if constexpr (kFast) {
            copy_wait<S::kUnits - 2>();
            __syncwarp();
          }
          uint4 x[kWarpChunks][2];
#pragma unroll
          for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if constexpr (kFast) {
                x[c][half] = load_shared_16((read_at ^ c * 64) + slot * kUnitBytes + half * 1024);
              } else {
                const int r = group * 16 + half * 8 + g;
                const int64_t k = warp_k + int64_t{step} * kStep + c * kChunk + t * 8;
                const int64_t rest = r < tile.rows ? part_end - k : 0;
                x[c][half] = load_eight_words(static_cast<const uint16_t*>(args.x) + (tile.row + r) * args.x_stride + k,
                                              static_cast<int>(min(max(rest, int64_t{0}), int64_t{8})));
              }
            }
          }
          if constexpr (kFast) {
            if (++slot == S::kUnits) slot = 0;
            fill(tile.row, tile.rows, groups);
          }
#pragma unroll
          for (int c = 0; c < kWarpChunks; ++c) {
            const uint4 v0 = x[c][0], v1 = x[c][1];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              mma_m16n8k16<T>(sums[group][n], {v0.x, v1.x, v0.y, v1.y}, {w[c][n].x, w[c][n].y});
              mma_m16n8k16<T>(sums[group][n], {v0.z, v1.z, v0.w, v1.w}, {w[c][n].z, w[c][n].w});
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) w[c][0] = next[c][0], w[c][1] = next[c][1];
    }
  };
  if (w_aligned) {
    walk(std::true_type{});
  } else {
    walk(std::false_type{});
  }
  copy_wait<0>();
  __syncthreads();

#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float* to = parts + (warp * kRows + group * 16 + g) * kCols + n * 8 + t * 2;
      *reinterpret_cast<float2*>(to) = {sums[group][n][0], sums[group][n][1]};
      *reinterpret_cast<float2*>(to + 8 * kCols) = {sums[group][n][2], sums[group][n][3]};
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (id < kRows * kCols / 4) {
    const auto part = [&](int k) { return reinterpret_cast<const float4*>(parts)[k * (kRows * kCols / 4) + id]; };
    float4 sum = add(part(0), part(1));
#pragma unroll
    for (int k = 2; k < kWarps; k += 2) sum = add(sum, add(part(k), part(k + 1)));
    const uint32_t owner = id / (kElements / 4);
    hopper::store_async(
        hopper::remote_address(shared_address(received) + (rank * (kElements / 4) + id % (kElements / 4)) * 16, owner),
        sum, hopper::remote_address(received_barrier, owner));
  }
  hopper::barrier_wait(received_barrier, 0);
  if (is_mine) {
    float sum = received[id];
#pragma unroll
    for (int k = 1; k < kCluster; ++k) sum += received[k * kElements + id];
    *y = from_float<T>(to_float(old) + sum);
  }
#endif
}

template <class T, int kGroups, bool kFast>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kGroups * 16) * kCluster);
  shape.block = kThreads;
  shape.shared_bytes = Stream<kGroups>::kRingBytes + Stream<kGroups>::kReceivedBytes;
  shape.cluster = kCluster;
  return launcher.launch<sgmv_stream<Arch::kSm90, T, kGroups, kFast>>(shape, args);
}

template <class T, int kGroups>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  return args.x_aligned && args.d_in % 8 == 0 ? launch<T, kGroups, true>(launcher, args)
                                              : launch<T, kGroups, false>(launcher, args);
}

template <class T>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  // Few tiles of 64 rows leave most of the device idle.
  const bool few = max_tiles(args, 16) * kCluster <= 160;
  return few || short_segments(args) ? launch<T, 1>(launcher, args) : launch<T, 4>(launcher, args);
}

}  // namespace

Status launch_sgmv_stream(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda
