// dispatch_bgmv of float16 and bfloat16 where h_in is at most 512 (expand), many rows and one adapter, on sm_90: the
// sums of bgmv_bulk_short.cuh or, above 128, of bgmv_diagonal.cuh.
//
// The weights of 128 or 256 outputs stay in a block's shared memory while tiles of 32 rows pass: x through two buffers,
// y, asked for a tile ahead, through registers. A warp takes all of K for its outputs, so nothing is added up between
// warps. What is not aligned is put in place on its way into shared memory. Rows are neighbours in the batch, whatever
// their indices say: nothing is searched, and those that name no adapter are not stored.
#pragma once

#include "src/cuda/lora/bgmv_bulk.cuh"
#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kWideWarps = 8, kWideThreads = 32 * kWideWarps;
inline constexpr int kWideRows = 32;                 // of a tile
inline constexpr int kWideMaxIn = 512;               // where K is not split over warps
enum class WideSum { kHalfStep, kChains, kSlices };  // h_in <= 16, <= 128, above

// A row in shared memory: pieces of 32 elements (16 for kHalfStep), up to 128 elements as many as
// bgmv_bulk_short_kernel multiplies.
__host__ __device__ constexpr int wide_pieces(int h_in) {
  return h_in <= 16 ? 1 : h_in <= 64 ? 2 : h_in <= 128 ? 4 : (h_in + 31) / 32;
}
// Neighbouring rows lie 64 bytes apart in the banks,
// so that the eight lanes of an access, two rows of 64 bytes, meet no conflict.
__host__ __device__ constexpr int wide_pitch(int h_in) {
  if (h_in <= 16) return 32;
  const int pieces = wide_pieces(h_in);
  return 64 * (pieces % 2 == 0 ? pieces + 1 : pieces);
}
template <int kOut>
struct WideTile {
  static constexpr int kOutputs = 16 * kOut;  // of a warp
  static constexpr int kBlockOutputs = kOutputs * kWideWarps;
  static constexpr int kPitch = kOutputs + 4;  // floats, of the sums of a row
};
template <int kOut>
constexpr size_t wide_shared_bytes(int h_in) {
  using Tile = WideTile<kOut>;
  return size_t(wide_pitch(h_in)) * (Tile::kBlockOutputs + 2 * kWideRows) +
         sizeof(float) * kWideWarps * kWideRows * Tile::kPitch;
}

// Brings `rows` rows of h_in elements into shared memory, zeros up to the end of the last piece, and those from `count`
// on. By all threads. `begin` and `end`: what may be read.
template <class T>
__device__ __forceinline__ void wide_copy(unsigned char* to, const T* from, int64_t stride, int rows, int count,
                                          int h_in, bool aligned, const T* begin, const T* end) {
  const int pitch = wide_pitch(h_in), pieces = h_in <= 16 ? 2 : 4 * wide_pieces(h_in);  // of 16 bytes
  for (int i = threadIdx.x; i < rows * pieces; i += kWideThreads) {
    const int row = i / pieces, piece = i % pieces, left = row < count ? h_in - 8 * piece : 0;
    const T* const source = from + row * stride + 8 * piece;
    auto* const place = reinterpret_cast<Words<4>*>(to + row * pitch + 16 * piece);
    if (aligned) {
      start_copy<4>(place, left > 0 ? source : begin, left > 0);
    } else {
      Unaligned<4> words;
      words.start(source, left, begin, end);
      *place = words.finish();
    }
  }
}

// Grid: (chunks of rows, tiles of outputs). args.steps: tiles of rows of a chunk.
template <Arch kArch, class T, WideSum kSum, int kOut>
__global__ void __launch_bounds__(kWideThreads, kSum == WideSum::kSlices ? 1 : 2)
    bgmv_wide_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = WideTile<kOut>;
    constexpr int kRow = kWideRows / 8;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int h_in = args.h_in, pitch = wide_pitch(h_in);
    unsigned char* const w_image = bulk_shared;
    unsigned char* const x_images = bulk_shared + Tile::kBlockOutputs * pitch;
    float* const sums = reinterpret_cast<float*>(x_images + 2 * kWideRows * pitch) + warp * kWideRows * Tile::kPitch;
    const int64_t first = args.first_row + static_cast<int64_t>(blockIdx.x) * args.steps * kWideRows;
    const int rows = static_cast<int>(min(args.batch - first, static_cast<int64_t>(args.steps) * kWideRows));
    const int tiles = (rows + kWideRows - 1) / kWideRows;
    const int64_t m_block = (args.first_tile + static_cast<int64_t>(blockIdx.y)) * Tile::kBlockOutputs;
    const int outputs = static_cast<int>(min(args.h_out - m_block, static_cast<int64_t>(Tile::kBlockOutputs)));
    const T* const x = static_cast<const T*>(args.x);
    const T* const x_last = x_end(args, x);
    const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && args.x_stride % 8 == 0 && h_in % 8 == 0;
    if (!args.early_reads) grid_dependency_wait<kArch>();

    int any = 0;
    for (int i = tid; i < rows; i += kWideThreads) any |= load_entry(args.indices + first + i) == 0;
    const int64_t address = load_entry(args.w_ptr);
    any = __syncthreads_or(any);
    if (!args.early_reads) launch_dependents<kArch>();
    if (any != 0) {
      const T* const w = reinterpret_cast<const T*>(address) + args.layer_offset;
      wide_copy(w_image, w + m_block * h_in, h_in, Tile::kBlockOutputs, outputs, h_in,
                reinterpret_cast<uintptr_t>(w) % 16 == 0 && h_in % 8 == 0, w,
                w + static_cast<int64_t>(args.h_out) * h_in);
    }
    if (args.early_reads) grid_dependency_wait<kArch>();
    if (any == 0) return;

    const auto start_x = [&](int tile) {
      wide_copy(x_images + tile % 2 * kWideRows * pitch, x + (first + tile * kWideRows) * args.x_stride, args.x_stride,
                kWideRows, min(rows - tile * kWideRows, kWideRows), h_in, x_aligned, x, x_last);
      copy_commit();
    };
    // In the end lane i has eight neighbouring outputs of some rows of the tile.
    constexpr int kLanes = Tile::kOutputs / 8, kPasses = kLanes;  // of a row; of 32 / kLanes rows
    const int own_output = warp * Tile::kOutputs + lane % kLanes * 8;
    T* const y_lane = static_cast<T*>(args.y) + (first + lane / kLanes) * args.y_stride + m_block + own_output;
    // Which rows of the tile have the adapter, a bit each.
    const auto valid_rows = [&](int tile) {
      const int row = tile * kWideRows + lane;
      return __ballot_sync(0xffffffffu, row < rows && load_entry(args.indices + first + row) == 0);
    };
    const auto stores = [&](uint32_t valid, int pass) {
      return own_output < outputs && (valid >> (pass * (32 / kLanes) + lane / kLanes) & 1) != 0;
    };
    const auto load_y = [&](Words<4>(&to)[kPasses], uint32_t valid, int tile) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t row = tile * kWideRows + pass * (32 / kLanes);
        to[pass] = load_if(args.wide_y && stores(valid, pass), y_lane + row * args.y_stride);
      }
    };
    start_x(0);
    uint32_t valid = valid_rows(0);
    Words<4> before[kPasses], next_before[kPasses];
    load_y(before, valid, 0);
    const int k_lane = (kSum == WideSum::kHalfStep ? 8 : 16) * t;  // bytes
    const unsigned char* const w_lane = w_image + (warp * Tile::kOutputs + g) * pitch + k_lane;
    const int pieces = wide_pieces(h_in);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      copy_wait<0>();
      __syncthreads();  // this x is there, and nobody reads the one before
      uint32_t next_valid = 0;
      if (tile + 1 < tiles) {
        start_x(tile + 1);
        next_valid = valid_rows(tile + 1);
        load_y(next_before, next_valid, tile + 1);
      }
      const unsigned char* const x_lane = x_images + (tile % 2 * kWideRows + g) * pitch + k_lane;
      float total[kOut][kRow][4];
      if constexpr (kSum == WideSum::kHalfStep) {
        Words<2> xs[kRow];
#pragma unroll
        for (int n = 0; n < kRow; ++n) xs[n] = *reinterpret_cast<const Words<2>*>(x_lane + 8 * n * pitch);
#pragma unroll
        for (int m = 0; m < kOut; ++m) {
          const Words<2> a = *reinterpret_cast<const Words<2>*>(w_lane + 16 * m * pitch);
          const Words<2> b = *reinterpret_cast<const Words<2>*>(w_lane + (16 * m + 8) * pitch);
#pragma unroll
          for (int n = 0; n < kRow; ++n) {
            mma_from_zero<T>(total[m][n], a.values[0], b.values[0], a.values[1], b.values[1], xs[n].values[0],
                             xs[n].values[1]);
          }
        }
      } else {
        const auto load_w = [&](int piece, int q) {
          return *reinterpret_cast<const Words<4>*>(w_lane + 8 * q * pitch + 64 * piece);
        };
        const auto load_row = [&](int piece, int n) {
          return *reinterpret_cast<const Words<4>*>(x_lane + 8 * n * pitch + 64 * piece);
        };
        if constexpr (kSum == WideSum::kChains) {
#pragma unroll
          for (int m = 0; m < kOut; ++m) {
            float chains[kRow][2][4] = {};
#pragma unroll 1
            for (int piece = 0; piece < pieces; ++piece) {
              const Words<4> upper = load_w(piece, 2 * m), lower = load_w(piece, 2 * m + 1);
#pragma unroll
              for (int n = 0; n < kRow; ++n) step_product<T>(chains[n], upper, lower, load_row(piece, n));
            }
#pragma unroll
            for (int n = 0; n < kRow; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) total[m][n][e] = chains[n][0][e] + chains[n][1][e];
            }
          }
        } else {
          // Slice after slice; in a slice one product for each step, from zero. Products of what is all zeros add
          // nothing.
          float sum[kOut][kRow][4];
#pragma unroll
          for (int i = 0; i < kOut * kRow * 4; ++i) {
            total[i / 4 / kRow][i / 4 % kRow][i % 4] = sum[i / 4 / kRow][i / 4 % kRow][i % 4] = 0;
          }
#pragma unroll 1
          for (int slice = 0; slice < min(pieces, kSlices); ++slice) {
#pragma unroll 1
            for (int piece = slice; piece < pieces; piece += kSlices) {
              Words<4> a[2 * kOut];
#pragma unroll
              for (int q = 0; q < 2 * kOut; ++q) a[q] = load_w(piece, q);
#pragma unroll
              for (int n = 0; n < kRow; ++n) {
                const Words<4> xw = load_row(piece, n);
#pragma unroll
                for (int m = 0; m < kOut; ++m) {
                  float product[4];
                  step_product_from_zero<T>(product, a[2 * m], a[2 * m + 1], xw);
#pragma unroll
                  for (int e = 0; e < 4; ++e) sum[m][n][e] += product[e];
                }
              }
            }
#pragma unroll
            for (int i = 0; i < kOut * kRow * 4; ++i) {
              float& from = sum[i / 4 / kRow][i / 4 % kRow][i % 4];
              total[i / 4 / kRow][i / 4 % kRow][i % 4] += from;
              from = 0;
            }
          }
        }
      }
      store_fragments<Tile::kPitch>(total, sums, 0, g, t);
      __syncwarp();
      if (args.wide_y) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          if (!stores(valid, pass)) continue;
          const float* const from = sums + (pass * (32 / kLanes) + lane / kLanes) * Tile::kPitch + lane % kLanes * 8;
          const Words<4> after = add_sums<T>(args, before[pass], from);
          const int64_t row = tile * kWideRows + pass * (32 / kLanes);
          *reinterpret_cast<uint4*>(y_lane + row * args.y_stride) =
              make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
        }
      } else {
        // A lane an output, neighbouring lanes neighbouring ones; eight accesses on their way together.
        constexpr int kAtOnce = 8, kParts = 32 / Tile::kOutputs;  // rows of an access
        const int output = warp * Tile::kOutputs + lane % Tile::kOutputs;
        T* const to = static_cast<T*>(args.y) + m_block + output;
#pragma unroll 1
        for (int begin = 0; begin < kWideRows; begin += kAtOnce * kParts) {
          T values[kAtOnce];
          const auto row_of = [&](int i) { return begin + i * kParts + lane / Tile::kOutputs; };
          const auto address_of = [&](int i) { return to + (first + tile * kWideRows + row_of(i)) * args.y_stride; };
          const auto in = [&](int i) { return output < outputs && (valid >> row_of(i) & 1) != 0; };
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (in(i)) values[i] = *address_of(i);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const float v = sums[row_of(i) * Tile::kPitch + lane % Tile::kOutputs];
            if (in(i)) *address_of(i) = from_float<T>(fmaf(args.scale, v, to_float(values[i])));
          }
        }
      }
      __syncwarp();  // the sums have been read
      valid = next_valid;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) before[pass] = next_before[pass];
    }
  }
}

}  // namespace punica::cuda::bgmv
