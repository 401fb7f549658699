// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink) and rows share the one adapter that there is, on
// sm_90: the sums of bgmv_diagonal.cuh, term by term, with every element of the tensor-core product in use.
//
// The warps that share K there are blocks of a cluster here, and the slices of K are warps: each takes one slice of all
// outputs and rows of the cluster's tile, straight from memory to registers. No operand is read twice by a block. What
// the warps have is added up in shared memory, slice after slice, and sent to the block of the cluster that adds up the
// shares of K. Rows of a tile are neighbours in the batch, whatever their indices say: nothing is searched, and those
// that name no adapter are not stored.
#pragma once

#include <type_traits>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kSharesThreads = 32 * kSlices;

// kOut x 16 outputs, kRow x 8 rows.
template <int kOut, int kRow>
struct SharesTile {
  static constexpr int kOutputs = 16 * kOut, kRows = 8 * kRow, kPairs = kOutputs * kRows;
  // Lane (g, t) stores to 2 t rows + g: no bank conflict.
  static constexpr int kPitch = kOutputs + 4;  // floats, of a row's sums
  static constexpr int kVector = kPairs >= 1024 ? 4 : 1;
  static constexpr size_t kSharedBytes = 128 + sizeof(float) * (kSlices * kRows * kPitch + kPairs);
};

// One slice of one share of K, by a warp: the sums of the tile go to shared memory.
template <Arch kArch, class T, int kOut, int kRow, bool kAligned>
__device__ __forceinline__ void shares_accumulate(const BgmvArgs& args, const T* w, int64_t b, int m_block, int share,
                                                  float* sums) {
  using Tile = SharesTile<kOut, kRow>;
  // Steps of K on their way.
  constexpr int kDepth = !kAligned ? 1 : kOut * kRow == 1 ? 4 : kOut * kRow <= 4 ? 3 : 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, steps = args.steps, outputs = args.h_out - m_block;
  const int count = static_cast<int>(min(args.batch - b, int64_t{Tile::kRows}));
  const int k_lane = share * kDiagonalStep + 32 * warp + 8 * t;
  const int stride = kDiagonalStep << args.k_warp_bits;
  const T* const w_end = w + static_cast<int64_t>(args.h_out) * h_in;
  const T* const w_lane = w + static_cast<int64_t>(m_block + g) * h_in + k_lane;
  const T* const x_lane = static_cast<const T*>(args.x) + (b + g) * args.x_stride + k_lane;
  using Piece = std::conditional_t<kAligned, Words<4>, Unaligned<4>>;
  Piece a[kDepth][2 * kOut], xs[kDepth][kRow];
  const auto load_w = [&](int i, int step) {
    const int left = step < steps ? h_in - k_lane - step * stride : 0;
    const T* from = w_lane + step * stride;
#pragma unroll
    for (int q = 0; q < 2 * kOut; ++q) {
      const bool valid = left > 0 && 8 * q + g < outputs;
      if constexpr (kAligned) {
        a[i][q] = load_if(valid, from);
      } else {
        a[i][q].start(from, valid ? left : 0, w, w_end);
      }
      from += 8 * static_cast<int64_t>(h_in);
    }
  };
  const auto load_x = [&](int i, int step) {
    const int left = step < steps ? h_in - k_lane - step * stride : 0;
    const T* from = x_lane + step * stride;
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
      const bool valid = left > 0 && 8 * n + g < count;
      if constexpr (kAligned) {
        xs[i][n] = load_if(valid, from);
      } else {
        xs[i][n].start(from, valid ? left : 0, args.x, x_end(args, static_cast<const T*>(args.x)));
      }
      from += 8 * args.x_stride;
    }
  };
  float sum[kOut][kRow][4] = {};
  const auto multiply = [&](const Words<4>(&aw)[2 * kOut], const Words<4>(&xw)[kRow]) {
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
#pragma unroll
      for (int m = 0; m < kOut; ++m) {
        float product[4];
        step_product_from_zero<T>(product, aw[2 * m], aw[2 * m + 1], xw[n]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += product[e];
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load_w(i, i);
  if (args.early_reads) grid_dependency_wait<kArch>();
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load_x(i, i);
#pragma unroll 1
  for (int begin = 0; begin < steps; begin += kDepth) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (i > 0 && begin + i >= steps) break;
      if constexpr (kAligned) {
        multiply(a[i], xs[i]);
        load_w(i, begin + i + kDepth);
        load_x(i, begin + i + kDepth);
      } else {
        Words<4> aw[2 * kOut], xw[kRow];
#pragma unroll
        for (int q = 0; q < 2 * kOut; ++q) aw[q] = a[i][q].finish();
#pragma unroll
        for (int n = 0; n < kRow; ++n) xw[n] = xs[i][n].finish();
        load_w(i, begin + i + kDepth);
        load_x(i, begin + i + kDepth);
        multiply(aw, xw);
      }
    }
  }
  store_fragments<Tile::kPitch>(sum, sums, warp * Tile::kRows, g, t);
}

// A function of its own: what it needs takes no registers of the common way.
template <Arch kArch, class T, int kOut, int kRow>
__device__ __noinline__ void shares_accumulate_unaligned(const BgmvArgs& args, const T* w, int64_t b, int m_block,
                                                         int share, float* sums) {
  shares_accumulate<kArch, T, kOut, kRow, false>(args, w, b, m_block, share, sums);
}

// One share of K of a tile that the warps share: slice after slice, two steps at a time.
template <Arch kArch, class T, int kOut, int kRow, bool kAligned>
__device__ __forceinline__ void shares_accumulate_tile(const BgmvArgs& args, const T* w, int64_t b, int m_block,
                                                       int share, unsigned char* ring) {
  using Tile = SharesTile<kOut, kRow>;
  constexpr int kStages = Tile::kSharedStages, kStageBytes = Tile::kSharedStageBytes;
  constexpr int kOutWarps = kOut / 4, kApart = kSharesThreads / 8, kWarpOut = 4, kWarpRow = 4;
  static_assert(kOut / kWarpOut * kRow / kWarpRow == kSlices);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, outputs = args.h_out - m_block, pairs = (args.steps + 1) / 2;
  const int count = static_cast<int>(min(args.batch - b, int64_t{Tile::kRows}));
  const int stride = kDiagonalStep << args.k_warp_bits;
  const T* const x_begin = static_cast<const T*>(args.x);
  // A copy of a thread: 16 bytes of lines row, row + kApart, ...
  const int row = tid / 8, piece = tid % 8;
  const int k_thread = share * kDiagonalStep + piece / 4 * stride + piece % 4 * 8;
  const T* const w_thread = w + static_cast<int64_t>(m_block + row) * h_in + k_thread;
  const T* const x_thread = x_begin + (b + row) * args.x_stride + k_thread;
  unsigned char* const place = ring + 128 * row + 16 * (piece ^ (row % 2 * 4));
  const auto copy_lines = [&](const T* from, int64_t row_stride, int k, int lines, int used, unsigned char* to,
                              const T* begin, const T* end) {
    from += k;
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < lines / kApart; ++i) {
        start_copy<4>(reinterpret_cast<Words<4>*>(to + i * kApart * 128), from,
                      k_thread + k < h_in && row + i * kApart < used);
        from += kApart * row_stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < lines / kApart; ++i) {
        Unaligned<4> words;
        words.start(from, row + i * kApart < used ? h_in - k_thread - k : 0, begin, end);
        *reinterpret_cast<Words<4>*>(to + i * kApart * 128) = words.finish();
        from += kApart * row_stride;
      }
    }
  };
  const auto copy_w = [&](int slice, int pair, int stage) {
    copy_lines(w_thread, h_in, 32 * slice + 2 * stride * pair, Tile::kOutputs, outputs, place + stage * kStageBytes, w,
               w + static_cast<int64_t>(args.h_out) * h_in);
  };
  const auto copy_x = [&](int slice, int pair, int stage) {
    copy_lines(x_thread, args.x_stride, 32 * slice + 2 * stride * pair, Tile::kRows, count,
               place + stage * kStageBytes + 128 * Tile::kOutputs, x_begin, x_end(args, x_begin));
  };
  if (args.early_reads) {
#pragma unroll 1
    for (int i = 0; i < min(kStages - 1, kSlices * pairs); ++i) copy_w(i / pairs, i % pairs, i);
    grid_dependency_wait<kArch>();
  }
  int copy_slice = 0, copy_pair = 0, copy_stage = 0;
  const auto start = [&](bool weights) {
    if (copy_slice < kSlices) {
      if (weights) copy_w(copy_slice, copy_pair, copy_stage);
      copy_x(copy_slice, copy_pair, copy_stage);
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_pair == pairs) {
        copy_pair = 0;
        ++copy_slice;
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) start(!args.early_reads);

  float total[kWarpOut][kWarpRow][4], sum[kWarpOut][kWarpRow][4];
#pragma unroll
  for (int i = 0; i < kWarpOut * kWarpRow * 4; ++i) total[i / 4 / kWarpRow][i / 4 % kWarpRow][i % 4] = 0;
  const int out_warp = warp % kOutWarps, row_warp = warp / kOutWarps;
  const unsigned char* const w_lane = ring + 128 * (64 * out_warp + g);
  const unsigned char* const x_lane = ring + 128 * (Tile::kOutputs + 32 * row_warp + g);
  int stage = 0;
#pragma unroll 1
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int i = 0; i < kWarpOut * kWarpRow * 4; ++i) sum[i / 4 / kWarpRow][i / 4 % kWarpRow][i % 4] = 0;
#pragma unroll 1
    for (int pair = 0; pair < pairs; ++pair) {
      copy_wait<kStages - 2>();
      __syncthreads();  // this unit is there, and nobody reads the one before
      start(true);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int at = stage * kStageBytes + 16 * ((4 * s + t) ^ (g % 2 * 4));
        Words<4> a[2 * kWarpOut];
#pragma unroll
        for (int q = 0; q < 2 * kWarpOut; ++q) a[q] = *reinterpret_cast<const Words<4>*>(w_lane + at + 128 * 8 * q);
#pragma unroll
        for (int n = 0; n < kWarpRow; ++n) {
          const Words<4> xw = *reinterpret_cast<const Words<4>*>(x_lane + at + 128 * 8 * n);
#pragma unroll
          for (int m = 0; m < kWarpOut; ++m) {
            float product[4];
            step_product_from_zero<T>(product, a[2 * m], a[2 * m + 1], xw);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][n][e] += product[e];
          }
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int i = 0; i < kWarpOut * kWarpRow * 4; ++i) {
      total[i / 4 / kWarpRow][i / 4 % kWarpRow][i % 4] += sum[i / 4 / kWarpRow][i / 4 % kWarpRow][i % 4];
    }
  }
  __syncthreads();  // the ring is used no more
  store_fragments<Tile::kPitch>(total, reinterpret_cast<float*>(ring) + 64 * out_warp, 32 * row_warp, g, t);
}

template <Arch kArch, class T, int kOut, int kRow>
__device__ __noinline__ void shares_accumulate_tile_unaligned(const BgmvArgs& args, const T* w, int64_t b, int m_block,
                                                              int share, unsigned char* ring) {
  shares_accumulate_tile<kArch, T, kOut, kRow, false>(args, w, b, m_block, share, ring);
}

__device__ __forceinline__ void cluster_arrive() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// kCount floats to a place in shared memory of block `rank` of the cluster, which counts them at its barrier.
template <int kCount>
__device__ __forceinline__ void send(const float* to, uint64_t* barrier, int rank, const float (&v)[kCount]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint32_t remote = hopper::remote_address(shared_address(to), rank);
  const uint32_t remote_barrier = hopper::remote_address(shared_address(barrier), rank);
  if constexpr (kCount == 4) {
    hopper::store_async(remote, make_float4(v[0], v[1], v[2], v[3]), remote_barrier);
  } else {
    static_assert(kCount == 1);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(v[0]),
                 "r"(remote_barrier)
                 : "memory");
  }
#endif
}

// Grid: (tiles of rows x blocks of a cluster, tiles of outputs).
template <Arch kArch, class T, int kOut, int kRow>
__global__ void __launch_bounds__(kSharesThreads, kOut* kRow == 1    ? 3
                                                  : kOut * kRow <= 4 ? 2
                                                                     : 1)
    bgmv_shares_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = SharesTile<kOut, kRow>;
    constexpr int kVector = Tile::kVector;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    auto* const full = reinterpret_cast<uint64_t*>(bulk_shared);
    float* const sums = reinterpret_cast<float*>(bulk_shared + 128);
    float* const parts = sums + kSlices * Tile::kRows * Tile::kPitch;  // [share][pair of this block]
    const int tid = threadIdx.x, shares = 1 << args.k_warp_bits;
    const int share = static_cast<int>(blockIdx.x) & (shares - 1);
    const int64_t b = args.first_row + static_cast<int64_t>(blockIdx.x >> args.k_warp_bits) * Tile::kRows;
    const int m_block = (args.first_tile + static_cast<int>(blockIdx.y)) * Tile::kOutputs;
    const int count = static_cast<int>(min(args.batch - b, int64_t{Tile::kRows}));
    int64_t index = -1, address = 0;
    const auto load_entries = [&] {
      const int lane = tid % 32;
      if (lane < count) index = load_entry(args.indices + b + lane);
      address = load_entry(args.w_ptr);
    };
    if (args.early_reads) load_entries();
    const int owned = Tile::kPairs >> args.k_warp_bits;  // outputs of rows that this block adds up in the end
    if (shares > 1) {
      if (tid == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_expect(full, static_cast<int>(sizeof(float)) * Tile::kPairs);
      }
      if constexpr (!Tile::kShared) cluster_arrive();
    }
    const auto y_of = [&](int pair) {
      return static_cast<T*>(args.y) + (b + pair / Tile::kOutputs) * args.y_stride + m_block + pair % Tile::kOutputs;
    };
    {
      // Lines of x and y into the second-level cache: x of two steps, 512 bytes a row each.
      const int lines = 8 * count;
      for (int i = tid; i < lines; i += kSharesThreads) {
        const int k = ((i / 4 % 2 << args.k_warp_bits) + share) * kDiagonalStep + i % 4 * 64;
        if (k < args.h_in) prefetch_line(static_cast<const T*>(args.x) + (b + i / 8) * args.x_stride + k);
      }
      if (tid < count && share == 0) prefetch_line(y_of(tid * Tile::kOutputs));
    }
    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      load_entries();
      launch_dependents<kArch>();
    }
    static_assert(Tile::kRows <= 32);
    const uint32_t valid = __ballot_sync(0xffffffffu, index == 0);
    if (valid == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      if (!Tile::kShared && shares > 1) cluster_wait();
      return;
    }
    const T* const w = reinterpret_cast<const T*>(address) + args.layer_offset;
    const bool aligned = args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0;
    if constexpr (Tile::kShared) {
      if (aligned) {
        shares_accumulate_tile<kArch, T, kOut, kRow, true>(args, w, b, m_block, share, ring);
      } else {
        shares_accumulate_tile_unaligned<kArch, T, kOut, kRow>(args, w, b, m_block, share, ring);
      }
      if (shares > 1) cluster_arrive();  // what blocks send lies where the ring was
    } else if (aligned) {
      shares_accumulate<kArch, T, kOut, kRow, true>(args, w, b, m_block, share, sums);
    } else {
      shares_accumulate_unaligned<kArch, T, kOut, kRow>(args, w, b, m_block, share, sums);
    }
    const auto stores = [&](int pair) {
      return (valid >> (pair / Tile::kOutputs) & 1) != 0 && m_block + pair % Tile::kOutputs < args.h_out;
    };
    // The slices of kVector outputs of a row, added up.
    const auto add_slices = [&](int pair, float (&total)[kVector]) {
      const float* from = sums + pair / Tile::kOutputs * Tile::kPitch + pair % Tile::kOutputs;
#pragma unroll
      for (int slice = 0; slice < Tile::kSums; ++slice) {
        const auto v = *reinterpret_cast<const Vec<float, kVector>*>(from);
#pragma unroll
        for (int i = 0; i < kVector; ++i) total[i] = slice == 0 ? v.values[i] : total[i] + v.values[i];
        from += Tile::kRows * Tile::kPitch;
      }
    };
    if (shares == 1) {
      constexpr int kRounds = (Tile::kPairs / kVector + kSharesThreads - 1) / kSharesThreads;
      T before[kRounds][kVector];
      const auto for_pairs = [&](auto body) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const int pair = (tid + r * kSharesThreads) * kVector + i;
            if (pair < Tile::kPairs && stores(pair)) body(r, i, y_of(pair));
          }
        }
      };
      for_pairs([&](int r, int i, const T* y) { before[r][i] = *y; });
      __syncthreads();
      float total[kRounds][kVector];
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int pair = (tid + r * kSharesThreads) * kVector;
        if (pair < Tile::kPairs) add_slices(pair, total[r]);
      }
      for_pairs([&](int r, int i, T* y) { *y = from_float<T>(fmaf(args.scale, total[r][i], to_float(before[r][i]))); });
      return;
    }
    static_assert(Tile::kPairs / 2 <= 4 * kSharesThreads);
    constexpr int kMost = Tile::kPairs / 2 > kSharesThreads ? Tile::kPairs / 2 / kSharesThreads : 1;
    T before[kMost];
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      const int i = tid + r * kSharesThreads, pair = share * owned + i;
      if (i < owned && stores(pair)) before[r] = *y_of(pair);
    }
    __syncthreads();
    cluster_wait();  // the barriers of all blocks stand
    for (int pair = tid * kVector; pair < Tile::kPairs; pair += kSharesThreads * kVector) {
      float total[kVector];
      add_slices(pair, total);
      send<kVector>(parts + share * owned + pair % owned, full, pair / owned, total);
    }
    if (tid >= owned) return;
    barrier_wait<true>(full, 0);
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      const int i = tid + r * kSharesThreads, pair = share * owned + i;
      if (i >= owned || !stores(pair)) continue;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = j < shares ? parts[j * owned + i] : 0.0f;
#pragma unroll
      for (int width = 1; width < 8; width *= 2) {
        if (width < shares) {
#pragma unroll
          for (int j = 0; j < 8; j += 2 * width) v[j] += v[j + width];
        }
      }
      *y_of(pair) = from_float<T>(fmaf(args.scale, v[0], to_float(before[r])));
    }
  }
}

}  // namespace punica::cuda::bgmv
