// sgmv_shrink for float16 and bfloat16 on the sm_90 path where d_out is at most 16, rows of x start at multiples of 16
// bytes and there are few tiles of 16 rows: what costs time is waiting, so as many multiprocessors as can be wait at
// once. The sums are those of sgmv_stream.cu, term by term: a half of d_in and its 16 warps are shared out among 1, 2
// or 4 blocks of a cluster.
//
// A warp copies x and W of its columns, step by step, into a ring of its own. In the end the sums of pairs of warps go
// to the first block of the cluster, which adds them up in their order.
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kCols = 16, kRows = 16;
constexpr int kAllWarps = 16;   // that share a half of d_in
constexpr int kChunk = 32;      // of K: two products
constexpr int kWarpChunks = 2;  // of a warp in a step
constexpr int kWarpColumns = kWarpChunks * kChunk;
[[maybe_unused]] constexpr int64_t kStep = kAllWarps * kWarpColumns;
constexpr int kUnitBytes = 16 * kWarpColumns * 2;  // 16 rows x 128 bytes: what a warp takes of x, or of W, in a step
constexpr int kPairs = kAllWarps / 2;
constexpr int kPairBytes = kRows * kCols * 4;
constexpr int kReceivedBytes = 2 * kPairs * kPairBytes;
constexpr int64_t kBlocks = 132;  // at once, on an H200

// kShare: blocks that share a half.
template <int kShare>
struct Split {
  static constexpr int kWarps = kAllWarps / kShare, kThreads = kWarps * 32, kCluster = 2 * kShare;
  // Two blocks to a multiprocessor, or one.
  static constexpr int kStages = kShare == 1 ? 3 : 24 / kWarps;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kUnitBytes;
  static constexpr int kSharedBytes = kRingBytes + kReceivedBytes;
};

template <Arch kArch, class T, int kShare>
__global__ void __launch_bounds__(Split<kShare>::kThreads, 1) sgmv_split(const SgmvArgs args) {
  static_assert(kArch == Arch::kSm90, "made for clusters; the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Split<kShare>;
  constexpr int kStages = S::kStages, kThreads = S::kThreads;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SgmvScratch<kThreads> scratch;
  __shared__ __align__(8) uint64_t barrier;
  launch_dependents<kArch>();

  const int rank = static_cast<int>(blockIdx.x % S::kCluster), half = rank / kShare;
  const uint32_t number = blockIdx.x / S::kCluster;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x / 32), all_warp = rank % kShare * S::kWarps + warp;
  const int64_t chunks = (args.d_in + kChunk - 1) / kChunk;
  const int64_t begin = chunks * half / 2 * kChunk, end = min(chunks * (half + 1) / 2 * kChunk, args.d_in);
  const int steps = static_cast<int>((end - begin + kStep - 1) / kStep);
  const int64_t warp_k = begin + all_warp * kWarpColumns;

  const uint32_t received_barrier = shared_address(&barrier);
  const uint32_t received = shared_address(memory) + S::kRingBytes;
  if (threadIdx.x == 0) {
    hopper::barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (rank == 0) hopper::barrier_expect(received_barrier, kReceivedBytes);
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // waited for before the first remote store

  // Copied by the lanes that will read it.
  const uint32_t ring = shared_address(memory) + warp * (kStages * 2 * kUnitBytes);
  const int fill_row = lane / 8, fill_chunk = lane % 8;
  const uint32_t fill_to = ring + fill_row * 128 + ((fill_chunk ^ (fill_row & 1) * 4) * 16);
  const auto fill_x = [&](int64_t row, int64_t rows, int step, int stage) {
    const int64_t k = warp_k + step * kStep + fill_chunk * 8;
    const T* const from = static_cast<const T*>(args.x) + (row + fill_row) * args.x_stride + k;
    const int rest = k < end ? static_cast<int>(min(rows, int64_t{kRows})) - fill_row : 0;
    const uint32_t to = fill_to + stage * (2 * kUnitBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async_16(to + i * 512, from + i * 4 * args.x_stride, i * 4 < rest ? 16 : 0);
  };
  SgmvTile<T> tile = {};
  const auto fill_w = [&](int step, int stage) {
    const int64_t k = warp_k + step * kStep + fill_chunk * 8;
    const T* from = tile.w + fill_row * args.d_in + k;
    const uint32_t to = fill_to + stage * (2 * kUnitBytes) + kUnitBytes;
    const int rest = k < end ? static_cast<int>(args.d_out) - fill_row : 0;
    if (reinterpret_cast<uintptr_t>(tile.w) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async_16(to + i * 512, from + i * 4 * args.d_in, i * 4 < rest ? 16 : 0);
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

  // x is read, in the time that the tables take, where the tile is if the segments cover all rows in order, as they
  // mostly do.
  const int64_t guess = int64_t{number} * kRows;
  const bool guesses = !args.early_reads && guess < args.rows;
  const int first_steps = min(steps, kStages - 1);
  if (!args.early_reads) {
    prefetch_tables(args);
    grid_dependency_wait<kArch>();
  }
  const bool found = find_tile<kRows, kThreads>(args, number, scratch, &tile, [&] {
#pragma unroll 1
    for (int i = 0; i < first_steps && guesses; ++i) fill_x(guess, args.rows - guess, i, i);
  });
  if (!found) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    copy_commit();
    copy_wait<0>();
    return;  // the other blocks of the cluster find the same
  }
  const bool guessed = guesses && tile.row == guess;
  if (args.early_reads) {
#pragma unroll 1
    for (int i = 0; i < first_steps; ++i) fill_w(i, i);
    grid_dependency_wait<kArch>();
  } else if (guesses && !guessed) {
    copy_commit();
    copy_wait<0>();
    __syncwarp();
  }
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) {
      if (!args.early_reads) fill_w(i, i);
      if (!guessed) fill_x(tile.row, tile.rows, i, i);
    }
    copy_commit();
  }

  // What a thread of the first block has of y in the end: four columns of a row.
  const int id = static_cast<int>(threadIdx.x), row = id / 4, column = id % 4 * 4;
  const bool adds = rank == 0 && row < kRows;
  T* const y = static_cast<T*>(args.y) + (tile.row + row) * args.y_stride + column;
  const int columns = adds && row < tile.rows ? static_cast<int>(min(args.d_out - column, int64_t{4})) : 0;
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

  const uint32_t read_at = ring + g * 128 + ((t ^ (g & 1) * 4) * 16);
  float sums[2][4] = {};
  int stage = 0, next_stage = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncwarp();
    uint4 x[kWarpChunks][2], w[kWarpChunks][2];
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = (read_at ^ c * 64) + stage * (2 * kUnitBytes) + i * 1024;
        x[c][i] = load_shared_16(at);
        w[c][i] = load_shared_16(at + kUnitBytes);
      }
    }
    if (step + kStages - 1 < steps) {
      fill_w(step + kStages - 1, next_stage);
      fill_x(tile.row, tile.rows, step + kStages - 1, next_stage);
    }
    copy_commit();
    if (++stage == kStages) stage = 0;
    if (++next_stage == kStages) next_stage = 0;
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
  copy_wait<0>();
  __syncwarp();

  // Each warp's sums over its own ring; then those of pairs on their way.
  const uint32_t write_at = ring + g * 64 + (t ^ (g >> 1 & 1) * 4) * 8;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t to = write_at ^ n * 32;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sums[n][0]), "f"(sums[n][1]) : "memory");
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * 64), "f"(sums[n][2]), "f"(sums[n][3]) : "memory");
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const auto load_float4 = [](uint32_t at) {
    const uint4 v = load_shared_16(at);
    return float4{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
  };
  // A thread has four columns of a row of one pair.
#pragma unroll
  for (int item = id; item < S::kWarps / 2 * 64; item += kThreads) {
    const int pair = item / 64, r = item % 64 / 4, c = item % 4;
    const uint32_t at =
        shared_address(memory) + pair * (2 * kStages * 2 * kUnitBytes) + r * 64 + (c ^ (r >> 1 & 1) * 2) * 16;
    const float4 sum = add(load_float4(at), load_float4(at + kStages * 2 * kUnitBytes));
    const uint32_t to =
        received + (half * kPairs + rank % kShare * (S::kWarps / 2) + pair) * kPairBytes + item % 64 * 16;
    hopper::store_async(hopper::remote_address(to, 0), sum, hopper::remote_address(received_barrier, 0));
  }
  if (!adds) return;
  hopper::barrier_wait(received_barrier, 0);
  float4 both[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    both[h] = load_float4(received + h * kPairs * kPairBytes + id * 16);
#pragma unroll
    for (int pair = 1; pair < kPairs; ++pair) {
      both[h] = add(both[h], load_float4(received + (h * kPairs + pair) * kPairBytes + id * 16));
    }
  }
  const float4 all = add(both[0], both[1]);
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

template <class T, int kShare>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using S = Split<kShare>;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, kRows) * S::kCluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = S::kCluster;
  return launcher.launch<sgmv_split<Arch::kSm90, T, kShare>>(shape, args);
}

template <class T>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  const int64_t blocks = max_tiles(args, kRows) * 2;
  // In clusters of up to 8, which every GPU runs.
  if (blocks * 4 <= kBlocks) return launch<T, 4>(launcher, args);
  if (blocks * 2 <= kBlocks) return launch<T, 2>(launcher, args);
  return launch<T, 1>(launcher, args);
}

}  // namespace

// Where the tiles do not fill the device, or by a little more, but for many short segments that sgmv_short can take.
bool is_sgmv_split(const SgmvArgs& args) {
  if (short_segments(args) && args.num_segments > 32 && is_sgmv_short(args)) return false;
  return args.x_aligned && args.d_in % 8 == 0 && max_tiles(args, kRows) * 2 <= kBlocks * 5 / 4;
}

Status launch_sgmv_split(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda
