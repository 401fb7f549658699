// dispatch_bgmv of float16 and bfloat16 where h_in is long (shrink) and many rows share an adapter, on sm_90: the sums
// of bgmv_diagonal.cuh, term by term, with every element of the tensor-core product in use.
//
// A warp takes a tile of outputs and rows and one of the shares of K. Of that it takes two neighbouring slices after
// the other two (slices are the rows of a diagonal there), so that the sums of no more are open at a time. Its
// operands, 128 bytes of a row at a time, come to it through a ring in shared memory that no other warp looks at:
// nothing waits but for copies, until the warps' sums meet.
#pragma once

#include <algorithm>

#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kDenseOut = 2, kDenseRow = 4;  // of a warp's tile, see there
inline constexpr int kDenseThreads = 256;
inline constexpr int kDenseWarps = kDenseThreads / 32;

// A warp's tile: kOut x 16 outputs, kRow x 8 rows.
template <int kOut, int kRow>
struct DenseTile {
  static constexpr int kOutputs = 16 * kOut, kRows = 8 * kRow;
  static constexpr int kLines = kOutputs + kRows;  // of 128 bytes, of a warp and unit
  static constexpr int kStageBytes = 128 * kLines * kDenseWarps;
  static constexpr int kStages = (192 << 10) / kStageBytes;
  static constexpr int kPitch = kOutputs + 4;  // floats; of the sums of a row
  static constexpr size_t kSharedBytes =
      sizeof(DiagonalShared) + std::max(kStages * kStageBytes, kDenseWarps * kRows * kPitch * 4);
};

// Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kOut, int kRow>
__global__ void __launch_bounds__(kDenseThreads, 1) bgmv_dense_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = DenseTile<kOut, kRow>;
    constexpr int kStages = Tile::kStages;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(bulk_shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int k_warps = 1 << args.k_warp_bits, h_in = args.h_in;
    const BlockRow block(args, blockIdx.x);
    const int m_block =
        (args.first_tile + static_cast<int>(blockIdx.y)) * (Tile::kOutputs * kDenseWarps >> args.k_warp_bits);
    {
      // Lines of y into the second-level cache; a guess where rows are skipped.
      const int lines = Tile::kOutputs * kDenseWarps >> args.k_warp_bits;  // outputs of the block
      const int per_row = (lines + 63) / 64;
      for (int i = tid; i < Tile::kRows * per_row; i += kDenseThreads) {
        const int m = m_block + i % per_row * 64;
        const int64_t row = block.b + i / per_row;
        if (row < args.batch && m < args.h_out) prefetch_line(static_cast<const T*>(args.y) + row * args.y_stride + m);
      }
    }
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) find_group_by_warp<1>(args, block, &shared.group);
    if (!args.early_reads) launch_dependents<kArch>();
    __syncthreads();
    const int count = shared.group.count;
    if (count == 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }

    const T* const w = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
    const bool aligned = args.vectors && reinterpret_cast<uintptr_t>(w) % 16 == 0;
    const T* const w_end = w + static_cast<int64_t>(args.h_out) * h_in;
    const int m0 = m_block + (warp >> args.k_warp_bits) * Tile::kOutputs;
    const int outputs = args.h_out - m0;
    // A copy of a warp takes four rows; this lane's part of it.
    const int copy_row = lane / 8, copy_piece = lane % 8;
    const T* const w_lane = w + static_cast<int64_t>(m0 + copy_row) * h_in;
    const T* x_lane[2 * kRow];
#pragma unroll
    for (int i = 0; i < 2 * kRow; ++i) {
      const int row = 4 * i + copy_row;
      x_lane[i] = static_cast<const T*>(args.x) + shared.group.rows[row < count ? row : 0] * args.x_stride;
    }
    // A unit: of two slices, what lies in one step. This lane's first element of K.
    constexpr int kPairs = kSlices / 2;
    const auto k_of = [&](int pair, int step) {
      return ((step << args.k_warp_bits) + (warp & (k_warps - 1))) * kDiagonalStep + 64 * pair + 8 * copy_piece;
    };
    // Odd rows have their halves exchanged, so that the eight lanes of an access, two rows of 64 bytes, meet no
    // conflict.
    unsigned char* const lines = reinterpret_cast<unsigned char*>(&shared + 1) + 128 * Tile::kLines * warp;
    unsigned char* const copy_to = lines + 128 * copy_row + 16 * (copy_piece ^ (copy_row % 2 * 4));
    const unsigned char* const read_from = lines + 128 * g;
    const auto place = [&](int stage, int line) {
      return reinterpret_cast<Words<4>*>(copy_to + stage * Tile::kStageBytes + 128 * line);
    };
    int copy_pair = 0, copy_step = 0, copy_stage = 0;
    // Unaligned pieces, or those of unaligned rows, come to registers and are shifted there.
    const auto start_w = [&](int k, int stage) {
      const auto valid = [&](int i) { return k < h_in && 4 * i + copy_row < outputs; };
      const T* const from = w_lane + k;
      if (aligned) {
#pragma unroll
        for (int i = 0; i < 4 * kOut; ++i) {
          start_copy<4>(place(stage, 4 * i), from + static_cast<int64_t>(4 * i) * h_in, valid(i));
        }
      } else {
        Unaligned<4> pieces[4 * kOut];
#pragma unroll
        for (int i = 0; i < 4 * kOut; ++i) {
          pieces[i].start(from + static_cast<int64_t>(4 * i) * h_in, valid(i) ? h_in - k : 0, w, w_end);
        }
#pragma unroll
        for (int i = 0; i < 4 * kOut; ++i) *place(stage, 4 * i) = pieces[i].finish();
      }
    };
    const auto start_x = [&](int k, int stage) {
      const auto valid = [&](int i) { return k < h_in && 4 * i + copy_row < count; };
      if (args.vectors) {
#pragma unroll
        for (int i = 0; i < 2 * kRow; ++i) {
          start_copy<4>(place(stage, Tile::kOutputs + 4 * i), x_lane[i] + k, valid(i));
        }
      } else {
        Unaligned<4> pieces[2 * kRow];
#pragma unroll
        for (int i = 0; i < 2 * kRow; ++i) {
          pieces[i].start(x_lane[i] + k, valid(i) ? h_in - k : 0, args.x, x_end(args, static_cast<const T*>(args.x)));
        }
#pragma unroll
        for (int i = 0; i < 2 * kRow; ++i) *place(stage, Tile::kOutputs + 4 * i) = pieces[i].finish();
      }
    };
    const auto advance = [&] {
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_step == args.steps) {
        copy_step = 0;
        ++copy_pair;
      }
    };
    const auto start_unit = [&] {
      if (copy_pair < kPairs) {
        const int k = k_of(copy_pair, copy_step);
        start_w(k, copy_stage);
        start_x(k, copy_stage);
        advance();
      }
      copy_commit();
    };
    if (args.early_reads) {
      const int units = min(kStages - 1, kPairs * args.steps);
      for (int i = 0; i < units; ++i) start_w(k_of(i / args.steps, i % args.steps), i);
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

    float total[kOut][kRow][4], sum[2][kOut][kRow][4];
    int stage = 0;
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int i = 0; i < kOut * kRow * 4; ++i) {
        sum[0][i / 4 / kRow][i / 4 % kRow][i % 4] = sum[1][i / 4 / kRow][i / 4 % kRow][i % 4] = 0;
      }
#pragma unroll 1
      for (int step = 0; step < args.steps; ++step) {
        copy_wait<kStages - 2>();
        __syncwarp();
#pragma unroll
        for (int slice = 0; slice < 2; ++slice) {
          const unsigned char* const from =
              read_from + stage * Tile::kStageBytes + 16 * ((4 * slice + t) ^ (g % 2 * 4));
          Words<4> a[2 * kOut];
#pragma unroll
          for (int i = 0; i < 2 * kOut; ++i) a[i] = read_copy(reinterpret_cast<const Words<4>*>(from + 128 * 8 * i));
#pragma unroll
          for (int n = 0; n < kRow; ++n) {
            const Words<4> x = read_copy(reinterpret_cast<const Words<4>*>(from + 128 * (Tile::kOutputs + 8 * n)));
#pragma unroll
            for (int m = 0; m < kOut; ++m) {
              float product[4];
              step_product_from_zero<T>(product, a[2 * m], a[2 * m + 1], x);
#pragma unroll
              for (int e = 0; e < 4; ++e) sum[slice][m][n][e] += product[e];
            }
          }
        }
        __syncwarp();  // all lanes have read
        stage = stage + 1 == kStages ? 0 : stage + 1;
        start_unit();
      }
#pragma unroll
      for (int i = 0; i < kOut * kRow * 4; ++i) {
        float& to = total[i / 4 / kRow][i / 4 % kRow][i % 4];
        const float first = sum[0][i / 4 / kRow][i / 4 % kRow][i % 4];
        to = pair == 0 ? first : to + first;
        to += sum[1][i / 4 / kRow][i / 4 % kRow][i % 4];
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
    // Several outputs at a time, so that their y is asked for together.
    constexpr int kAtOnce = 4;
    const int tiles = kDenseWarps >> args.k_warp_bits, all = count * tiles * Tile::kOutputs;
#pragma unroll 1
    for (int begin = tid; begin < all; begin += kAtOnce * kDenseThreads) {
      T* to[kAtOnce];
      T before[kAtOnce];
#pragma unroll
      for (int at = 0; at < kAtOnce; ++at) {
        const int i = begin + at * kDenseThreads;
        const int output = i % Tile::kOutputs, tile = i / Tile::kOutputs % tiles, row = i / Tile::kOutputs / tiles;
        const int m = m_block + tile * Tile::kOutputs + output;
        to[at] = nullptr;
        if (i < all && m < args.h_out) {
          to[at] = static_cast<T*>(args.y) + shared.group.rows[row] * args.y_stride + m;
          before[at] = *to[at];
        }
      }
#pragma unroll
      for (int at = 0; at < kAtOnce; ++at) {
        if (to[at] == nullptr) continue;
        const int i = begin + at * kDenseThreads;
        const int output = i % Tile::kOutputs, tile = i / Tile::kOutputs % tiles, row = i / Tile::kOutputs / tiles;
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
        *to[at] = from_float<T>(fmaf(args.scale, v[0], to_float(before[at])));
      }
    }
  }
}

}  // namespace punica::cuda::bgmv
