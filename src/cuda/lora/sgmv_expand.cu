// sgmv for float16 and bfloat16 where d_in is at most 16: y is what moves.
//
// A warp computes 64 rows (16 with short segments) x 32 columns, all from registers: neither shared memory nor barriers
// of the block are in the way. What makes that possible is that the order of K within a product and of columns among
// four products is free, if x, W and y agree. With g = lane / 4 and t = lane % 4, a lane's part of K in each 16 is
// 4t .. 4t + 3, so that its fragment of a row of x is one access of 8 bytes; column c of product j is column 4c + j of
// the 32, so that a lane's part of W is the columns 4g .. 4g + 3 (8 bytes each of 4 of K, or of 4 columns), and the
// sums that it gets are those of columns 8t .. 8t + 7: 16 bytes of a row of y.
#include <algorithm>

#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda {
namespace {

constexpr int kWarpWidth = 32;
constexpr int kThreads = 128;
constexpr int kWidth = kThreads / 32 * kWarpWidth;

constexpr int kSlices = 1;  // of 16 of K

// As many blocks as the registers of a multiprocessor are enough for: what a lane has of y and W, and a few more.
template <int kGroups, bool kFast>
inline constexpr int kMinBlocks = kGroups > 1 ? 4
                                  : kFast     ? 8
                                              : 5;

// Four 16-bit elements, of which the first `count` (possibly less than none) are there; zeros elsewhere. kWhole: at a
// multiple of 8 bytes, and all four or none.
template <bool kWhole>
__device__ __forceinline__ uint2 load_four(const void* from, int64_t count) {
  uint2 result = {0, 0};
  if constexpr (kWhole) {
    if (count > 0) result = __ldg(static_cast<const uint2*>(from));
  } else {
    const uint16_t* const elements = static_cast<const uint16_t*>(from);
    if (count > 0) result.x = __ldg(elements);
    if (count > 1) result.x |= uint32_t{__ldg(elements + 1)} << 16;
    if (count > 2) result.y = __ldg(elements + 2);
    if (count > 3) result.y |= uint32_t{__ldg(elements + 3)} << 16;
  }
  return result;
}

// Past the first-level cache: y is read once.
__device__ __forceinline__ uint4 load_y(const void* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// W of 32 columns from `column` on: b[slice][product].
template <class T, bool kInOut, bool kWhole>
__device__ __forceinline__ void load_weights(uint32_t (&b)[kSlices][4][2], const T* w, const SgmvArgs& args,
                                             int64_t column, int lane) {
  const int64_t c = column + lane / 4 * 4;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int k = s * 16 + lane % 4 * 4;
    uint2 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (!kInOut) {
        v[i] = load_four<kWhole>(w + (c + i) * args.d_in + k, c + i >= 0 && c + i < args.d_out ? args.d_in - k : 0);
      } else if constexpr (kWhole) {  // then the four are on one side of column 0
        v[i] = load_four<true>(w + (k + i) * args.d_out + c, k + i < args.d_in && c >= 0 ? args.d_out - c : 0);
      } else {
        uint32_t e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          e[j] = 0;
          if (k + i < args.d_in && c + j >= 0 && c + j < args.d_out) {
            e[j] = __ldg(reinterpret_cast<const uint16_t*>(w) + (k + i) * args.d_out + c + j);
          }
        }
        v[i] = {e[0] | e[1] << 16, e[2] | e[3] << 16};
      }
      if constexpr (!kWhole) __syncwarp();  // one after the other: all at once take too many registers
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kInOut) {
        const uint32_t select = j % 2 == 0 ? 0x5410 : 0x7632;
        b[s][j][0] = __byte_perm(j < 2 ? v[0].x : v[0].y, j < 2 ? v[1].x : v[1].y, select);
        b[s][j][1] = __byte_perm(j < 2 ? v[2].x : v[2].y, j < 2 ? v[3].x : v[3].y, select);
      } else {
        b[s][j][0] = v[j].x, b[s][j][1] = v[j].y;
      }
    }
  }
}

// kFast: whatever a lane reads or writes of x and y is there as a whole and aligned.
template <Arch kArch, class T, bool kInOut, int kGroups, bool kFast>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kGroups, kFast>)
    sgmv_expand(const SgmvArgs args, const int strips) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kRows = kGroups * 16;
    constexpr bool kStaged = !kFast;  // a variant that also knows rows at any multiple of 2 bytes
    constexpr int kPitch = kWarpWidth + 1;
    __shared__ SgmvScratch<kThreads> scratch;
    __shared__ float staged[kStaged ? kThreads / 32 * 16 * kPitch : 1];
    launch_dependents<kArch>();

    // A block goes over `strips` strips of kWidth columns. They begin where rows of y have multiples of 16 bytes, if
    // all rows have them at the same columns; then the first strip has up to 7 columns that do not exist.
    const int shift = kFast ? 0 : args.y_shift;
    const uint32_t blocks_n =
        static_cast<uint32_t>((args.d_out + shift + int64_t{kWidth} * strips - 1) / (int64_t{kWidth} * strips));
    const uint32_t number = blockIdx.x / blocks_n;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int64_t column = int64_t{blockIdx.x % blocks_n} * kWidth * strips - shift + warp * kWarpWidth;
    const int64_t end = min(column + int64_t{kWidth} * strips, args.d_out);

    // The lane's part of y: rows g + 8i of the tile, 16 bytes.
    uint4 old[2 * kGroups];
    const auto is_vector = [&](int64_t column) {
      const int64_t first = column + t * 8;
      if constexpr (kFast) return first < args.d_out;
      return args.y_vectors && first >= 0 && first + 8 <= args.d_out;
    };
    const auto read = [&](int m, int64_t row, int64_t rows, int64_t column) {
      const T* from = static_cast<const T*>(args.y) + (row + m * 16 + g) * args.y_stride + column + t * 8;
      const bool vector = is_vector(column);
      if (vector && m * 16 + g < rows) old[m * 2] = load_y(from);
      if (vector && m * 16 + 8 + g < rows) old[m * 2 + 1] = load_y(from + 8 * args.y_stride);
    };
    // Without early reads y is read, in the time that the tables take, where the tile is if the segments cover all rows
    // in order, as they mostly do.
    const int64_t guess = int64_t{number} * kRows;
    if (!args.early_reads) {
      prefetch_tables(args);  // asks the L2 cache alone, where all writes of the kernel before end up
      grid_dependency_wait<kArch>();
#pragma unroll
      for (int m = 0; m < kGroups; ++m) read(m, guess, args.rows - guess, column);
    }
    SgmvTile<T> tile;
    if (!find_tile<kRows, kThreads>(args, number, scratch, &tile)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }

    const int64_t w_row = kInOut ? args.d_out : args.d_in;
    const bool w_fours = reinterpret_cast<uintptr_t>(tile.w) % 8 == 0 && w_row % 4 == 0 && (!kInOut || shift % 4 == 0);
    const T* const x = static_cast<const T*>(args.x) + (tile.row + g) * args.x_stride + t * 4;
    uint32_t b[kSlices][4][2];
    const auto load_b = [&](int64_t column) {
      if (w_fours) {
        load_weights<T, kInOut, true>(b, tile.w, args, column, lane);
      } else {
        load_weights<T, kInOut, false>(b, tile.w, args, column, lane);
      }
    };
    load_b(column);
    if (args.early_reads) grid_dependency_wait<kArch>();
    if (args.early_reads || tile.row != guess) {
#pragma unroll
      for (int m = 0; m < kGroups; ++m) read(m, tile.row, tile.rows, column);
    }
#pragma unroll 1
    for (; column < end; column += kWidth) {
      // Fragments of x of all groups, or of one.
      constexpr int kHave = kSlices == 1 ? kGroups : 1;
      uint2 a[kHave][kSlices][2];
      const auto load_x = [&](int m) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const int64_t rest = args.d_in - s * 16 - t * 4;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8;
            const T* from = x + row * args.x_stride + s * 16;
            const int64_t count = row + g < tile.rows ? rest : 0;
            a[m % kHave][s][half] =
                kFast || args.x_fours ? load_four<true>(from, count) : load_four<false>(from, count);
          }
        }
      };
#pragma unroll
      for (int m = 0; m < kHave; ++m) load_x(m);

      // Rows that start anywhere: a column a lane, by way of shared memory, so that a row is one access of the warp.
      T single[kStaged ? 16 : 1];
      T* const y_single = static_cast<T*>(args.y) + tile.row * args.y_stride + column + lane;
      const bool is_single = kStaged && !args.y_vectors;
      if (is_single) {
#pragma unroll
        for (int r = 0; r < 16; ++r) {
          if (r < tile.rows && column + lane < args.d_out) single[kStaged ? r : 0] = y_single[r * args.y_stride];
        }
      }

      const bool vector = is_vector(column);
      T* y = static_cast<T*>(args.y) + (tile.row + g) * args.y_stride + column + t * 8;
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
        if (m * 16 >= tile.rows) break;
        float sums[4][4] = {};
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const uint2 low = a[m % kHave][s][0], high = a[m % kHave][s][1];
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[j], {low.x, high.x, low.y, high.y}, b[s][j]);
        }
        if (kHave < kGroups && m + kHave < kGroups) load_x(m + kHave);
        if constexpr (kStaged) {
          if (is_single) {
            float* const to = staged + (warp * 16 + g) * kPitch + t * 8;
            __syncwarp();
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              to[c] = sums[c % 4][c / 4];
              to[8 * kPitch + c] = sums[c % 4][2 + c / 4];
            }
            __syncwarp();
#pragma unroll
            for (int r = 0; r < 16; ++r) {
              if (r < tile.rows && column + lane < args.d_out) {
                y_single[r * args.y_stride] =
                    from_float<T>(to_float(single[r]) + staged[(warp * 16 + r) * kPitch + lane]);
              }
            }
            continue;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int h = half * 2;
          if (m * 16 + half * 8 + g < tile.rows) {
            if (vector) {
              const uint4 v = old[m * 2 + half];
              asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y),
                           "r"(add_pair<T>(v.x, sums[0][h], sums[1][h])), "r"(add_pair<T>(v.y, sums[2][h], sums[3][h])),
                           "r"(add_pair<T>(v.z, sums[0][h + 1], sums[1][h + 1])),
                           "r"(add_pair<T>(v.w, sums[2][h + 1], sums[3][h + 1]))
                           : "memory");
            } else if constexpr (!kFast) {
              const int64_t first = column + t * 8;
              T values[8];
#pragma unroll
              for (int c = 0; c < 8; ++c) {
                if (first + c >= 0 && first + c < args.d_out) values[c] = y[c];
              }
#pragma unroll
              for (int c = 0; c < 8; ++c) {
                if (first + c >= 0 && first + c < args.d_out) {
                  y[c] = from_float<T>(to_float(values[c]) + sums[c % 4][h + c / 4]);
                }
              }
            }
          }
          y += 8 * args.y_stride;
        }
        // The same registers take this part of the next strip.
        if (column + kWidth < end) read(m, tile.row, tile.rows, column + kWidth);
      }
      if (column + kWidth < end) load_b(column + kWidth);
    }
  }
}

template <Arch kArch, class T, bool kInOut, int kGroups, bool kFast>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  const int64_t tiles = max_tiles(args, kGroups * 16);
  const int64_t all = (args.d_out + args.y_shift + kWidth - 1) / kWidth;
  // Tiles of few rows are many, and each has to be found: a block does more of one then, as long as there are blocks
  // enough to fill an H200 twice. A choice that no bit depends on.
  constexpr int64_t kBlocks = kFast ? 1056 : 2112;
  const int64_t strips =
      kGroups == 1 ? std::clamp((tiles * all + kBlocks - 1) / kBlocks, int64_t{1}, all) : std::min(all, int64_t{2});
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(tiles * ((all + strips - 1) / strips));
  shape.block = kThreads;
  return launcher.launch<sgmv_expand<kArch, T, kInOut, kGroups, kFast>>(shape, args, static_cast<int>(strips));
}

template <Arch kArch, class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if (!args.y_vectors || args.y_shift != 0 || args.d_out % 8 != 0 || !args.x_fours) {
    return launch<kArch, T, kInOut, 1, false>(launcher, args);
  }
  // Tiles of 64 rows read W less often, where there are enough of them.
  const int64_t blocks = max_tiles(args, 64) * ((args.d_out + kWidth - 1) / kWidth);
  return short_segments(args) || blocks < 4 * 132 ? launch<kArch, T, kInOut, 1, true>(launcher, args)
                                                  : launch<kArch, T, kInOut, 4, true>(launcher, args);
}

template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if (launcher.arch == Arch::kSm80) return launch<Arch::kSm80, T, kInOut>(launcher, args);
  return launch<Arch::kSm90, T, kInOut>(launcher, args);
}

}  // namespace

Status launch_sgmv_expand(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& given) {
  SgmvArgs args = given;
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.y);
  args.y_vectors = args.y_stride % 8 == 0 || args.rows <= 1;
  args.y_shift = args.y_vectors ? static_cast<int>(address / 2 % 8) : 0;
  args.x_fours =
      reinterpret_cast<uintptr_t>(args.x) % 8 == 0 && args.d_in % 4 == 0 && (args.x_stride % 4 == 0 || args.rows <= 1);
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
