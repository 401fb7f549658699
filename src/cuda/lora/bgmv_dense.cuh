// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink) and many rows share an adapter, on sm_90: the sums of
// bgmv_diagonal.cuh, term by term, with every element of the tensor-core product in use.
//
// A warp takes a tile of outputs and rows and one of the shares of K. Of that it takes slice after slice (the rows of a
// diagonal there), so that no more than one slice's sums are open at a time. Its operands come to it through a ring in
// shared memory that no other warp looks at, each lane's by that lane: nothing waits but for copies, until the warps'
// sums meet.
#pragma once

#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kDenseThreads = 256;
inline constexpr int kDenseWarps = kDenseThreads / 32;

// A warp's tile: kOut x 16 outputs, kRow x 8 rows.
template <int kOut, int kRow>
struct DenseTile {
  static constexpr int kOutputs = 16 * kOut, kRows = 8 * kRow;
  static constexpr int kPieces = 2 * kOut + kRow;  // of 16 bytes, of a lane and unit
  static constexpr int kStages = (192 << 10) / (kPieces * 16 * kDenseThreads);
  static constexpr int kPitch = kOutputs + 4;  // floats; of the sums of a row
  static constexpr size_t kSharedBytes =
      sizeof(DiagonalShared) + std::max(kStages * kPieces * 16 * kDenseThreads, kDenseWarps * kRows * kPitch * 4);
};

// Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kOut, int kRow>
__global__ void __launch_bounds__(kDenseThreads, 1) bgmv_dense_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = DenseTile<kOut, kRow>;
    constexpr int kStages = Tile::kStages, kPieces = Tile::kPieces;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(bulk_shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int k_warps = 1 << args.k_warp_bits, h_in = args.h_in;
    const BlockRow block(args);
    const int m_block =
        (args.first_tile + static_cast<int>(blockIdx.y)) * (Tile::kOutputs * kDenseWarps >> args.k_warp_bits);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp(args, block, &shared.group);
    if (!args.early_reads) launch_dependents<kArch>();
    __syncthreads();
    const int count = shared.group.count;
    if (count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }

    const T* const w = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
    const bool aligned = reinterpret_cast<uintptr_t>(w) % 16 == 0;
    const int m0 = m_block + (warp >> args.k_warp_bits) * Tile::kOutputs;
    const int outputs = args.h_out - m0;
    const T* const w_lane = w + static_cast<int64_t>(m0 + g) * h_in;
    const T* x_lane[kRow];
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
      const int row = 8 * n + g;
      x_lane[n] = static_cast<const T*>(args.x) + shared.group.rows[row < count ? row : 0] * args.x_stride;
    }
    // A unit: of a slice, what lies in one step. Slice after slice; this lane's first element of K.
    const int units = kSlices * args.steps;
    const auto k_of = [&](int slice, int step) {
      return (((step << args.k_warp_bits) + (warp & (k_warps - 1))) * kSlices + slice) * 32 + 8 * t;
    };
    Words<4>* const places = reinterpret_cast<Words<4>*>(&shared + 1) + tid;
    int copy_slice = 0, copy_step = 0, copy_stage = 0;
    const auto start_w = [&](int k, int stage) {
#pragma unroll
      for (int i = 0; i < 2 * kOut; ++i) {
        Words<4>* const to = places + (stage * kPieces + i) * kDenseThreads;
        const T* const from = w_lane + static_cast<int64_t>(8 * i) * h_in + k;
        const bool valid = k < h_in && 8 * i + g < outputs;
        if (aligned) {
          start_copy<4>(to, from, valid);
        } else {
          Words<4> piece = {};
          if (valid) {
            const auto begin = reinterpret_cast<uintptr_t>(from);
            const uintptr_t window = begin & ~uintptr_t{15};
            piece = shift_windows(load_window(window, begin, begin + 16), load_window(window + 16, begin, begin + 16),
                                  static_cast<int>(begin & 15), 8);
          }
          *to = piece;
        }
      }
    };
    const auto start_x = [&](int k, int stage) {
#pragma unroll
      for (int n = 0; n < kRow; ++n) {
        start_copy<4>(places + (stage * kPieces + 2 * kOut + n) * kDenseThreads, x_lane[n] + k,
                      k < h_in && 8 * n + g < count);
      }
    };
    const auto advance = [&] {
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_step == args.steps) {
        copy_step = 0;
        ++copy_slice;
      }
    };
    const auto start_unit = [&] {
      if (copy_slice < kSlices) {
        const int k = k_of(copy_slice, copy_step);
        start_w(k, copy_stage);
        start_x(k, copy_stage);
        advance();
      }
      copy_commit();
    };
    if (args.early_reads) {
      for (int i = 0; i < min(kStages - 1, units); ++i) start_w(k_of(i / args.steps, i % args.steps), i);
      grid_dependency_wait<kArch>();
      for (int i = 0; i < kStages - 1; ++i) {
        if (i < units) {
          start_x(k_of(i / args.steps, i % args.steps), i);
          advance();
        }
        copy_commit();
      }
    } else {
      for (int i = 0; i < kStages - 1; ++i) start_unit();
    }

    float total[kOut][kRow][4], sum[kOut][kRow][4];
    int stage = 0;
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int i = 0; i < kOut * kRow * 4; ++i) sum[i / 4 / kRow][i / 4 % kRow][i % 4] = 0;
#pragma unroll 1
      for (int step = 0; step < args.steps; ++step) {
        copy_wait<kStages - 2>();
        Words<4> a[2 * kOut];
#pragma unroll
        for (int i = 0; i < 2 * kOut; ++i) a[i] = read_copy(places + (stage * kPieces + i) * kDenseThreads);
#pragma unroll
        for (int n = 0; n < kRow; ++n) {
          const Words<4> x = read_copy(places + (stage * kPieces + 2 * kOut + n) * kDenseThreads);
#pragma unroll
          for (int m = 0; m < kOut; ++m) {
            float product[1][4] = {};
            step_product<T>(product, a[2 * m], a[2 * m + 1], x);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][n][e] += product[0][e];
          }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        start_unit();
      }
#pragma unroll
      for (int i = 0; i < kOut * kRow * 4; ++i) {
        float& to = total[i / 4 / kRow][i / 4 % kRow][i % 4];
        const float of_slice = sum[i / 4 / kRow][i / 4 % kRow][i % 4];
        to = slice == 0 ? of_slice : to + of_slice;
      }
    }

    __syncthreads();  // the rings are used no more
    float* const sums = reinterpret_cast<float*>(&shared + 1);
#pragma unroll
    for (int i = 0; i < kOut * kRow * 4; ++i) {
      const int m = i / 4 / kRow, n = i / 4 % kRow, e = i % 4;
      sums[(warp * Tile::kRows + 8 * n + 2 * t + e % 2) * Tile::kPitch + 16 * m + g + e / 2 * 8] = total[m][n][e];
    }
    __syncthreads();
    const int tiles = kDenseWarps >> args.k_warp_bits;
    for (int i = tid; i < count * tiles * Tile::kOutputs; i += kDenseThreads) {
      const int output = i % Tile::kOutputs, tile = i / Tile::kOutputs % tiles, row = i / Tile::kOutputs / tiles;
      const int m = m_block + tile * Tile::kOutputs + output;
      if (m >= args.h_out) continue;
      float v[kDenseWarps];
#pragma unroll
      for (int j = 0; j < kDenseWarps; ++j) {
        v[j] = 0;
        if (j < k_warps) {
          v[j] = sums[(((tile << args.k_warp_bits) + j) * Tile::kRows + row) * Tile::kPitch + output];
        }
      }
#pragma unroll
      for (int width = 1; width < kDenseWarps; width *= 2) {
        if (width < k_warps) {
#pragma unroll
          for (int j = 0; j < kDenseWarps; j += 2 * width) v[j] += v[j + width];
        }
      }
      T* const y = static_cast<T*>(args.y) + shared.group.rows[row] * args.y_stride + m;
      *y = from_float<T>(fmaf(args.scale, v[0], to_float(*y)));
    }
  }
}

}  // namespace punica::cuda::bgmv
