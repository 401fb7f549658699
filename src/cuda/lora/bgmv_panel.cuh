// dispatch_bgmv of float16 and bfloat16 where h_in is at most 512 (expand), many rows and one adapter, on sm_90: the
// sums of bgmv_bulk_short.cuh or, above 128, of bgmv_diagonal.cuh, term by term, by products of warpgroups.
//
// A warpgroup takes 64 rows x 64 outputs, a block one or two of them: of the same outputs or of the same rows. The
// weights of a block, all of K, stay in its shared memory while tiles of rows pass: whole rows of x through two
// buffers, or, above 128, slice of K after slice through a ring.
//
// An element of wgmma.m64n64k16 has the bits of the same element of mma.m16n8k16, from zero or added to what is there,
// whatever the order of the 16 elements of K: neither promised by anyone nor known of other GPUs than the H200, hence a
// test (bgmv_test.cu). What belongs to one product there is four elements of every eight: so all comes in pieces of
// eight bytes. Which output is which column is free: a lane has eight neighbours, 16 bytes of y.
//
// Rows are neighbours in the batch, whatever their indices say: nothing is searched, and those that name no adapter are
// not stored.
#pragma once

#include <algorithm>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/bgmv_bulk.cuh"
#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kPanelMaxIn = 2 * kDiagonalStep;  // where K is not shared by warps
inline constexpr int kPanelTile = 64;                  // rows and outputs of a warpgroup
inline constexpr int kPanelPitch = kPanelTile + 4;     // floats, of the sums of a row where y is not aligned
inline constexpr int kPanelSumFloats = 8 * kPanelPitch;  // of a warp
// A matrix of 8 rows or outputs and eight elements of K lies together, as the tensor cores take it. A step of 32
// elements of K has four of them: the two halves of product 0, then those of product 1.
inline constexpr int kPanelMatrix = 128;
inline constexpr int kPanelStep = 4 * kPanelMatrix;
// Bytes of a row of kSteps steps; 0: of 16 elements.
template <int kSteps>
inline constexpr int kPanelLine = kSteps == 0 ? 32 : 64 * kSteps;
inline constexpr int kPanelStages = 3;  // of the ring

// The place of an output among 64 columns: lane t of four has columns 8 j + 2 t + i of the products, which are outputs
// 32 (j / 4) + 8 t + 2 (j % 4) + i.
__device__ __forceinline__ int panel_output(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column / 8 % 4 * 2 + column % 2;
}

// kSteps x 32 elements of K (0: 16), kApart from one step to the next, of `lines` rows, a multiple of 64, into matrices;
// zeros from row `count` and from h_in on. A copy of a warp is 32 bytes each of eight rows, in two or, of 16 elements,
// all matrices of these. kPieces: all consists of aligned pieces of 8 bytes.
template <class T, int kSteps, int kApart, bool kOutputs, bool kPieces>
__device__ __forceinline__ void panel_copy(unsigned char* to, const T* from, int64_t stride, int k, int lines,
                                           int count, int h_in, const T* begin, const T* end) {
  constexpr int kParts = kSteps == 0 ? 1 : 2 * kSteps;  // of a row, 16 elements
  constexpr int kGroup = kSteps == 0 ? 2 * kPanelMatrix : kSteps * kPanelStep;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int r = lane / 4, piece = lane % 4;
  to += 16 * r + (kSteps == 0 ? piece / 2 * kPanelMatrix + piece % 2 * 8 : piece % 2 * 2 * kPanelMatrix + piece / 2 * 8);
  k += 4 * piece;
  const int all = lines / 8 * kParts;
#pragma unroll kPieces ? 4 : 1
  for (int i = warp; i < all; i += warps) {
    const int part = i % kParts, group = i / kParts;
    const int element = k + part / 2 * kApart + part % 2 * 16;
    const int row = kOutputs ? group / 8 * 64 + panel_output(group % 8 * 8 + r) : group * 8 + r;
    auto* const at =
        reinterpret_cast<Words<2>*>(to + group * kGroup + part / 2 * kPanelStep + part % 2 * kPanelMatrix);
    if constexpr (kPieces) {
      start_copy<2>(at, from + row * stride + element, element < h_in && row < count);
    } else {
      Unaligned<2> words;
      words.start(from + row * stride + element, row < count ? h_in - element : 0, begin, end);
      *at = words.finish();
    }
  }
}

// A function of its own: what it needs takes no registers of the common way.
template <class T, int kSteps, int kApart, bool kOutputs>
__device__ __noinline__ void panel_copy_unaligned(unsigned char* to, const T* from, int64_t stride, int k, int lines,
                                                  int count, int h_in, const T* begin, const T* end) {
  panel_copy<T, kSteps, kApart, kOutputs, false>(to, from, stride, k, lines, count, h_in, begin, end);
}

// y of a warp's 16 rows and 64 outputs. Lane (g, t) has rows g and g + 8, outputs 32 q + 8 t + e: total[16 q + 4 (e / 2)
// + e % 2] and, of row g + 8, two behind.
template <class T>
struct PanelRows {
  const BgmvArgs& args;
  T* y;      // of row 0, output 0
  int rows;  // from row 0 on
  int outputs;
  Words<4> before[2][2];

  // Where y consists of whole pieces.
  __device__ __forceinline__ void load() {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const T* const from = y + g * args.y_stride + 8 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        before[half][q] = load_if(args.wide_y && 32 * q + 8 * t < outputs && 8 * half + g < rows,
                                  from + 8 * half * args.y_stride + 32 * q);
      }
    }
  }

  // `valid`: a bit for each row. `sums`: kPanelSumFloats of the warp.
  __device__ __forceinline__ void store(const float (&total)[32], uint32_t valid, float* sums) const {
    if (!args.wide_y) return store_unaligned(total, valid, sums);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    T* const to = y + g * args.y_stride + 8 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = total[16 * q + e / 2 * 4 + 2 * half + e % 2];
        const Words<4> after = add_sums<T>(args, before[half][q], v);
        if (32 * q + 8 * t < outputs && (valid >> (8 * half + g) & 1) != 0) {
          *reinterpret_cast<uint4*>(to + 8 * half * args.y_stride + 32 * q) =
              make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
        }
      }
    }
  }

  // Eight rows at a time through shared memory. Of the 64 outputs of a row all whole pieces of 16 bytes go as such, the
  // edges element by element.
  __device__ __forceinline__ void store_unaligned(const float (&total)[32], uint32_t valid, float* sums) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int used = min(outputs, kPanelTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncwarp();
#pragma unroll
      for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums[g * kPanelPitch + 32 * q + 8 * t + e] = total[16 * q + e / 2 * 4 + 2 * half + e % 2];
        }
      }
      __syncwarp();
      const auto row_of = [&](int row) { return y + (8 * half + row) * args.y_stride; };
      // Outputs before the first whole piece.
      const auto edge_of = [&](int row) {
        return (-static_cast<int>(reinterpret_cast<uintptr_t>(row_of(row)) / 2)) & 7;
      };
      const auto stores = [&](int row) { return (valid >> (8 * half + row) & 1) != 0; };
      constexpr int kRounds = 2;
      Words<4> pieces[kRounds];
      T* piece_at[kRounds];
      int from[kRounds];
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int row = 4 * i + lane / 8, output = edge_of(row) + lane % 8 * 8;
        const bool whole = stores(row) && output + 8 <= used;
        from[i] = whole ? row * kPanelPitch + output : -1;
        piece_at[i] = row_of(row) + output;
        pieces[i] = load_if(whole, piece_at[i]);
      }
      T edges[2 * kRounds];
      T* edge_at[2 * kRounds];
      int edge_from[2 * kRounds];
#pragma unroll
      for (int i = 0; i < 2 * kRounds; ++i) {
        const int row = 2 * i + lane / 16, edge = min(edge_of(row), used), slot = lane % 16;
        const int output = slot < edge ? slot : edge + (used - edge) / 8 * 8 + slot - edge;
        edge_from[i] = stores(row) && output < used ? row * kPanelPitch + output : -1;
        edge_at[i] = row_of(row) + output;
        if (edge_from[i] >= 0) edges[i] = *edge_at[i];
      }
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (from[i] < 0) continue;
        float v[8];
#pragma unroll
        for (int q = 0; q < 8; ++q) v[q] = sums[from[i] + q];
        const Words<4> after = add_sums<T>(args, pieces[i], v);
        *reinterpret_cast<uint4*>(piece_at[i]) =
            make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
      }
#pragma unroll
      for (int i = 0; i < 2 * kRounds; ++i) {
        if (edge_from[i] >= 0) {
          *edge_at[i] = from_float<T>(fmaf(args.scale, sums[edge_from[i]], to_float(edges[i])));
        }
      }
    }
  }
};

// What a block works on. args.team: warpgroups of the block; args.group_rows: rows of its tile, 64 for each that takes
// rows of its own.
template <Arch kArch, class T>
struct PanelBlock {
  const BgmvArgs& args;
  int tile_rows, tile_outputs;
  int64_t first, m_block;
  int rows, tiles, outputs, h_in;
  const T *x, *x_last, *w, *w_last;
  bool x_pieces, w_pieces;  // consist of aligned pieces of 8 bytes

  __device__ __forceinline__ explicit PanelBlock(const BgmvArgs& a)
      : args(a),
        tile_rows(a.group_rows),
        tile_outputs(kPanelTile * a.team * kPanelTile / a.group_rows),
        first(a.first_row + static_cast<int64_t>(blockIdx.x) * a.steps * a.group_rows),
        m_block((a.first_tile + static_cast<int64_t>(blockIdx.y)) * tile_outputs),
        rows(static_cast<int>(min(a.batch - first, static_cast<int64_t>(a.steps) * a.group_rows))),
        tiles((rows + tile_rows - 1) / tile_rows),
        outputs(static_cast<int>(min(a.h_out - m_block, static_cast<int64_t>(tile_outputs)))),
        h_in(a.h_in),
        x(static_cast<const T*>(a.x)),
        x_last(x_end(a, x)),
        x_pieces(reinterpret_cast<uintptr_t>(x) % 8 == 0 && a.x_stride % 4 == 0 && a.h_in % 4 == 0) {}

  // Lines of y of a tile into the second-level cache.
  __device__ __forceinline__ void prefetch_y(int tile) const {
    const int lines = tile_outputs / 64, count = lines * min(rows - tile * tile_rows, tile_rows);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int row = lines == 1 ? i : i / 2, output = lines == 1 ? 0 : i % 2 * 64;
      if (output < outputs) {
        prefetch_line(static_cast<const T*>(args.y) + (first + tile * tile_rows + row) * args.y_stride + m_block +
                      output);
      }
    }
  }

  // False: none of the rows has the adapter.
  __device__ __forceinline__ bool find() {
    int any = 0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) any |= load_entry(args.indices + first + i) == 0;
    const int64_t address = load_entry(args.w_ptr);
    any = __syncthreads_or(any);
    if (!args.early_reads) launch_dependents<kArch>();
    w = reinterpret_cast<const T*>(address) + args.layer_offset;
    w_last = w + static_cast<int64_t>(args.h_out) * h_in;
    w_pieces = address % 8 == 0 && args.layer_offset % 4 == 0 && h_in % 4 == 0;
    return any != 0;
  }

  // kSteps x 32 elements of K (0: 16), kApart from one step to the next, of `lines` rows, a multiple of 64, into
  // matrices; zeros from row `count` and from h_in on.
  template <int kSteps, int kApart, bool kOutputs>
  __device__ __forceinline__ void copy(unsigned char* to, const T* from, int64_t stride, int k, int lines, int count,
                                       bool pieces, const T* begin, const T* end) const {
    if (pieces) {
      panel_copy<T, kSteps, kApart, kOutputs, true>(to, from, stride, k, lines, count, h_in, begin, end);
    } else {
      panel_copy_unaligned<T, kSteps, kApart, kOutputs>(to, from, stride, k, lines, count, h_in, begin, end);
    }
  }
  template <int kSteps, int kApart = 32>
  __device__ __forceinline__ void copy_w(unsigned char* to, int k) const {
    copy<kSteps, kApart, true>(to, w + m_block * h_in, h_in, k, tile_outputs, outputs, w_pieces, w, w_last);
  }
  template <int kSteps, int kApart = 32>
  __device__ __forceinline__ void copy_x(unsigned char* to, int tile, int k) const {
    copy<kSteps, kApart, false>(to, x + (first + tile * tile_rows) * args.x_stride, args.x_stride, k, tile_rows,
                                rows - tile * tile_rows, x_pieces, x, x_last);
  }

  // Of this lane: whether a row, counted from the block's first one, has the adapter.
  __device__ __forceinline__ bool has_adapter(int row) const {
    return row < rows && load_entry(args.indices + first + row) == 0;
  }
};

// Where a warp is in a block's tile.
struct PanelWarp {
  int row, output, row_group, output_group;  // its first row and output, and those of its warpgroup, in 64s

  __device__ __forceinline__ explicit PanelWarp(const BgmvArgs& args) {
    const int group = threadIdx.x / 128;
    row_group = args.group_rows > kPanelTile ? group : 0;
    output_group = args.group_rows > kPanelTile ? 0 : group;
    row = kPanelTile * row_group + threadIdx.x % 128 / 32 * 16;
    output = kPanelTile * output_group;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Of matrices whose next eight rows are `group` bytes behind.
__device__ __forceinline__ uint64_t panel_descriptor(const unsigned char* address, int group) {
  return hopper::wgmma_descriptor(hopper::uniform(shared_address(address)), 0, kPanelMatrix, group);
}
#endif

// ---- h_in up to 128 ------------------------------------------------------------------------------------------------

// Grid: (chunks of rows, tiles of outputs). args.steps: tiles of rows of a chunk; args.resident: buffers of x. kSteps:
// of K, 32 elements each; 0: 16.
template <Arch kArch, class T, int kSteps>
__global__ void __launch_bounds__(256, 2) bgmv_panel_short_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kLine = kPanelLine<kSteps>, kGroup = 8 * kLine;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    PanelBlock<kArch, T> block(args);
    unsigned char* const w_image = bulk_shared;
    unsigned char* const x_images = w_image + block.tile_outputs * kLine;
    const int x_bytes = block.tile_rows * kLine;
    const int lane = threadIdx.x % 32;
    const PanelWarp mine(args);
    float* const sums = reinterpret_cast<float*>(x_images + args.resident * x_bytes) + threadIdx.x / 32 * kPanelSumFloats;
    block.prefetch_y(0);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (!block.find()) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    block.template copy_w<kSteps>(w_image, 0);
    if (args.early_reads) grid_dependency_wait<kArch>();
    block.template copy_x<kSteps>(x_images, 0, 0);
    copy_commit();
    const uint64_t w_at = panel_descriptor(w_image + mine.output * kLine, kGroup);
    const uint64_t x_at = panel_descriptor(x_images + kPanelTile * mine.row_group * kLine, kGroup);
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      const int row = tile * block.tile_rows + mine.row;
      const bool has = lane < 16 && block.has_adapter(row + lane);
      PanelRows<T> y{args, static_cast<T*>(args.y) + (block.first + row) * args.y_stride + block.m_block + mine.output,
                     block.rows - row, block.outputs - mine.output};
      y.load();
      copy_wait<0>();
      hopper::fence_async_proxy();
      __syncthreads();  // this x is there, and nobody reads the one before
      if (tile + 1 < block.tiles) {
        block.template copy_x<kSteps>(x_images + (tile + 1) % 2 * x_bytes, tile + 1, 0);
        block.prefetch_y(tile + 1);
      }
      copy_commit();
      const uint64_t x_tile = x_at + (tile % 2 * x_bytes >> 4);
      float chains[kSteps == 0 ? 1 : 2][32];
      hopper::products_fence();
      if constexpr (kSteps == 0) {
        hopper::wgmma_m64k16<T, 64, false, false>(chains[0], x_tile, w_at);
      } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int behind = (s * kPanelStep + half * 2 * kPanelMatrix) >> 4;
            if (s == 0) {
              hopper::wgmma_m64k16<T, 64, false, false>(chains[half], x_tile + behind, w_at + behind);
            } else {
              hopper::wgmma_m64k16<T, 64, false, true>(chains[half], x_tile + behind, w_at + behind);
            }
          }
        }
      }
      hopper::products_commit();
      hopper::products_wait<0>();
      hopper::pin(chains[0]);
      if constexpr (kSteps > 0) {
        hopper::pin(chains[1]);
#pragma unroll
        for (int i = 0; i < 32; ++i) chains[0][i] += chains[1][i];
      }
      y.store(chains[0], __ballot_sync(0xffffffffu, has), sums);
    }
#endif
  }
}

// ---- h_in from 129 to 512 ------------------------------------------------------------------------------------------

// Grid: (chunks of rows, tiles of outputs). args.steps: tiles of rows of a chunk. kSteps: of K, 256 elements each.
template <Arch kArch, class T, int kSteps>
__global__ void __launch_bounds__(256, 2) bgmv_panel_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kLine = kPanelLine<kSteps>, kGroup = 8 * kLine, kStages = kPanelStages, kAhead = kStages - 1;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    PanelBlock<kArch, T> block(args);
    const int units = min((args.h_in + 31) / 32, kSlices);  // of a tile: slices that are not all zeros
    const int w_bytes = block.tile_outputs * kLine, x_bytes = block.tile_rows * kLine;
    unsigned char* const w_image = bulk_shared;
    unsigned char* const ring = w_image + kSlices * w_bytes;
    const int lane = threadIdx.x % 32;
    const PanelWarp mine(args);
    float* const sums = reinterpret_cast<float*>(ring + kStages * x_bytes) + threadIdx.x / 32 * kPanelSumFloats;
    block.prefetch_y(0);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (!block.find()) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const auto start_w = [&](int unit) {
      block.template copy_w<kSteps, kDiagonalStep>(w_image + unit * w_bytes, 32 * unit);
    };
    int copy_tile = 0, copy_unit = 0, copy_stage = 0;
    const auto start_x = [&] {
      block.template copy_x<kSteps, kDiagonalStep>(ring + copy_stage * x_bytes, copy_tile, 32 * copy_unit);
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_unit == units) {
        copy_unit = 0;
        ++copy_tile;
      }
    };
    if (args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < min(kAhead, units); ++i) start_w(i);
      grid_dependency_wait<kArch>();
    }
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      if (copy_tile < block.tiles) {
        if (!args.early_reads && copy_tile == 0) start_w(copy_unit);
        start_x();
      }
      copy_commit();
    }
    const uint64_t w_at = panel_descriptor(w_image + mine.output * kLine, kGroup);
    const uint64_t x_at = panel_descriptor(ring + kPanelTile * mine.row_group * kLine, kGroup);
    int stage = 0;
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      const int row = tile * block.tile_rows + mine.row;
      const bool has = lane < 16 && block.has_adapter(row + lane);
      float total[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) total[i] = 0;
      PanelRows<T> y{args, static_cast<T*>(args.y) + (block.first + row) * args.y_stride + block.m_block + mine.output,
                     block.rows - row, block.outputs - mine.output};
#pragma unroll 1
      for (int unit = 0; unit < units; ++unit) {
        copy_wait<kAhead - 1>();
        hopper::fence_async_proxy();
        __syncthreads();  // this unit is there, and nobody reads the one before
        if (copy_tile < block.tiles) {
          if (copy_tile == 0) start_w(copy_unit);
          start_x();
          if (copy_unit == 0 && copy_tile < block.tiles) block.prefetch_y(copy_tile);
        }
        copy_commit();
        float product[kSteps][32];
        hopper::products_fence();
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const uint64_t x_step = x_at + ((stage * x_bytes + s * kPanelStep) >> 4);
          const uint64_t w_step = w_at + ((unit * w_bytes + s * kPanelStep) >> 4);
          hopper::wgmma_m64k16<T, 64, false, false>(product[s], x_step, w_step);
          hopper::wgmma_m64k16<T, 64, false, true>(product[s], x_step + (2 * kPanelMatrix >> 4),
                                                   w_step + (2 * kPanelMatrix >> 4));
        }
        hopper::products_commit();
        hopper::products_wait<0>();
        // The sum of a slice begins with zero, which adds nothing.
#pragma unroll
        for (int s = 0; s < kSteps; ++s) hopper::pin(product[s]);
#pragma unroll
        for (int i = 0; i < 32; ++i) total[i] += kSteps == 2 ? product[0][i] + product[kSteps - 1][i] : product[0][i];
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      y.load();
      y.store(total, __ballot_sync(0xffffffffu, has), sums);
    }
#endif
  }
}

}  // namespace punica::cuda::bgmv
