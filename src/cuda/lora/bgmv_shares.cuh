// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink) and rows share the one adapter that there is, on
// sm_90: the sums of bgmv_diagonal.cuh, term by term, with every element of the tensor-core product in use.
//
// The warps that share K there are blocks of a cluster here, and the slices of K are warps: each takes one slice of all
// outputs and rows of the cluster's tile. A step of all slices of a row, 512 neighbouring bytes, comes to a ring in
// shared memory by one access of a warp; of what is not aligned the aligned pieces that hold it, to be shifted into
// place by the warp that multiplies it, as no operand is read twice. What the warps have is added up in shared memory,
// slice after slice, and sent to the block of the cluster that adds up the shares of K. Rows of a tile are neighbours
// in the batch, whatever their indices say: nothing is searched, and those that name no adapter are not stored.
#pragma once

#include <algorithm>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kSharesThreads = 32 * kSlices;

// kOut x 16 outputs, kRow x 8 rows.
template <int kOut, int kRow>
struct SharesTile {
  static constexpr int kOutputs = 16 * kOut, kRows = 8 * kRow, kPairs = kOutputs * kRows;
  static constexpr int kLines = kOutputs + kRows;           // of one step of a row
  static constexpr int kBlocks = kOut * kRow == 1 ? 3 : 2;  // of a multiprocessor
  // A line: the step's 512 bytes, or the aligned pieces that hold them.
  template <bool kAligned>
  static constexpr int kLineBytes = kAligned ? 512 : 512 + 16;
  static constexpr int kRoom = (227 << 10) / kBlocks - 1024 - 128 - 4 * kPairs;
  template <bool kAligned>
  static constexpr int kStages = std::min(4, kRoom / (kLines * kLineBytes<kAligned>));
  // Lane (g, t) stores to 2 t rows + g: no bank conflict.
  static constexpr int kPitch = kOutputs + 4;  // floats, of a row's sums
  static constexpr int kVector = kPairs >= 1024 ? 4 : 1;
  static constexpr int kSumBytes = 4 * kSlices * kRows * kPitch;
  // The barrier; what the blocks of the cluster send; the ring, later the sums.
  static constexpr size_t kSharedBytes =
      128 + 4 * kPairs +
      std::max({kStages<true> * kLines * kLineBytes<true>, kStages<false> * kLines * kLineBytes<false>, kSumBytes});
};

// One share of K, a slice a warp: the sums of the tile go to where the ring was.
template <Arch kArch, class T, int kOut, int kRow, bool kAligned>
__device__ __forceinline__ void shares_accumulate(const BgmvArgs& args, const T* w, int64_t b, int m_block, int share,
                                                  unsigned char* ring) {
  using Tile = SharesTile<kOut, kRow>;
  constexpr int kLineBytes = Tile::template kLineBytes<kAligned>, kStages = Tile::template kStages<kAligned>;
  constexpr int kStageBytes = kLineBytes * Tile::kLines;
  static_assert(kStages >= 2);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, steps = args.steps, outputs = args.h_out - m_block;
  const int count = static_cast<int>(min(args.batch - b, int64_t{Tile::kRows}));
  const int stride = kDiagonalStep << args.k_warp_bits;
  const T* const x_begin = static_cast<const T*>(args.x);
  // A warp copies a step of a row at a time, of lines warp, warp + 8, ...; this lane's piece of it. Odd rows have
  // halves of 128 bytes exchanged, so that the eight lanes of a later access, two rows of 64 bytes, meet no conflict.
  const T* const w_row = w + static_cast<int64_t>(m_block + warp) * h_in + share * kDiagonalStep;
  const T* const x_row = x_begin + (b + warp) * args.x_stride + share * kDiagonalStep;
  unsigned char* const place = ring + kLineBytes * warp + 16 * (kAligned ? lane ^ (warp % 2 * 4) : lane);
  const auto copy_lines = [&](const T* from, int64_t row_stride, int step, int lines, int used, unsigned char* to,
                              const T* begin, const T* end) {
    const int left = h_in - share * kDiagonalStep - step * stride;  // elements of the row
    from += step * stride;
    if constexpr (kAligned) {
      const bool valid = 8 * lane < left;
      from += 8 * lane;
#pragma unroll
      for (int i = 0; i < lines / 8; ++i) {
        start_copy<4>(reinterpret_cast<Words<4>*>(to + 8 * i * kLineBytes), from, valid && warp + 8 * i < used);
        from += 8 * row_stride;
      }
    } else {
      const auto copy_piece = [&](const T* row, int piece, bool valid, unsigned char* piece_to) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(row), window = (address & ~uintptr_t{15}) + 16 * piece;
        const uintptr_t first = reinterpret_cast<uintptr_t>(begin), last = reinterpret_cast<uintptr_t>(end);
        valid = valid && left > 0 && window < address + 2 * static_cast<int64_t>(left);
        auto* const words = reinterpret_cast<Words<4>*>(piece_to);
        if (!valid || (window >= first && window + 16 <= last)) {
          start_copy<4>(words, reinterpret_cast<const void*>(window), valid);
        } else {
          *words = load_window(window, first, last);
        }
      };
#pragma unroll 2
      for (int i = 0; i < lines / 8; ++i) {
        copy_piece(from + 8 * i * row_stride, lane, warp + 8 * i < used, to + 8 * i * kLineBytes);
      }
      if (lane < lines / 8) {
        copy_piece(from + 8 * lane * row_stride, 32, warp + 8 * lane < used,
                   to + 8 * lane * kLineBytes + 16 * (32 - lane));
      }
    }
  };
  const auto copy_w = [&](int step, int stage) {
    copy_lines(w_row, h_in, step, Tile::kOutputs, outputs, place + stage * kStageBytes, w,
               w + static_cast<int64_t>(args.h_out) * h_in);
  };
  const auto copy_x = [&](int step, int stage) {
    copy_lines(x_row, args.x_stride, step, Tile::kRows, count,
               place + stage * kStageBytes + Tile::kOutputs * kLineBytes, x_begin, x_end(args, x_begin));
  };
#pragma unroll 1
  for (int i = 0; i < min(kStages - 1, steps); ++i) copy_w(i, i);
  if (args.early_reads) grid_dependency_wait<kArch>();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) copy_x(i, i);
    copy_commit();
  }

  // Rows 8 q + g of the tile lie at the same place of 16 bytes.
  const auto shift_of = [&](const T* row) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row) & 15); };
  const uint32_t w_shift = shift_of(w + static_cast<int64_t>(m_block + g) * h_in);
  const uint32_t x_shift = shift_of(x_begin + (b + g) * args.x_stride);
  float sum[kOut][kRow][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this step is there, and nobody reads the one before
    {
      const int next = step + kStages - 1, to = stage == 0 ? kStages - 1 : stage - 1;
      if (next < steps) {
        copy_w(next, to);
        copy_x(next, to);
      }
      copy_commit();
    }
    const unsigned char* const from = ring + stage * kStageBytes + kLineBytes * g;
    const int left = h_in - share * kDiagonalStep - step * stride - 32 * warp - 8 * t;
    const auto read = [&](int line, uint32_t shift) {
      const unsigned char* const at = from + kLineBytes * line;
      if constexpr (kAligned) {
        return *reinterpret_cast<const Words<4>*>(at + 16 * ((4 * warp + t) ^ (g % 2 * 4)));
      } else {
        const auto* const pieces = reinterpret_cast<const Words<4>*>(at + 16 * (4 * warp + t));
        Words<4> r = shift_pieces<4>(pieces[0], pieces[1], shift);
        if (left < 8) clear_from(left, r);
        return r;
      }
    };
    Words<4> a[2 * kOut];
#pragma unroll
    for (int q = 0; q < 2 * kOut; ++q) a[q] = read(8 * q, w_shift);
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
      const Words<4> xw = read(Tile::kOutputs + 8 * n, x_shift);
#pragma unroll
      for (int m = 0; m < kOut; ++m) {
        float product[4];
        step_product_from_zero<T>(product, a[2 * m], a[2 * m + 1], xw);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += product[e];
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __syncthreads();  // the ring is used no more
  store_fragments<Tile::kPitch>(sum, reinterpret_cast<float*>(ring), warp * Tile::kRows, g, t);
}

// A function of its own: what it needs takes no registers of the common way.
template <Arch kArch, class T, int kOut, int kRow>
__device__ __noinline__ void shares_accumulate_unaligned(const BgmvArgs& args, const T* w, int64_t b, int m_block,
                                                         int share, unsigned char* ring) {
  shares_accumulate<kArch, T, kOut, kRow, false>(args, w, b, m_block, share, ring);
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
__global__ void __launch_bounds__(kSharesThreads, SharesTile<kOut, kRow>::kBlocks)
    bgmv_shares_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = SharesTile<kOut, kRow>;
    constexpr int kVector = Tile::kVector;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    auto* const full = reinterpret_cast<uint64_t*>(bulk_shared);
    float* const parts = reinterpret_cast<float*>(bulk_shared + 128);  // [share][pair of this block]
    unsigned char* const ring = reinterpret_cast<unsigned char*>(parts + Tile::kPairs);
    float* const sums = reinterpret_cast<float*>(ring);
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
      cluster_arrive();
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
      if (shares > 1) cluster_wait();
      return;
    }
    const T* const w = reinterpret_cast<const T*>(address) + args.layer_offset;
    if (args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
      shares_accumulate<kArch, T, kOut, kRow, true>(args, w, b, m_block, share, ring);
    } else {
      shares_accumulate_unaligned<kArch, T, kOut, kRow>(args, w, b, m_block, share, ring);
    }
    const auto stores = [&](int pair) {
      return (valid >> (pair / Tile::kOutputs) & 1) != 0 && m_block + pair % Tile::kOutputs < args.h_out;
    };
    // The slices of kVector outputs of a row, added up.
    const auto add_slices = [&](int pair, float (&total)[kVector]) {
      const float* from = sums + pair / Tile::kOutputs * Tile::kPitch + pair % Tile::kOutputs;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
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
