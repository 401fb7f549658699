// sgmv_shrink for float16 and bfloat16 on the sm_90 path where d_in is large and d_out small: x is what moves.
//
// A block has a tile of rows and, with the three others of its cluster, a quarter of d_in, and walks over them in
// stages of 16 rows x 1024 of K (512 with 64 columns): one bulk copy a row, 1 or 2 KiB, which is what makes DRAM fast,
// into a ring that mbarriers guard. No barrier of the block is in the way. W goes straight into registers as fragments
// of mma.m16n8k16, once for all rows of the tile. A warp has 128 of K of a stage and 16 columns. K is permuted within
// chunks of 32, in x and W alike, so that a lane's part of a chunk is eight adjacent elements: one 16-byte access of
// either.
//
// In the end the warps' sums are added in the order of K, and the blocks' of a cluster, which travel through
// distributed shared memory to the block that owns the rows, in order of the blocks.
#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kChunk = 32;      // of K: two products
constexpr int kWarpChunks = 4;  // of a warp in a stage
constexpr int kCluster = 4;
constexpr int64_t kPrefetch = 1024;  // of K, of each row

// kGroups: groups of 16 rows of a tile.
template <int kCols, int kGroups>
struct Stream {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWarpsN = kCols / 16;
  static constexpr int kWarpsK = kWarps / kWarpsN;
  static constexpr int kRows = kGroups * 16;
  static constexpr int kDepth = kWarpsK * kWarpChunks * kChunk;
  // A row in shared memory: room for what it starts off 16 bytes, and two rows are in different halves of the banks.
  static constexpr int kPitch = kDepth * 2 + 64;
  static constexpr int kStageBytes = 16 * kPitch;
  static constexpr int kStages = kGroups == 1 ? (kCols == 16 ? 2 : 8) : kCols == 16 ? 3 : 21;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kRows * kCols * 4;  // of one warp along K, or of one block
  static constexpr int kMinBlocks = kGroups == 1 || kCols == 16 ? 2 : 1;
  // Registers hold W of the next stages too.
  static constexpr bool kAhead = kMinBlocks == 1;
  static_assert(kWarpsK * kSumBytes <= kRingBytes);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of the given parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Addresses and size are multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Writes to another block of the cluster, and counts the 16 bytes at its barrier.
__device__ __forceinline__ void store_async(uint32_t remote, float4 v, uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier)
      : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// Eight 16-bit elements at an address that is a multiple of 2, of which `count` (possibly negative) stay; zeros behind.
__device__ __forceinline__ uint4 load_shared_eight(uint32_t address, int64_t count) {
  const uint32_t from = address & ~3u, shift = (address & 2u) * 8;
  uint32_t words[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = load_shared_4(from + i * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = __funnelshift_r(words[i], words[i + 1], shift);
    if (count < i * 2 + 2) words[i] = count == i * 2 + 1 ? words[i] & 0xffffu : 0;
  }
  return {words[0], words[1], words[2], words[3]};
}

#endif

// kFast: rows of x start at multiples of 16 bytes, and d_in is a multiple of 32.
template <class T, int kCols, int kGroups, bool kFast>
__global__ void __launch_bounds__(Stream<kCols, kGroups>::kThreads, Stream<kCols, kGroups>::kMinBlocks)
    sgmv_stream(const SgmvArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr Arch kArch = Arch::kSm90;
  using S = Stream<kCols, kGroups>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SgmvScratch<S::kThreads> scratch;
  __shared__ __align__(8) uint64_t barriers[2 * S::kStages + 1];
  launch_dependents<kArch>();

  const uint32_t rank = blockIdx.x % kCluster;
  const uint32_t blocks_n = static_cast<uint32_t>((args.d_out + kCols - 1) / kCols);
  const int64_t column = int64_t{blockIdx.x / kCluster % blocks_n} * kCols;
  const uint32_t number = blockIdx.x / kCluster / blocks_n;
  const int64_t chunks = (args.d_in + kChunk - 1) / kChunk;
  const int64_t part_begin = chunks * rank / kCluster * kChunk;
  const int64_t part_end = min(chunks * (rank + 1) / kCluster * kChunk, args.d_in);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const uint32_t full = shared_address(barriers), empty = full + S::kStages * 8,
                 received_barrier = empty + S::kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + i * 8, 16);
      barrier_init(empty + i * 8, S::kWarps);
    }
    barrier_init(received_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(received_barrier, S::kSumBytes);
  }

  // The 16-byte granules that hold elements [k, end) of a row of x.
  const auto granules = [&](int64_t row, int64_t k, int64_t end, const unsigned char** from) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(static_cast<const T*>(args.x) + row * args.x_stride + k);
    const uintptr_t last = first + static_cast<uintptr_t>(end - k) * 2 + 15;
    *from = reinterpret_cast<const unsigned char*>(first & ~uintptr_t{15});
    return static_cast<int>((last & ~uintptr_t{15}) - (first & ~uintptr_t{15}));
  };
  const auto prefetch = [&](int64_t first_row, int64_t rows) {
    if (threadIdx.x < rows && threadIdx.x < S::kRows) {
      const unsigned char* from;
      const int bytes = granules(first_row + threadIdx.x, part_begin, min(part_begin + kPrefetch, part_end), &from);
      prefetch_bulk(from, bytes);
    }
  };
  if (!args.early_reads) {
    // Before the wait: asking the L2 cache, where all writes of the kernel before end up, for lines is no read. The
    // rows are those of the tile if the segments cover all rows in order, as they mostly do; if not, a neighbour needs
    // them.
#ifndef PUNICA_SGMV_NO_PREFETCH
    prefetch(int64_t{number} * S::kRows, args.rows - int64_t{number} * S::kRows);
    prefetch_tables(args);
#endif
    grid_dependency_wait<kArch>();
  }
  SgmvTile<T> tile;
  if (!find_tile<S::kRows, S::kThreads>(args, number, scratch, &tile)) {
    if (args.early_reads) grid_dependency_wait<kArch>();
    return;  // the other blocks of the cluster find the same
  }
  __syncthreads();  // barriers are ready
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

  const int groups = (tile.rows + 15) / 16;
  const int supers = static_cast<int>((part_end - part_begin + S::kDepth - 1) / S::kDepth);
  const int total = groups * supers;
  const uint32_t ring = shared_address(memory);

  // Stage number `fill_next`, by the lanes of warp 0, a row each.
  int fill_next = 0, fill_super = 0, fill_group = 0, fill_stage = 0, fill_parity = 1;
  const auto fill = [&] {
    if (fill_next >= total) return;
    if (fill_next >= S::kStages) barrier_wait(empty + fill_stage * 8, fill_parity);
    if (lane < 16) {
      const int row = fill_group * 16 + lane;
      const int64_t k = part_begin + int64_t{fill_super} * S::kDepth;
      const uint32_t barrier = full + fill_stage * 8;
      if (row < tile.rows) {
        const unsigned char* from;
        const int bytes = granules(tile.row + row, k, min(k + S::kDepth, part_end), &from);
        barrier_expect(barrier, bytes);
        copy_bulk(ring + fill_stage * S::kStageBytes + lane * S::kPitch, from, bytes, barrier);
      } else {
        barrier_arrive(barrier);
      }
    }
    ++fill_next;
    if (++fill_group == groups) fill_group = 0, ++fill_super;
    if (++fill_stage == S::kStages) fill_stage = 0, fill_parity ^= 1;
  };

  const int warp_k = warp / S::kWarpsN, g = lane / 4, t = lane % 4;
  const int64_t warp_column = column + warp % S::kWarpsN * 16;
  // The warp's part of W in one step over K: [chunk][product of 8 columns].
  const bool w_aligned = reinterpret_cast<uintptr_t>(tile.w) % 16 == 0 && args.d_in % 8 == 0;
  uint4 w[kWarpChunks][2];
  const auto load_weights = [&](int super, uint4(&w)[kWarpChunks][2]) {
    const int64_t k = part_begin + int64_t{super} * S::kDepth + warp_k * (kWarpChunks * kChunk) + t * 8;
    const T* from = tile.w + (warp_column + g) * args.d_in + k;
    if (w_aligned) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
          w[c][n] = {0, 0, 0, 0};
          if (warp_column + n * 8 + g < args.d_out && k + c * kChunk < part_end) {
            w[c][n] = __ldg(reinterpret_cast<const uint4*>(from + n * 8 * args.d_in + c * kChunk));
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
          const int64_t rest = warp_column + n * 8 + g < args.d_out ? part_end - k - c * kChunk : 0;
          w[c][n] = load_eight_words(reinterpret_cast<const uint16_t*>(from + n * 8 * args.d_in + c * kChunk),
                                     static_cast<int>(min(max(rest, int64_t{0}), int64_t{8})));
          __syncwarp();  // one after the other: all at once take more registers than there are
        }
      }
    }
  };

  if (args.early_reads) {
    load_weights(0, w);
    grid_dependency_wait<kArch>();
  }
  if (warp == 0) {
#pragma unroll 1
    for (int i = 0; i < S::kStages; ++i) fill();
  }
  if (!args.early_reads) load_weights(0, w);

  // What the thread has of y in the end: elements id(i) of the rows that the block owns.
  constexpr int kShare = S::kRows / kCluster;
  constexpr int kElements = kShare * kCols;
  constexpr int kEach = (kElements + S::kThreads - 1) / S::kThreads;
  const int share_row = static_cast<int>(rank) * kShare;
  T* const y = static_cast<T*>(args.y) + (tile.row + share_row) * args.y_stride + column;
  const auto is_mine = [&](int id) {
    return id < kElements && share_row + id / kCols < tile.rows && column + id % kCols < args.d_out;
  };
  const auto element = [&](int id) { return y + id / kCols * args.y_stride + id % kCols; };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int id = i * S::kThreads + static_cast<int>(threadIdx.x);
    if (is_mine(id)) prefetch_l2(element(id));
  }

  float sums[kGroups][2][4] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int super = 0; super < supers; ++super) {
    uint4 next[kWarpChunks][2];
    if constexpr (S::kAhead) {
      if (super + 1 < supers) load_weights(super + 1, next);
    } else {
      if (super > 0) load_weights(super, w);
    }
    const int64_t step_k = part_begin + int64_t{super} * S::kDepth, k = step_k + warp_k * (kWarpChunks * kChunk);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group < groups) {
        barrier_wait(full + stage * 8, parity);
        const uint32_t row =
            ring + stage * S::kStageBytes + g * S::kPitch + warp_k * (kWarpChunks * kChunk * 2) + t * 16;
        // What the rows start off 16 bytes, in bytes; rows behind the end have anything, which stays in their sums.
        const auto off = [&](int r) {
          return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(args.x) +
                                       2 * ((tile.row + group * 16 + r) * args.x_stride + step_k)) %
                 16;
        };
        const uint32_t row0 = kFast ? row : row + off(g);
        const uint32_t row1 = kFast ? row + 8 * S::kPitch : row + 8 * S::kPitch + off(g + 8);
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
          if (k + c * kChunk < part_end) {
            const int64_t count = kFast ? 8 : part_end - (k + c * kChunk + t * 8);
            const uint4 v0 =
                kFast ? load_shared_16(row0 + c * kChunk * 2) : load_shared_eight(row0 + c * kChunk * 2, count);
            const uint4 v1 =
                kFast ? load_shared_16(row1 + c * kChunk * 2) : load_shared_eight(row1 + c * kChunk * 2, count);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              mma_m16n8k16<T>(sums[group][n], {v0.x, v1.x, v0.y, v1.y}, {w[c][n].x, w[c][n].y});
              mma_m16n8k16<T>(sums[group][n], {v0.z, v1.z, v0.w, v1.w}, {w[c][n].z, w[c][n].w});
            }
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + stage * 8);
        if (++stage == S::kStages) stage = 0, parity ^= 1;
        if (warp == 0) fill();
      }
    }
    if constexpr (S::kAhead) {
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) w[c][0] = next[c][0], w[c][1] = next[c][1];
    }
  }

  // The warps' sums: [warp_k][row][column] over the ring.
  T old[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int id = i * S::kThreads + static_cast<int>(threadIdx.x);
    old[i] = from_float<T>(0.0f);
    if (is_mine(id)) old[i] = *element(id);
  }
  __syncthreads();
  float* const parts = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float* to = parts + (warp_k * S::kRows + group * 16 + g) * kCols + warp % S::kWarpsN * 16 + n * 8 + t * 2;
      *reinterpret_cast<float2*>(to) = {sums[group][n][0], sums[group][n][1]};
      *reinterpret_cast<float2*>(to + 8 * kCols) = {sums[group][n][2], sums[group][n][3]};
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const uint32_t received = ring + S::kRingBytes;
#pragma unroll
  for (int id = threadIdx.x; id < S::kRows * kCols / 4; id += S::kThreads) {
    float4 sum = reinterpret_cast<const float4*>(parts)[id];
#pragma unroll
    for (int k = 1; k < S::kWarpsK; ++k) {
      const float4 part = reinterpret_cast<const float4*>(parts)[k * (S::kRows * kCols / 4) + id];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const uint32_t owner = id / (kElements / 4);
    store_async(remote_address(received + (rank * (kElements / 4) + id % (kElements / 4)) * 16, owner), sum,
                remote_address(received_barrier, owner));
  }
  barrier_wait(received_barrier, 0);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int id = i * S::kThreads + static_cast<int>(threadIdx.x);
    if (!is_mine(id)) continue;
    const float* part = reinterpret_cast<const float*>(memory + S::kRingBytes) + id;
    float sum = part[0];
#pragma unroll
    for (int k = 1; k < kCluster; ++k) sum += part[k * kElements];
    *element(id) = from_float<T>(to_float(old[i]) + sum);
  }
#endif
}

template <class T, int kCols, int kGroups, bool kFast>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using S = Stream<kCols, kGroups>;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(max_tiles(args, S::kRows) * ((args.d_out + kCols - 1) / kCols) * kCluster);
  shape.block = S::kThreads;
  shape.shared_bytes = S::kRingBytes + S::kSumBytes;
  shape.cluster = kCluster;
  return launcher.launch<sgmv_stream<T, kCols, kGroups, kFast>>(shape, args);
}

template <class T, int kCols, int kGroups>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  return args.x_aligned && args.d_in % kChunk == 0 ? launch<T, kCols, kGroups, true>(launcher, args)
                                                   : launch<T, kCols, kGroups, false>(launcher, args);
}

template <class T>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if (args.d_out <= 16) {
    return short_segments(args) ? launch<T, 16, 1>(launcher, args) : launch<T, 16, 4>(launcher, args);
  }
  return short_segments(args) ? launch<T, 64, 1>(launcher, args) : launch<T, 64, 8>(launcher, args);
}

}  // namespace

Status launch_sgmv_stream(const Launcher& launcher, DType dtype, const SgmvArgs& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda
