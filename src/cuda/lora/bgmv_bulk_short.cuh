// dispatch_bgmv of float16 and bfloat16 where h_in is short (expand), on sm_90.
//
// A block takes 128 to 512 neighbouring outputs and up to 8 rows that share the adapter. Its rows of W lie next to each
// other in memory: one bulk copy. A warp takes the whole of K for 32 outputs at a time, so nothing is added up between
// warps. The sums pass through shared memory, so that y, asked for before the products, is read and written 16 bytes at
// a time.
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kRoundRows = 32;                            // outputs of a warp at a time
inline constexpr int kBlockRoundRows = kRoundRows * kBulkWarps;  // of a block
// Lanes (g, t) store to 2t * kSumPitch + g and read 16 bytes at g * kSumPitch + 8t: no conflicts.
inline constexpr int kSumPitch = kRoundRows + 4;

// Products over K come in kSteps steps of 32 elements, 0 standing for a half one.
template <int kSteps>
inline constexpr int kBulkRounds = kSteps == 0   ? 4
                                   : kSteps <= 2 ? 2
                                                 : 1;  // of a block, at most

struct BulkShortShared {
  uint64_t full;
  BulkGroup group;
  alignas(16) float sums[kBulkWarps][kGroupRows * kSumPitch];
};

// With room for what is read beyond the last row, and not used.
inline constexpr int kImagePadding = 16 + 256 + 16;
constexpr size_t bulk_short_shared_bytes(int h_in, int rounds) {
  return sizeof(BulkShortShared) + size_t{2} * h_in * rounds * kBlockRoundRows + kImagePadding;
}

template <Arch kArch, class T, int kSteps, bool kVectors>
__device__ __forceinline__ void bgmv_bulk_short(const BgmvArgs& args, int shift, int64_t m_first, int rows,
                                                BulkShortShared& shared) {
  constexpr int kCount = kSteps == 0 ? 2 : 4;  // words of a lane and step
  constexpr int kLoads = kSteps == 0 ? 1 : kSteps;
  constexpr int kRounds = kBulkRounds<kSteps>;
  // A tile of 16 outputs has two chains of products, or its two tiles do.
  constexpr int kSums = kSteps == 0 ? 1 : 2, kUnroll = kSteps == 0 ? 2 : 1;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int h_in = args.h_in, count = shared.group.count;
  const int64_t batch_row = shared.group.rows[g < count ? g : 0];
  const unsigned char* const image = reinterpret_cast<const unsigned char*>(&shared + 1) + shift;

  const int k_lane = 2 * kCount * t;
  const T* x = static_cast<const T*>(args.x) + batch_row * args.x_stride + k_lane;
  const int x_count = g < count ? h_in - k_lane : 0;
  Words<kCount> xs[kLoads];
#pragma unroll
  for (int s = 0; s < kLoads; ++s) xs[s] = load_x<kCount, kVectors>(x + s * 32, x_count - s * 32);

  // In a round, lane (g, t) stores outputs 8t .. 8t + 7 of column g.
  T* const y = static_cast<T*>(args.y) + batch_row * args.y_stride + m_first + 8 * t;
  const int y_count = g < count ? rows - 8 * t : 0;
  Words<4> before[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = (r * kBulkWarps + warp) * kRoundRows;
    before[r] = load_if(args.wide_y && row < y_count, y + row);
  }
  barrier_wait<false>(&shared.full, 0);

  // Rows that lie a multiple of 128 bytes apart: odd ones read the steps of a pair in the other order, so that the
  // eight lanes of an access, two rows of 64 bytes, meet no conflict.
  const bool swap = kSteps > 0 && h_in % 64 == 0 && g % 2 != 0;
  float* const sums = shared.sums[warp];
  const auto multiply = [&](int row) {
    __syncwarp();  // the sums of the round before have been read
#pragma unroll kUnroll
    for (int j = 0; j < 2; ++j) {
      float sum[kSums][4] = {};
      const unsigned char* upper = image + 2 * ((row + 16 * j + g) * h_in + k_lane);
      const unsigned char* lower = upper + 16 * h_in;
      if constexpr (kSteps == 0) {
        const Words<kCount> a = read_image<kCount, kVectors>(upper, h_in - k_lane);
        const Words<kCount> b = read_image<kCount, kVectors>(lower, h_in - k_lane);
        step_product<T>(sum, a, b, xs[0]);
      } else if constexpr (!kVectors) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const Words<4> a = read_image<4, false>(upper + 64 * s, h_in - k_lane - 32 * s);
          const Words<4> b = read_image<4, false>(lower + 64 * s, h_in - k_lane - 32 * s);
          step_product<T>(sum, a, b, xs[s]);
        }
      } else {
#pragma unroll
        for (int s = 0; s < kSteps; s += 2) {
          const int k0 = 32 * (s + swap), k1 = 32 * (s + !swap);
          const Words<4> a0 = read_image<4, kVectors>(upper + 2 * k0, h_in - k_lane - k0);
          const Words<4> b0 = read_image<4, kVectors>(lower + 2 * k0, h_in - k_lane - k0);
          const Words<4> a1 = read_image<4, kVectors>(upper + 2 * k1, h_in - k_lane - k1);
          const Words<4> b1 = read_image<4, kVectors>(lower + 2 * k1, h_in - k_lane - k1);
          Words<4> a, b;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a.values[i] = swap ? a1.values[i] : a0.values[i];
            b.values[i] = swap ? b1.values[i] : b0.values[i];
          }
          step_product<T>(sum, a, b, xs[s]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a.values[i] = swap ? a0.values[i] : a1.values[i];
            b.values[i] = swap ? b0.values[i] : b1.values[i];
          }
          step_product<T>(sum, a, b, xs[s + 1]);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (2 * t + e < count) {
          float* column = sums + (2 * t + e) * kSumPitch + 16 * j + g;
          column[0] = kSums == 1 ? sum[0][e] : sum[0][e] + sum[kSums - 1][e];
          column[8] = kSums == 1 ? sum[0][2 + e] : sum[0][2 + e] + sum[kSums - 1][2 + e];
        }
      }
    }
    __syncwarp();
  };
  const float* const own_sums = sums + g * kSumPitch + 8 * t;

  if (args.wide_y) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = (r * kBulkWarps + warp) * kRoundRows;
      if (row >= rows) break;
      multiply(row);
      if (row < y_count) {
        const float4 low = *reinterpret_cast<const float4*>(own_sums);
        const float4 high = *reinterpret_cast<const float4*>(own_sums + 4);
        const float total[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        Words<4> after;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t word = 0;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const T value = bits_as<T>(static_cast<uint16_t>(before[r].values[i] >> (16 * e)));
            const T sum = from_float<T>(fmaf(args.scale, total[2 * i + e], to_float(value)));
            word |= static_cast<uint32_t>(bits_of(sum)) << (16 * e);
          }
          after.values[i] = word;
        }
        *reinterpret_cast<uint4*>(y + row) =
            make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
      }
    }
  } else {
#pragma unroll 1
    for (int row = warp * kRoundRows; row < rows; row += kBlockRoundRows) {
      multiply(row);
      // A lane an output, neighbouring lanes neighbouring ones.
      if (row + lane < rows) {
        for (int column = 0; column < count; ++column) {
          T* const to = static_cast<T*>(args.y) + shared.group.rows[column] * args.y_stride + m_first + row + lane;
          *to = from_float<T>(fmaf(args.scale, sums[column * kSumPitch + lane], to_float(*to)));
        }
      }
    }
  }
}

// Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kSteps>
__global__ void __launch_bounds__(kBulkThreads, kSteps == 0   ? 8
                                                : kSteps == 2 ? 7
                                                              : 5) bgmv_bulk_short_kernel(const BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    // Where the next kernel may read nothing early, its blocks would only be in the way of this one's loads.
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    BulkShortShared& shared = *reinterpret_cast<BulkShortShared*>(bulk_shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t b = args.first_row + blockIdx.x;
    const int block_rows = args.rounds * kBlockRoundRows;
    const int64_t m_first = (args.first_tile + static_cast<int64_t>(blockIdx.y)) * block_rows;
    const int rows = static_cast<int>(min(args.h_out - m_first, static_cast<int64_t>(block_rows)));
    if (warp == kBulkWarps - 1) {
      // A line of y or x a lane.
      if (64 * lane < rows) {
        prefetch_line(static_cast<const T*>(args.y) + b * args.y_stride + m_first + 64 * lane);
      } else if (31 - lane <= (args.h_in - 1) / 64) {
        prefetch_line(static_cast<const T*>(args.x) + b * args.x_stride + 64 * (31 - lane));
      }
    }
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (warp == 0) {
      find_group_by_warp(args, b, &shared.group, [&] {
        if (lane == 0) {
          barrier_init(&shared.full, 1);
          barrier_init_fence();
        }
      });
      if (shared.group.count > 0) {
        const T* const w = reinterpret_cast<const T*>(shared.group.weights) + args.layer_offset;
        unsigned char* const image = reinterpret_cast<unsigned char*>(&shared + 1);
        const Run run(w + m_first * args.h_in, 2 * rows * args.h_in);
        if (lane == 0) {
          barrier_expect(&shared.full, run.whole);
          run.copy_whole(image, &shared.full);
        }
        if (run.head + run.tail > 0 && lane < 8) run.copy_edges(image, lane);
      }
    }
    if (!args.early_reads) launch_dependents<kArch>();
    __syncthreads();  // the group, the barrier, what the first warp copied itself
    if (args.early_reads) grid_dependency_wait<kArch>();
    if (shared.group.count == 0) return;
    const uintptr_t w = shared.group.weights + 2 * args.layer_offset;
    const int shift = static_cast<int>((w + 2 * m_first * args.h_in) & 15);
    if (args.vectors && w % (kSteps == 0 ? 8 : 16) == 0) {
      bgmv_bulk_short<kArch, T, kSteps, true>(args, shift, m_first, rows, shared);
    } else {
      bgmv_bulk_short<kArch, T, kSteps, false>(args, shift, m_first, rows, shared);
    }
  }
}

}  // namespace punica::cuda::bgmv
