// dispatch_bgmv of float16 and bfloat16 where h_in is two steps of the block's warps (4096) and there are blocks
// enough, on sm_90: the sums of bgmv_diagonal.cuh, with more weights on their way.
//
// A block takes eight outputs: four units of weights, 16 KiB each. Three are in shared memory; the first moves on to
// registers when it is there, and the fourth takes its place. So all weights of a block are asked for before the wait,
// and four blocks have room on a multiprocessor: 32 MiB of weights need one wave of blocks.
#pragma once

#include <algorithm>

#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kDeepOutputs = 8;  // of a block
inline constexpr int kDeepUnit = 4;     // outputs of a unit, one step of K
inline constexpr int kDeepPlaces = 3;   // units in shared memory
inline constexpr int kDeepPlaceBytes = kDeepUnit * 512 * kDiagonalWarps;

// Of a block with one row, or of one with several, which takes a half of the outputs as bgmv_diagonal_kernel would.
constexpr size_t deep_shared_bytes(int group_rows) {
  const size_t deep = sizeof(DiagonalShared) + size_t{kDeepPlaces} * kDeepPlaceBytes +
                      sizeof(float) * kSlices * kDeepOutputs * kDiagonalWarps;
  return std::max(deep, diagonal_shared_bytes(group_rows, kDeepUnit, kDiagonalWarps, 2));
}

// One row, everything aligned.
template <Arch kArch, class T>
__device__ __forceinline__ void diagonal_block_deep(const BgmvArgs& args, DiagonalShared& shared, int m_block) {
  constexpr int kWarps = kDiagonalWarps, kUnit = kDeepUnit;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in;
  const int k_lane = warp * kDiagonalStep + 8 * lane;
  constexpr int kStride = kDiagonalStep * kWarps;
  constexpr int kPlace = 512 * kWarps;  // bytes from an output's piece to the next one's
  const uint32_t image = shared_address(&shared + 1) + 16 * threadIdx.x;
  const T* const weights = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset +
                           static_cast<int64_t>(m_block) * h_in + k_lane;
  const int rest = args.h_out - m_block;
  const auto start_unit = [&](int unit, int place) {
    const T* w = weights + static_cast<int64_t>(unit / 2 * kUnit) * h_in + unit % 2 * kStride;
#pragma unroll
    for (int q = 0; q < kUnit; ++q) {
      if (unit / 2 * kUnit + q < rest) {
        copy_piece(image + (place * kUnit + q) * kPlace, w);
      }
      w += h_in;
    }
    copy_commit();
  };
  const auto read = [&](int place, int q) { return read_piece(image + (place * kUnit + q) * kPlace); };
  // Early, a unit is asked for when the one before it is there: what the kernel before still has to read and write
  // stands in line behind all that has been asked for. Else, two at a time.
  start_unit(0, 0);
  if (!args.early_reads) start_unit(1, 1);
  const T* const x = static_cast<const T*>(args.x) + shared.group.rows[0] * args.x_stride + k_lane;
  float* const sums =
      reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&shared + 1) + kDeepPlaces * kDeepPlaceBytes);
  float* const to = sums + (t == g / 2 ? warp * kSlices + g : 0);
  Words<4> xs[2];
  T y_before = from_float<T>(0.0f);
  const auto load_rows = [&] {
    xs[0] = load_if(true, x);
    xs[1] = load_if(true, x + kStride);
    const DiagonalOutput<T, kDeepOutputs, kWarps> output(args, shared, 1, shared.group.rows[0], m_block);
    if (output.stores) y_before = *output.y;
  };
  if (!args.early_reads) load_rows();
  Words<4> first[kUnit];
  if (args.early_reads) {
    copy_wait<0>();
    start_unit(1, 1);
    copy_wait<0>();
    start_unit(2, 2);
    copy_wait<0>();
  } else {
    copy_wait<1>();
    start_unit(2, 2);
    copy_wait<1>();
  }
#pragma unroll
  for (int q = 0; q < kUnit; ++q) first[q] = read(0, q);
  start_unit(3, 0);
  if (args.early_reads) {
    grid_dependency_wait<kArch>();
    load_rows();
  }
  __syncwarp();
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    float sum[kUnit] = {};
    const auto multiply = [&](int p, const Words<4>& upper, const Words<4>& lower, const Words<4>& xk) {
      add_diagonals<T>(sum[2 * p], sum[2 * p + 1], upper, lower, xk, g);
    };
    if (tile == 0) {
      multiply(0, first[0], first[1], xs[0]);
      multiply(1, first[2], first[3], xs[0]);
      copy_wait<2>();
    } else {
      copy_wait<1>();
      multiply(0, read(2, 0), read(2, 1), xs[0]);
      multiply(1, read(2, 2), read(2, 3), xs[0]);
      copy_wait<0>();
    }
#pragma unroll
    for (int p = 0; p < 2; ++p) multiply(p, read(1 - tile, 2 * p), read(1 - tile, 2 * p + 1), xs[1]);
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kUnit; ++q) to[(tile * kUnit + q) * kWarps * kSlices] = sum[q];
    }
  }
  // Once more rather than kept: there are no registers left for it.
  int again = m_block;
  asm volatile("" : "+r"(again) : : "memory");
  const DiagonalOutput<T, kDeepOutputs, kWarps> output(args, shared, 1, shared.group.rows[0], again);
  __syncthreads();
  output.add(args, sums, 1, y_before);
}

// Grid: (blocks that share the outputs, rows). Of a group of several rows the blocks of the first two take half of the
// outputs each.
template <Arch kArch, class T>
__global__ void __launch_bounds__(32 * kDiagonalWarps, 4)
    bgmv_diagonal_deep_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kWarps = kDiagonalWarps;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(bulk_shared);
    const int warp = threadIdx.x / 32;
    const BlockRow block(args, blockIdx.y);
    diagonal_prefetch<T>(args, block, kDeepOutputs);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp<2>(args, block, &shared.group);
    __syncthreads();
    if (!args.early_reads) launch_dependents<kArch>();
    if (shared.group.count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
    } else if (shared.group.count == 1 && diagonal_aligned(args, shared.group.weights)) {
      diagonal_block_deep<kArch, T>(args, shared, diagonal_first_output(args, kDeepOutputs));
    } else {
      // One unaligned row: one half after the other.
      const int halves = shared.group.count == 1 ? 2 : 1;
#pragma unroll 1
      for (int half = 0; half < halves; ++half) {
        if (half > 0) __syncthreads();  // the sums have been read
        const int m = diagonal_first_output(args, kDeepOutputs) + kDeepUnit * (half + shared.group.part);
        if (m >= args.h_out) {
          if (args.early_reads) grid_dependency_wait<kArch>();
        } else if (diagonal_aligned(args, shared.group.weights)) {
          diagonal_group_aligned<kArch, T, kDeepUnit, kWarps, 2, true, false>(args, shared, m);
        } else {
          diagonal_block_general<kArch, T, kDeepUnit, kWarps>(args, shared, m);
        }
      }
    }
  }
}

}  // namespace punica::cuda::bgmv
