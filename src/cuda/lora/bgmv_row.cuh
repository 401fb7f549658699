// dispatch_bgmv of float16 and bfloat16 for groups of one row, on sm_90: h_in = 4096 (shrink, the sums of
// bgmv_diagonal.cuh) and h_in = 16 (expand, those of bgmv_bulk_short.cuh), where x and, in the expand,
// y are aligned.
//
// With so little work a block's start and what it does from the wait on are most of the time. So everything that has a
// known size is a constant here, and all of a block's weights are asked for at once.
#pragma once

#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

// Brings `count` pieces of 16 bytes of weights that are not aligned to shared memory, by way of the aligned pieces that
// hold them. They lie kFrom elements apart, and kTo bytes there.
template <class T, int kFrom, int kTo>
__device__ __noinline__ void copy_unaligned(uint32_t to, const T* from, int count, const T* begin, const T* end) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    Unaligned<4> piece;
    piece.start(from + static_cast<int64_t>(i) * kFrom, 8, begin, end);
    const Words<4> words = piece.finish();
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * kTo), "r"(words.values[0]),
                 "r"(words.values[1]), "r"(words.values[2]), "r"(words.values[3])
                 : "memory");
  }
}

// ---- Shrink --------------------------------------------------------------------------------------------------------

inline constexpr int kRowIn = 4096;                         // two steps of eight warps
inline constexpr int kRowOutputs = 4;                       // of a block
inline constexpr int kRowPlace = 16 * 32 * kDiagonalWarps;  // bytes from an output's piece to the next one's
inline constexpr size_t kRowShrinkShared =
    size_t{2} * kRowOutputs * kRowPlace + sizeof(float) * kSlices * kRowOutputs * kDiagonalWarps;

// Asks for the lines of a row of x, which the blocks that share its outputs share too.
template <int kIn, class T>
__device__ __forceinline__ void prefetch_row(const T* x) {
  for (unsigned line = threadIdx.x * gridDim.x + blockIdx.x; line < kIn / 64; line += blockDim.x * gridDim.x) {
    prefetch_line(x + line * 64);
  }
}

// The output that this lane of the first warp adds up, of blocks of kOutputs. Worked out when it is needed: there are
// no registers to keep it in.
template <class T, int kOutputs>
__device__ __forceinline__ T* row_output(const BgmvArgs& args) {
  unsigned thread, tile, row;
  asm volatile("mov.u32 %0, %%tid.x;\nmov.u32 %1, %%ctaid.x;\nmov.u32 %2, %%ctaid.y;"
               : "=r"(thread), "=r"(tile), "=r"(row));
  return static_cast<T*>(args.y) + (args.first_row + row) * args.y_stride +
         (args.first_tile + static_cast<int>(tile)) * kOutputs + thread % 32 / kDiagonalWarps;
}

// Grid: (blocks that share the outputs, rows).
template <Arch kArch, class T>
__global__ void __launch_bounds__(32 * kDiagonalWarps, 4)
    bgmv_row_shrink_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kStride = kDiagonalStep * kDiagonalWarps;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    RowEntries entries;
    if (args.early_reads) entries.load(args, args.first_row + blockIdx.y);
    const unsigned tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const unsigned k_lane = warp * kDiagonalStep + 8 * lane;
    const T* const x_row = static_cast<const T*>(args.x) + (args.first_row + blockIdx.y) * args.x_stride;
    prefetch_row<kRowIn>(x_row);
    const int m_block = (args.first_tile + static_cast<int>(blockIdx.x)) * kRowOutputs;
    const int rest = args.h_out - m_block;
    if (tid == 32) prefetch_line(row_output<T, kRowOutputs>(args));
    const T* const x = x_row + k_lane;
    Words<4> xs[2];
    T y_before = from_float<T>(0.0f);
    const bool stores = warp == 0 && lane % kDiagonalWarps == 0 && static_cast<int>(lane / kDiagonalWarps) < rest;
    const auto load_rows = [&] {
      xs[0] = load_if(true, x);
      xs[1] = load_if(true, x + kStride);
      if (stores) y_before = *row_output<T, kRowOutputs>(args);
    };
    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      entries.load(args, args.first_row + blockIdx.y);
      launch_dependents<kArch>();
      load_rows();
    }
    int64_t address;
    if (!entries.find(args, &address)) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const T* const layer = reinterpret_cast<const T*>(address) + args.layer_offset;
    const T* const w = layer + static_cast<int64_t>(m_block) * kRowIn + k_lane;
    const uint32_t image = shared_address(bulk_shared) + 16 * tid;
    if (reinterpret_cast<uintptr_t>(layer) % 16 == 0) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int q = 0; q < kRowOutputs; ++q) {
          if (q < rest) copy_piece(image + (kRowOutputs * s + q) * kRowPlace, w + q * kRowIn + s * kStride);
        }
      }
    } else {
      const T* const end = layer + static_cast<int64_t>(args.h_out) * kRowIn;
#pragma unroll 1
      for (int s = 0; s < 2; ++s) {
        copy_unaligned<T, kRowIn, kRowPlace>(image + kRowOutputs * s * kRowPlace, w + s * kStride,
                                             min(rest, kRowOutputs), layer, end);
      }
    }
    copy_commit();
    Words<4> a[2][kRowOutputs];
    const auto read = [&](int s) {
#pragma unroll
      for (int q = 0; q < kRowOutputs; ++q) a[s][q] = read_piece(image + (kRowOutputs * s + q) * kRowPlace);
    };
    copy_wait<0>();
    read(0);
    if (args.early_reads) {
      grid_dependency_wait<kArch>();
      load_rows();
    }
    read(1);
    float sum[kRowOutputs] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int p = 0; p < kRowOutputs / 2; ++p) {
        add_diagonals<T>(sum[2 * p], sum[2 * p + 1], a[s][2 * p], a[s][2 * p + 1], xs[s], g);
      }
    }
    float* const sums = reinterpret_cast<float*>(bulk_shared + 2 * kRowOutputs * kRowPlace);
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kRowOutputs; ++q) sums[(q * kDiagonalWarps + warp) * kSlices + g] = sum[q];
    }
    __syncthreads();
    if (warp != 0) return;
    const float total = add_warps(add_slices(sums + lane * kSlices));
    if (stores) *row_output<T, kRowOutputs>(args) = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
  }
}

// The same for K of kSteps steps: all weights of a block in shared memory, two blocks a multiprocessor. A step is asked
// for when all but one of those before it are there; from the wait on the steps go by as they come.
template <Arch kArch, class T, int kSteps>
__global__ void __launch_bounds__(32 * kDiagonalWarps, 2)
    bgmv_row_shrink_long_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    constexpr int kStride = kDiagonalStep * kDiagonalWarps, kIn = kSteps * kStride, kResident = kSteps < 5 ? kSteps : 5;
    launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    RowEntries entries;
    entries.load(args, args.first_row + blockIdx.y);
    const unsigned tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const unsigned k_lane = warp * kDiagonalStep + 8 * lane;
    const T* const x_row = static_cast<const T*>(args.x) + (args.first_row + blockIdx.y) * args.x_stride;
    prefetch_row<kIn>(x_row);
    const int m_block = (args.first_tile + static_cast<int>(blockIdx.x)) * kRowOutputs;
    T* const y = static_cast<T*>(args.y) + (args.first_row + blockIdx.y) * args.y_stride + m_block +
                 lane / kDiagonalWarps;  // of the lanes of the first warp
    const bool stores = warp == 0 && lane % kDiagonalWarps == 0;
    if (stores) prefetch_line(y);
    const T* const x = x_row + k_lane;
    int64_t address;
    if (!entries.find(args, &address)) {
      grid_dependency_wait<kArch>();
      return;
    }
    const T* const layer = reinterpret_cast<const T*>(address) + args.layer_offset;
    const T* const w = layer + static_cast<int64_t>(m_block) * kIn + k_lane;
    const uint32_t image = shared_address(bulk_shared) + 16 * tid;
    if (reinterpret_cast<uintptr_t>(layer) % 16 == 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s > 1) copy_wait<1>();
#pragma unroll
        for (int q = 0; q < kRowOutputs; ++q) {
          copy_piece(image + (kRowOutputs * s + q) * kRowPlace, w + q * kIn + s * kStride);
        }
        copy_commit();
      }
    } else {
      const T* const end = layer + static_cast<int64_t>(args.h_out) * kIn;
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        copy_unaligned<T, kIn, kRowPlace>(image + kRowOutputs * s * kRowPlace, w + s * kStride, kRowOutputs, layer,
                                          end);
      }
    }
    grid_dependency_wait<kArch>();
    Words<4> xs[kResident];
#pragma unroll
    for (int s = 0; s < kResident; ++s) xs[s] = load_if(true, x + s * kStride);
    T y_before = from_float<T>(0.0f);
    if (stores) y_before = *y;
    float sum[kRowOutputs] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s == 0) copy_wait<1>();  // of the last two steps
      if (s == kSteps - 1) copy_wait<0>();
      Words<4> a[kRowOutputs];
#pragma unroll
      for (int q = 0; q < kRowOutputs; ++q) a[q] = read_piece(image + (kRowOutputs * s + q) * kRowPlace);
#pragma unroll
      for (int p = 0; p < kRowOutputs / 2; ++p) {
        add_diagonals<T>(sum[2 * p], sum[2 * p + 1], a[2 * p], a[2 * p + 1], xs[s % kResident], g);
      }
      if (s + kResident < kSteps) xs[s % kResident] = load_if(true, x + (s + kResident) * kStride);
    }
    // The sums take the place of the warp's first weights, each warp's eight other banks.
    constexpr int kPitch = kRowPlace / kDiagonalWarps + sizeof(float) * kSlices;
    __syncwarp();
    if (t == g / 2) {
#pragma unroll
      for (int q = 0; q < kRowOutputs; ++q) {
        reinterpret_cast<float*>(bulk_shared + q * kRowPlace + warp * kPitch)[g] = sum[q];
      }
    }
    __syncthreads();
    if (warp != 0) return;
    const float total = add_warps(add_slices(reinterpret_cast<const float*>(
        bulk_shared + lane / kDiagonalWarps * kRowPlace + lane % kDiagonalWarps * kPitch)));
    if (stores) *y = from_float<T>(fmaf(args.scale, total, to_float(y_before)));
  }
}

// ---- Expand --------------------------------------------------------------------------------------------------------

inline constexpr int kRowTile = 128;        // outputs of a warp at a time
inline constexpr int kRowTileBytes = 4096;  // of weights

// A warp takes kTiles tiles. Their weights lie in shared memory in pieces of 16 bytes, half a row of W, eight to 128
// bytes; those of four rows are moved about so that the lanes of an access, which read every fourth row, meet no bank
// conflict. All columns of a product are the one row of x; so lane (g, t) has all outputs of rows g and g + 8 of a
// product, and keeps those that are neighbours: rows 2e and 2e + 1 behind row 32 t + 4 g of W.
//
// Grid: (rows, blocks that share the outputs).
template <Arch kArch, class T, int kTiles>
__global__ void __launch_bounds__(kTiles == 1 ? 256 : 448, kTiles == 1 ? 4 : 2)
    bgmv_row_expand_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    RowEntries entries;
    if (args.early_reads) entries.load(args, args.first_row + blockIdx.x);
    const unsigned tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const unsigned tile = (args.first_tile + blockIdx.y) * (blockDim.x / 32) + warp;
    const int64_t m = static_cast<int64_t>(tile) * (kTiles * kRowTile);
    // Whole tiles.
    const int tiles = static_cast<int>(min((args.h_out - m) / kRowTile, int64_t{kTiles}));
    T* const y_row = static_cast<T*>(args.y) + (args.first_row + blockIdx.x) * args.y_stride + m;
    const T* const x_row = static_cast<const T*>(args.x) + (args.first_row + blockIdx.x) * args.x_stride;
    if (static_cast<int>(lane) < 2 * tiles) prefetch_line(y_row + lane * 64);
    if (tid == 8) prefetch_line(x_row);
    T* const y = y_row + 32 * t + 4 * g;
    Words<2> xs;
    Vec<T, 4> before[kTiles];
    const auto load_rows = [&] {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(xs.values[0]), "=r"(xs.values[1])
                   : "l"(x_row + 4 * t)
                   : "memory");
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i < tiles) before[i] = load<T, 4>(y + kRowTile * i);
      }
    };
    if (!args.early_reads) {
      grid_dependency_wait<kArch>();
      entries.load(args, args.first_row + blockIdx.x);
      launch_dependents<kArch>();
      load_rows();
    }
    int64_t address;
    if (!entries.find(args, &address) || tiles <= 0) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const uint32_t image = shared_address(bulk_shared) + warp * (kTiles * kRowTileBytes);
    const unsigned row = lane / 2;  // and every 16th from there on
    const uint32_t to = image + row / 4 * 128 + ((2 * (row % 4) + lane % 2) ^ (2 * (row / 4 % 4))) * 16;
    const T* const layer = reinterpret_cast<const T*>(address) + args.layer_offset;
    const T* const w = layer + m * 16 + 8 * lane;
    if (reinterpret_cast<uintptr_t>(layer) % 16 == 0) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile > 0 && args.early_reads) copy_wait<0>();
        if (tile < tiles) {
#pragma unroll
          for (int i = 0; i < 8; ++i) copy_piece(to + 512 * i + kRowTileBytes * tile, w + 256 * i + 2048 * tile);
        }
        copy_commit();
      }
    } else {
      copy_unaligned<T, 256, 512>(to, w, 8 * tiles, layer, layer + static_cast<int64_t>(args.h_out) * 16);
    }
    Words<2> a[4][4];
    const auto read = [&](int tile, int u) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(a[u][c].values[0]), "=r"(a[u][c].values[1])
                     : "r"(image + tile * kRowTileBytes + u * 1024 + g * 128 + ((2 * c + t / 2) ^ (2 * (g % 4))) * 16 +
                           t % 2 * 8)
                     : "memory");
      }
    };
    // The weights of the only tile wait in registers; of two there is no room for them.
    if constexpr (kTiles == 1) {
      copy_wait<0>();
      __syncwarp();
#pragma unroll
      for (int u = 0; u < 4; ++u) read(0, u);
    }
    if (args.early_reads) {
      grid_dependency_wait<kArch>();
      load_rows();
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) break;
      if constexpr (kTiles > 1) {
        copy_wait_first(kTiles - 1 - tile);
        __syncwarp();
      }
      float sum[4] = {};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if constexpr (kTiles > 1) read(tile, u);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Words<2>&upper = a[u][2 * e], &lower = a[u][2 * e + 1];
          float product[4];
          mma_from_zero<T>(product, upper.values[0], lower.values[0], upper.values[1], lower.values[1], xs.values[0],
                           xs.values[1]);
          if (t == static_cast<unsigned>(u)) {
            sum[2 * e] = product[0];
            sum[2 * e + 1] = product[2];
          }
        }
      }
      Vec<T, 4> after;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        after.values[i] = from_float<T>(fmaf(args.scale, sum[i], to_float(before[tile].values[i])));
      }
      store<T, 4>(y + kRowTile * tile, after);
    }
  }
}

}  // namespace punica::cuda::bgmv
