// sgmv_shrink for float16 and bfloat16 on the sm_90 path where d_out is at most 16, d_in at most 4096, rows of x start
// at multiples of 16 bytes, and segments are not short: x is what moves. The sums are those of sgmv_stream.cu, term by
// term.
//
// Each of 8 warps does what two of the 16 of sgmv_stream.cu do. It has its weights of the whole tile in registers, all
// asked for at once, so that W waits for memory once, and goes over x in groups of 16 rows, all of its columns of one
// group before the next, through a ring of its own.
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kCols = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kPair = 2;        // warps of sgmv_stream.cu that one does the work of
constexpr int kChunk = 32;      // of K: two products
constexpr int kUnitChunks = 2;  // of a warp of those in a step
constexpr int kUnitColumns = kUnitChunks * kChunk;
constexpr int kStep = kWarps * kPair * kUnitColumns;
constexpr int kSteps = 2;  // of a half
constexpr int kUnitBytes = 16 * kUnitColumns * 2;

constexpr int kCluster = 2;
constexpr int kGroups = 4;  // of 16 rows, of a tile
constexpr int kRows = kGroups * 16;
[[maybe_unused]] constexpr int kGroupUnits = kPair * kSteps;
constexpr int kUnits = 12;  // of a warp's ring
// Of them, asked for before it is known where the tile is.
[[maybe_unused]] constexpr int kGuessed = 3;
constexpr int kWarpBytes = kUnits * kUnitBytes + 2048;  // the ring, and sums of two groups
constexpr int kReceivedBytes = kRows / kCluster * kCols * 4;
constexpr int kSharedBytes = kWarps * kWarpBytes + kReceivedBytes;

template <Arch kArch, class T>
__global__ void __launch_bounds__(kThreads, 1) sgmv_rows(const SgmvArgs args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier;
  launch_dependents<kArch>();

  const uint32_t rank = blockIdx.x % kCluster;
  const uint32_t number = blockIdx.x / kCluster;
  const int chunks = static_cast<int>((args.d_in + kChunk - 1) / kChunk);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int middle = chunks / 2 * kChunk;
  // The warp's first column of the block's half of d_in, and the end of the half.
  const int begin = (rank == 0 ? 0 : middle) + warp * (kPair * kUnitColumns);
  const int end = rank == 0 ? middle : static_cast<int>(args.d_in);

  const uint32_t received_barrier = shared_address(&barrier);
  if (threadIdx.x == 0) {
    hopper::barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    hopper::barrier_expect(received_barrier, kReceivedBytes);
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // waited for before the first remote store

  // Unit u: group u / 4, step u / 2 % 2, the first or the second warp of the pair; copied by the lanes that will read
  // it.
  const uint32_t ring = shared_address(memory) + warp * kWarpBytes;
  const int fill_row = lane / 8, fill_chunk = lane % 8;
  const uint32_t fill_to = ring + fill_row * 128 + ((fill_chunk ^ (fill_row & 1) * 4) * 16);
  const int64_t four_rows = 4 * args.x_stride;
  const auto x_at = [&](int64_t row) {
    return static_cast<const T*>(args.x) + (row + fill_row) * args.x_stride + begin + fill_chunk * 8;
  };
  const auto fill = [&](const T* x, int rows, int u) {
    const int group = u / kGroupUnits;
    if (group < kGroups && group * 16 < rows) {
      const int column = u / kPair % kSteps * kStep + u % kPair * kUnitColumns;
      const T* const from = x + column + group * 4 * four_rows;
      const int rest = begin + fill_chunk * 8 + column < end ? rows - group * 16 - fill_row : 0;
      const uint32_t to = fill_to + u % kUnits * kUnitBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async_16(to + i * 512, from + i * four_rows, i * 4 < rest ? 16 : 0);
    }
    copy_commit();
  };

  // Without early reads x is read, in the time that the tables take, where the tile is if the segments cover all rows
  // in order, as they mostly do. Before the wait no more than the L2 cache is asked, where all writes of the kernel
  // before end up: that is no read. It is asked for one group, in the time in which the last blocks of that kernel end.
  const int64_t guess = int64_t{number} * kRows;
  const int guess_rows = static_cast<int>(min(max(args.rows - guess, int64_t{0}), int64_t{kRows}));
  if (!args.early_reads) prefetch_tables(args);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = i * 8 + g, k = begin + t / 2 * kStep + t % 2 * kUnitColumns;
    if (row < guess_rows && k < end) prefetch_line(static_cast<const T*>(args.x) + (guess + row) * args.x_stride + k);
  }
  if (!args.early_reads) grid_dependency_wait<kArch>();
  const bool guesses = !args.early_reads && guess_rows > 0;
  SgmvTile<T> tile;
  const bool found = find_tile<kRows, kThreads>(args, number, scratch, &tile, [&] {
    if (guesses) {
      const T* const x = x_at(guess);
#pragma unroll
      for (int u = 0; u < kGuessed; ++u) fill(x, guess_rows, u);
    }
  });
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    copy_wait<0>();
    return;  // the other blocks of the cluster find the same
  }

  // The lane's part of W: [warp of the pair][step][chunk][product of 8 columns].
  uint4 w[kPair][kSteps][kUnitChunks][2];
  const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0;
#pragma unroll
  for (int v = 0; v < kPair; ++v) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = begin + step * kStep + v * kUnitColumns + t * 8;
      const T* const from = tile.w + int64_t{g} * args.d_in + k;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kUnitChunks; ++c) {
          const bool is_there = n * 8 + g < args.d_out && k + c * kChunk < end;
          const T* const at = from + n * 8 * args.d_in + c * kChunk;
          if (w_aligned) {
            w[v][step][c][n] = is_there ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{0, 0, 0, 0};
          } else {
            w[v][step][c][n] = load_eight_words(reinterpret_cast<const uint16_t*>(at), is_there ? 8 : 0);
          }
        }
      }
    }
  }
  if (args.early_reads) grid_dependency_wait<kArch>();
  const bool guessed = guesses && tile.row == guess;
  const T* const x = x_at(tile.row);
  const int rows = tile.rows;
  if (!guessed) {
    copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kGuessed; ++u) fill(x, rows, u);
  }
#pragma unroll
  for (int u = kGuessed; u < kUnits - 1; ++u) fill(x, rows, u);

  // What the thread has of y in the end: four columns of a row, if the block owns it.
  const int id = static_cast<int>(threadIdx.x), row = id / 4, column = id % 4 * 4;
  const bool owns = static_cast<uint32_t>(row / (kRows / kCluster)) == rank;
  T* const y = static_cast<T*>(args.y) + (tile.row + row) * args.y_stride + column;
  const int columns = owns && row < rows ? static_cast<int>(min(args.d_out - column, int64_t{4})) : 0;
  const bool vectors = columns == 4 && args.y_aligned;
  Vec<T, 4> old = {};
  if (vectors) {
    old = load<T, 4>(y);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < columns) old.values[i] = y[i];
    }
  }

  // Where the lane reads in a unit, of row g and of the chunks of one half of the row; and where it puts its sums of
  // 16 rows, in which the columns of every other two rows are turned by half.
  const uint32_t read_at = ring + g * 128 + ((t ^ (g & 1) * 4) * 16);
  const uint32_t write_at = ring + g * 64 + (t ^ (g >> 1 & 1) * 4) * 8;
  const auto put = [&](const float (&sum)[2][4], int bytes) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t to = (write_at ^ n * 32) + bytes;
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sum[n][0]), "f"(sum[n][1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * 64), "f"(sum[n][2]), "f"(sum[n][3]) : "memory");
    }
  };
  float kept[2][4] = {}, sums[2][4] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (group * 16 >= rows) continue;
    float pair[kPair][2][4] = {};
#pragma unroll
    for (int i = 0; i < kGroupUnits; ++i) {
      const int u = group * kGroupUnits + i, step = i / kPair, v = i % kPair;
      copy_wait<kUnits - 2>();
      __syncwarp();
      uint4 part[kUnitChunks][2];
#pragma unroll
      for (int c = 0; c < kUnitChunks; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          part[c][half] = load_shared_16((read_at ^ c * 64) + u % kUnits * kUnitBytes + half * 1024);
        }
      }
      fill(x, rows, u + kUnits - 1);
#pragma unroll
      for (int c = 0; c < kUnitChunks; ++c) {
        const uint4 v0 = part[c][0], v1 = part[c][1];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint4 b = w[v][step][c][n];
          mma_m16n8k16<T>(pair[v][n], {v0.x, v1.x, v0.y, v1.y}, {b.x, b.y});
          mma_m16n8k16<T>(pair[v][n], {v0.z, v1.z, v0.w, v1.w}, {b.z, b.w});
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[n][i] = pair[0][n][i] + pair[1][n][i];
        if (group == 2) kept[n][i] = sums[n][i];
      }
    }
    if (group < 2) put(sums, kUnits * kUnitBytes + group * 1024);
  }
  copy_wait<0>();
  __syncwarp();
  put(kept, 0);
  put(sums, 1024);
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");

  // What groups that do not exist have left there is added too, and not stored.
  const uint32_t parts = shared_address(memory) + (row < 32 ? kUnits * kUnitBytes : 0) + row % 32 * 64 +
                         ((id % 4) ^ (row >> 1 & 1) * 2) * 16;
  const auto part = [&](int k) {
    const uint4 v = load_shared_16(parts + k * kWarpBytes);
    return float4{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
  };
  float4 sum = part(0);
#pragma unroll
  for (int k = 1; k < kWarps; ++k) sum = add(sum, part(k));
  float4* const received = reinterpret_cast<float4*>(memory + kWarps * kWarpBytes) + id % (kThreads / kCluster);
  if (!owns) {
    hopper::store_async(hopper::remote_address(shared_address(received), rank ^ 1), sum,
                        hopper::remote_address(received_barrier, rank ^ 1));
    return;
  }
  hopper::barrier_wait(received_barrier, 0);
  const float4 all = rank == 0 ? add(sum, *received) : add(*received, sum);
  const float values[4] = {all.x, all.y, all.z, all.w};
  Vec<T, 4> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.values[i] = from_float<T>(to_float(old.values[i]) + values[i]);
  if (vectors) {
    store(y, result);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < columns) y[i] = result.values[i];
    }
  }
#endif
}

// With fewer rows tiles of 64 of them are too few for the device.
constexpr int64_t kFewestRows = 3072;

template <class T>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kRows) * kCluster);
  shape.block = kThreads;
  shape.shared_bytes = kSharedBytes;
  shape.cluster = kCluster;
  return launcher.launch<sgmv_rows<Arch::kSm90, T>>(shape, args);
}

}  // namespace

bool is_sgmv_rows(const SgmvArgs& args) {
  return args.rows >= kFewestRows && args.d_in <= kCluster * kSteps * kStep && args.d_in % 8 == 0 && args.x_aligned &&
         !short_segments(args);
}

Status launch_sgmv_rows(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda
