// dispatch_bgmv of float16 and bfloat16 where h_in is short (expand) and there are blocks enough, on sm_90: the sums of
// bgmv_bulk_short.cuh, with more weights on their way.
//
// A block takes two tiles of outputs, one after the other through the same 16 KiB of shared memory: the weights of the
// first move on to registers when they are there, and those of the second take their place. So all weights of a block
// are asked for before the wait. Each warp copies what it will multiply: none waits for another.
#pragma once

#include "src/cuda/lora/bgmv_bulk_short.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kDeepWarps = 8;
inline constexpr int kDeepTileRounds = kRoundRows * kDeepWarps;  // outputs of a tile and round

struct BulkDeepShared {
  uint64_t warp_full[kDeepWarps][2];
  BulkShortShared<kDeepWarps, false> tile;  // the weights behind it
};

constexpr size_t bulk_deep_shared_bytes(int h_in, int rounds) {
  return sizeof(BulkDeepShared) + size_t{2} * h_in * rounds * kDeepTileRounds + kImagePadding;
}

// Of the 2 * kRounds products of a warp and tile, those whose weights wait in registers: there is room for no more.
template <int kSteps, int kRounds>
inline constexpr int kDeepHeld = kSteps == 0 ? 2 * kRounds : kRounds;
// Copies of a warp's part of the second tile.
template <int kSteps, int kRounds>
inline constexpr int kDeepCopies = kDeepHeld<kSteps, kRounds> < 2 * kRounds ? 2 : 1;

// One row, everything aligned.
template <Arch kArch, class T, int kSteps, int kRounds>
__device__ __forceinline__ void bgmv_bulk_deep(const BgmvArgs& args, int64_t weights, int64_t b, int64_t m_first,
                                               int rows, BulkDeepShared& deep) {
  auto& shared = deep.tile;
  constexpr int kCount = kSteps == 0 ? 2 : 4;  // words of a lane and step
  constexpr int kLoads = kSteps == 0 ? 1 : kSteps;
  constexpr int kPart = kRoundRows * kRounds;  // outputs of a warp and tile
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in;
  const int first = warp * kPart;
  unsigned char* const image = reinterpret_cast<unsigned char*>(&shared + 1) + 2 * first * h_in;
  uint64_t* const full = deep.warp_full[warp];
  const int own_rows = rows - first;  // of this warp, the second tile's are from 4 * kPart on
  // Outputs [from, from + most) of the warp's part of a tile.
  const auto start = [&](int tile, int from, int most) {
    const int n = min(own_rows - tile * kDeepWarps * kPart - from, most);
    if (n > 0 && lane == 0) {
      const T* const w = reinterpret_cast<const T*>(weights) + args.layer_offset +
                         (m_first + first + tile * kDeepWarps * kPart + from) * h_in;
      barrier_expect(&full[tile], 2 * n * h_in);
      bulk_copy(image + 2 * from * h_in, w, 2 * n * h_in, &full[tile]);
    } else if (lane == 0) {
      barrier_expect(&full[tile], 0);
    }
  };
  start(0, 0, kPart);
  const int k_lane = 2 * kCount * t;
  const T* const x = static_cast<const T*>(args.x) + b * args.x_stride + k_lane;
  const int x_count = g == 0 ? h_in - k_lane : 0;
  const int own = first + lane * kRounds;
  T* const y0 = static_cast<T*>(args.y) + m_first + own + b * args.y_stride;
  const bool swap = kSteps > 0 && h_in % 64 == 0 && g % 2 != 0;
  float* const sums = shared.sums[warp];
  Words<kCount> xs[kLoads];
  using Outputs = Vec<T, kRounds>;
  Outputs before0;
  const auto load_y = [&](int tile) {
    const int at = tile * kDeepWarps * kPart;
    before0 = {};
    if (own + at < rows) before0 = load<T, kRounds>(y0 + at);
  };
  const auto load_rows = [&] {
#pragma unroll
    for (int s = 0; s < kLoads; ++s) xs[s] = load_x<kCount, true>(x + s * 32, x_count - s * 32);
    load_y(0);
  };
  struct Pair {
    Words<kCount> upper[kLoads], lower[kLoads];
  };
  const auto read = [&](int j) {
    const unsigned char* const upper = image + 2 * ((16 * j + g) * h_in + k_lane);
    const unsigned char* const lower = upper + 16 * h_in;
    Pair p;
    if constexpr (kSteps == 0) {
      p.upper[0] = read_image<kCount, true>(upper, h_in - k_lane);
      p.lower[0] = read_image<kCount, true>(lower, h_in - k_lane);
    } else {
      static_assert(kSteps == 2 || kSteps == 0);
      const int k0 = swap ? 32 : 0, k1 = 32 - k0;
      const Words<4> a0 = read_image<4, true>(upper + 2 * k0, h_in - k_lane - k0);
      const Words<4> b0 = read_image<4, true>(lower + 2 * k0, h_in - k_lane - k0);
      const Words<4> a1 = read_image<4, true>(upper + 2 * k1, h_in - k_lane - k1);
      const Words<4> b1 = read_image<4, true>(lower + 2 * k1, h_in - k_lane - k1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p.upper[0].values[i] = swap ? a1.values[i] : a0.values[i];
        p.lower[0].values[i] = swap ? b1.values[i] : b0.values[i];
        p.upper[1].values[i] = swap ? a0.values[i] : a1.values[i];
        p.lower[1].values[i] = swap ? b0.values[i] : b1.values[i];
      }
    }
    return p;
  };
  const auto multiply = [&](int j, const Pair& p) {
    float sum[4];
    if constexpr (kSteps == 0) {
      mma_from_zero<T>(sum, p.upper[0].values[0], p.lower[0].values[0], p.upper[0].values[1], p.lower[0].values[1],
                       xs[0].values[0], xs[0].values[1]);
    } else {
      float chains[2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) step_product<T>(chains, p.upper[s], p.lower[s], xs[s]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = chains[0][e] + chains[1][e];
    }
    if (t == 0) {
      float* const to = sums + 16 * j + g;
      to[0] = sum[0];
      to[8] = sum[2];
    }
  };
  const auto finish = [&](T* to, const Outputs& before, const float* from, int at) {
    Outputs after;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      after.values[i] = from_float<T>(fmaf(args.scale, from[own - first + i], to_float(before.values[i])));
    }
    if (own + at < rows) store<T, kRounds>(to + at, after);
  };
  if (own_rows > 0) barrier_wait<false>(&full[0], 0);
  // Products whose weights wait in registers.
  constexpr int kHeld = kDeepHeld<kSteps, kRounds>;
  Pair pairs[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) pairs[j] = read(j);
  __syncwarp();
  start(1, 0, 16 * kHeld);
  grid_dependency_wait<kArch>();
  load_rows();
#pragma unroll
  for (int j = 0; j < kHeld; ++j) multiply(j, pairs[j]);
#pragma unroll
  for (int j = kHeld; j < 2 * kRounds; ++j) multiply(j, read(j));
  __syncwarp();
  if constexpr (kHeld < 2 * kRounds) start(1, 16 * kHeld, kPart - 16 * kHeld);
  constexpr int kNext = kDeepWarps * kPart;
  finish(y0, before0, sums, 0);
  if (own_rows <= kNext) return;
  load_y(1);
  __syncwarp();
  barrier_wait<false>(&full[1], 0);
#pragma unroll
  for (int j = 0; j < 2 * kRounds; ++j) multiply(j, read(j));
  __syncwarp();
  finish(y0, before0, sums, kNext);
}

template <Arch kArch, class T, int kSteps, int kRounds>
__device__ __noinline__ void bulk_short_half(const BgmvArgs& args, int64_t m_first, int rows,
                                             BulkShortShared<kDeepWarps, false>& shared, int parity) {
  bulk_start_block<T>(args, shared.group.weights, m_first, rows, shared);
  bulk_short_tile<kArch, T, kSteps, kRounds>(args, {shared.group.count, ~uint64_t{0}}, shared.group.weights, m_first,
                                             rows, shared, parity);
}

// Under early reads alone, and where there are several adapters. Grid: (rows, blocks that share the outputs). Of a
// group of several rows the blocks of the first two take a tile each.
template <Arch kArch, class T, int kSteps, int kRounds>
__global__ void __launch_bounds__(32 * kDeepWarps, 4) bgmv_bulk_deep_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    BulkDeepShared& deep = *reinterpret_cast<BulkDeepShared*>(bulk_shared);
    auto& shared = deep.tile;
    const int warp = threadIdx.x / 32;
    const BlockRow block(args, blockIdx.x);
    constexpr int tile_rows = kRounds * kDeepTileRounds, block_rows = 2 * tile_rows;
    const auto rows_from = [&](int64_t m, int most) {
      return static_cast<int>(min(args.h_out - m, static_cast<int64_t>(most)));
    };
    {
      const int64_t m = (args.first_tile + static_cast<int64_t>(blockIdx.y)) * block_rows;
      bulk_short_prefetch<T>(args, block, m, rows_from(m, block_rows));
    }
    const auto aligned = [&](int64_t weights) {
      return args.vectors && args.wide_y && (weights + 2 * args.layer_offset) % 16 == 0;
    };
    // By another warp than the one that finds the rows, for the fence takes as long as a load.
    const auto init_barriers = [&] {
      if (threadIdx.x != 32) return;
      barrier_init(&shared.full, 1);
      for (int i = 0; i < kDeepWarps; ++i) {
        barrier_init(&deep.warp_full[i][0], 1);
        barrier_init(&deep.warp_full[i][1], kDeepCopies<kSteps, kRounds>);
      }
      barrier_init_fence();
    };
    if (args.group_rows == 1) {
      // No search: every warp finds the adapter for itself.
      RowEntries entries;
      int64_t weights;
      entries.load(args, block.b);
      init_barriers();
      __syncthreads();
      if (!entries.find(args, &weights)) {
        grid_dependency_wait<kArch>();
        return;
      }
      if (aligned(weights)) {
        const int64_t m = (args.first_tile + static_cast<int64_t>(blockIdx.y)) * block_rows;
        bgmv_bulk_deep<kArch, T, kSteps, kRounds>(args, weights, block.b, m, rows_from(m, block_rows), deep);
        return;
      }
      if (threadIdx.x == 0) {
        shared.group.weights = weights;
        shared.group.count = 1;
        shared.group.part = 0;
        shared.group.rows[0] = block.b;
      }
      __syncthreads();
    } else {
      if (warp == 0) find_group_by_warp<2>(args, block, &shared.group);
      init_barriers();
      __syncthreads();
      if (shared.group.count == 0) {
        grid_dependency_wait<kArch>();
        return;
      }
    }
    // Found anew for each: kept, it would wait in local memory.
    const auto first_output = [&] {
      int tile;
      asm volatile("mov.u32 %0, %ctaid.y;" : "=r"(tile));
      return static_cast<int64_t>(args.first_tile + tile) * block_rows;
    };
    if (args.group_rows > 1 && shared.group.count == 1 && aligned(shared.group.weights)) {
      const int64_t m = first_output();
      bgmv_bulk_deep<kArch, T, kSteps, kRounds>(args, shared.group.weights, shared.group.rows[0], m,
                                                rows_from(m, block_rows), deep);
      return;
    }
    if (const int64_t m = first_output() + shared.group.part * tile_rows; m < args.h_out) {
      bulk_short_half<kArch, T, kSteps, kRounds>(args, m, rows_from(m, tile_rows), shared, 0);
    } else {
      grid_dependency_wait<kArch>();
    }
    if (shared.group.count > 1) return;
    // One unaligned row: one tile after the other. Threads have written edges where a copy writes now.
    proxy_fence();
    __syncthreads();
    if (const int64_t m = first_output() + tile_rows; m < args.h_out) {
      bulk_short_half<kArch, T, kSteps, kRounds>(args, m, rows_from(m, tile_rows), shared, 1);
    }
  }
}

}  // namespace punica::cuda::bgmv
