// dispatch_bgmv of float16 and bfloat16 where h_in is at most 512 (expand), many rows and one adapter, on sm_90: the
// sums of bgmv_bulk_short.cuh or, above 128, of bgmv_diagonal.cuh, term by term.
//
// The weights of 128 outputs, all of K, stay in a block's shared memory while tiles of rows pass: whole rows of x
// through two buffers, or, above 128, slice of K after slice through a ring. A warp takes 64 outputs and 32 rows. Which
// output has which row of the products is free: lane g's are eight neighbours, so that y goes through registers in
// pieces of 16 bytes. Rows are neighbours in the batch, whatever their indices say: nothing is searched, and those that
// name no adapter are not stored.
#pragma once

#include <algorithm>

#include "src/cuda/lora/bgmv_bulk.cuh"
#include "src/cuda/lora/bgmv_diagonal.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kPanelMaxIn = 2 * kDiagonalStep;       // where K is not shared by warps
inline constexpr int kPanelOutputs = 128;                   // of a block
inline constexpr int kPanelPitch = 64 + 4;                  // floats, of the sums of a row where y is not aligned
inline constexpr int kPanelSumBytes = 4 * 8 * kPanelPitch;  // of a warp

// Brings pieces of `kLines` rows into shared memory, kPieces of 16 bytes a line, zeros from row `count` and from h_in
// on. `k`: the first element of this thread's piece. kPermuted: row 8 g + q of 64 becomes line 8 q + g. Odd lines have
// halves of 128 bytes exchanged, so that the eight lanes of an access, two rows of 64 bytes, meet no conflict.
template <class T, int kPieces, int kThreads, int kLines, bool kPermuted>
__device__ __forceinline__ void panel_copy(unsigned char* to, const T* from, int64_t stride, int k, int count, int h_in,
                                           bool aligned, const T* begin, const T* end) {
  constexpr int kApart = kThreads / kPieces;  // rows from one copy of a thread to the next
  constexpr int kCopies = kLines > kApart ? kLines / kApart : 1;
  static_assert(kApart % 8 == 0 && kLines % 64 == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const auto line_of = [](int r) { return kPermuted ? (r & ~63) + r % 8 * 8 + r % 64 / 8 : r; };
  const int line = line_of(row);
  from += row * stride + k;
  to += line * 16 * kPieces + 16 * (kPieces >= 8 ? piece ^ (line % 2 * 4) : piece);
  // Copies are a multiple of eight rows apart: the lines of what is added to the first add up, and stay even or odd.
  static_assert(!kPermuted || kApart >= 16);
  const auto place = [&](int i) { return reinterpret_cast<Words<4>*>(to + line_of(i * kApart) * 16 * kPieces); };
  if (kLines < kApart && row >= kLines) return;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      start_copy<4>(place(i), from, k < h_in && row + i * kApart < count);
      from += kApart * stride;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      Unaligned<4> words;
      words.start(from, row + i * kApart < count ? h_in - k : 0, begin, end);
      *place(i) = words.finish();
      from += kApart * stride;
    }
  }
}

// y of kRow x 8 rows and a warp's 64 outputs. Lane (g, t) has the sums of outputs 8 g + 2 m + h of row 8 n + 2 t + e in
// total[m][n][2 h + e].
template <class T, int kRow>
struct PanelRows {
  const BgmvArgs& args;
  T* y;      // of row 0, output 0
  int rows;  // from row 0 on
  int outputs;
  Words<4> before[kRow][2];

  // Where y consists of whole pieces.
  __device__ __forceinline__ void load() {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const T* const from = y + 2 * t * args.y_stride + 8 * g;
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        before[n][e] =
            load_if(args.wide_y && 8 * g < outputs && 8 * n + 2 * t + e < rows, from + (8 * n + e) * args.y_stride);
      }
    }
  }

  // `valid`: a bit for each row. `sums`: kPanelSumBytes of the warp.
  __device__ __forceinline__ void store(const float (&total)[4][kRow][4], uint32_t valid, float* sums) const {
    if (!args.wide_y) return store_unaligned(total, valid, sums);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    T* const to = y + 2 * t * args.y_stride + 8 * g;
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[8];
#pragma unroll
        for (int q = 0; q < 8; ++q) v[q] = total[q / 2][n][q % 2 * 2 + e];
        const Words<4> after = add_sums<T>(args, before[n][e], v);
        if (8 * g < outputs && (valid >> (8 * n + 2 * t + e) & 1) != 0) {
          *reinterpret_cast<uint4*>(to + (8 * n + e) * args.y_stride) =
              make_uint4(after.values[0], after.values[1], after.values[2], after.values[3]);
        }
      }
    }
  }

  // Eight rows at a time through shared memory. Of the 64 outputs of a row all whole pieces of 16 bytes go as such, the
  // edges element by element.
  __device__ __forceinline__ void store_unaligned(const float (&total)[4][kRow][4], uint32_t valid, float* sums) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int used = min(outputs, 64);
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
      __syncwarp();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int q = 0; q < 8; ++q) sums[(2 * t + e) * kPanelPitch + 8 * g + q] = total[q / 2][n][q % 2 * 2 + e];
      }
      __syncwarp();
      const auto row_of = [&](int row) { return y + (8 * n + row) * args.y_stride; };
      // Outputs before the first whole piece.
      const auto edge_of = [&](int row) {
        return (-static_cast<int>(reinterpret_cast<uintptr_t>(row_of(row)) / 2)) & 7;
      };
      const auto stores = [&](int row) { return (valid >> (8 * n + row) & 1) != 0; };
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

// What a block works on.
template <Arch kArch, class T, int kRows, int kThreads>
struct PanelBlock {
  const BgmvArgs& args;
  int64_t first, m_block;
  int rows, tiles, outputs, h_in;
  const T *x, *x_last, *w, *w_last;
  bool x_aligned, w_aligned;

  // False: none of the rows has the adapter.
  __device__ __forceinline__ explicit PanelBlock(const BgmvArgs& a)
      : args(a),
        first(a.first_row + static_cast<int64_t>(blockIdx.x) * a.steps * kRows),
        m_block((a.first_tile + static_cast<int64_t>(blockIdx.y)) * kPanelOutputs),
        rows(static_cast<int>(min(a.batch - first, static_cast<int64_t>(a.steps) * kRows))),
        tiles((rows + kRows - 1) / kRows),
        outputs(static_cast<int>(min(a.h_out - m_block, int64_t{kPanelOutputs}))),
        h_in(a.h_in),
        x(static_cast<const T*>(a.x)),
        x_last(x_end(a, x)),
        x_aligned(reinterpret_cast<uintptr_t>(x) % 16 == 0 && a.x_stride % 8 == 0 && a.h_in % 8 == 0) {}

  // Lines of y of a tile into the second-level cache.
  __device__ __forceinline__ void prefetch_y(int tile) const {
    const int count = 2 * min(rows - tile * kRows, kRows);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (i % 2 * 64 < outputs) {
        prefetch_line(static_cast<const T*>(args.y) + (first + tile * kRows + i / 2) * args.y_stride + m_block +
                      i % 2 * 64);
      }
    }
  }

  // False: none of the rows has the adapter.
  __device__ __forceinline__ bool find() {
    int any = 0;
    for (int i = threadIdx.x; i < rows; i += kThreads) any |= load_entry(args.indices + first + i) == 0;
    const int64_t address = load_entry(args.w_ptr);
    any = __syncthreads_or(any);
    if (!args.early_reads) launch_dependents<kArch>();
    w = reinterpret_cast<const T*>(address) + args.layer_offset;
    w_last = w + static_cast<int64_t>(args.h_out) * h_in;
    w_aligned = address % 16 == 0 && args.layer_offset % 8 == 0 && h_in % 8 == 0;
    return any != 0;
  }

  template <int kPieces>
  __device__ __forceinline__ void copy_w(unsigned char* to, int k) const {
    panel_copy<T, kPieces, kThreads, kPanelOutputs, true>(to, w + m_block * h_in, h_in, k, outputs, h_in, w_aligned, w,
                                                          w_last);
  }
  template <int kPieces>
  __device__ __forceinline__ void copy_x(unsigned char* to, int tile, int k) const {
    panel_copy<T, kPieces, kThreads, kRows, false>(to, x + (first + tile * kRows) * args.x_stride, args.x_stride, k,
                                                   rows - tile * kRows, h_in, x_aligned, x, x_last);
  }

  // Of this lane: whether a row of the tile's 32 of the warp has the adapter.
  __device__ __forceinline__ bool has_adapter(int row) const {
    return row < rows && load_entry(args.indices + first + row) == 0;
  }
};

// ---- h_in up to 128 ------------------------------------------------------------------------------------------------

// kSteps: of K, 32 elements each; 0: 16.
template <int kSteps>
struct PanelShortTile {
  static constexpr int kRows = 128, kThreads = 256;
  static constexpr int64_t kBlocks = 2;  // of a multiprocessor
  static constexpr int kPieces = kSteps == 0 ? 2 : 4 * kSteps, kLine = 16 * kPieces;
  static constexpr size_t kSharedBytes = (kPanelOutputs + 2 * kRows) * kLine + 8 * kPanelSumBytes;
};

// Grid: (chunks of rows, tiles of outputs). args.steps: tiles of rows of a chunk.
template <Arch kArch, class T, int kSteps>
__global__ void __launch_bounds__(256, 2) bgmv_panel_short_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = PanelShortTile<kSteps>;
    constexpr int kPieces = Tile::kPieces, kLine = Tile::kLine;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    unsigned char* const w_image = bulk_shared;
    unsigned char* const x_images = w_image + kPanelOutputs * kLine;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int out_warp = warp % 2, row_warp = warp / 2;
    float* const sums = reinterpret_cast<float*>(x_images + 2 * Tile::kRows * kLine) + warp * (kPanelSumBytes / 4);
    PanelBlock<kArch, T, Tile::kRows, Tile::kThreads> block(args);
    block.prefetch_y(0);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (!block.find()) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const int k = tid % kPieces * 8;
    block.template copy_w<kPieces>(w_image, k);
    if (args.early_reads) grid_dependency_wait<kArch>();
    block.template copy_x<kPieces>(x_images, 0, k);
    copy_commit();
    const int outputs = block.outputs - 64 * out_warp;
    const auto place = [&](int step) {
      return kSteps == 0 ? 8 * t : 16 * (kPieces >= 8 ? (4 * step + t) ^ (g % 2 * 4) : t);
    };
    const unsigned char* const w_lane = w_image + (64 * out_warp + g) * kLine;
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      copy_wait<0>();
      __syncthreads();  // this x is there, and nobody reads the one before
      if (tile + 1 < block.tiles) {
        block.template copy_x<kPieces>(x_images + (tile + 1) % 2 * Tile::kRows * kLine, tile + 1, k);
        block.prefetch_y(tile + 1);
      }
      copy_commit();
      const int tile_row = tile * Tile::kRows + 32 * row_warp;
      const bool mine = block.has_adapter(tile_row + lane);
      const unsigned char* const x_lane = x_images + (tile % 2 * Tile::kRows + 32 * row_warp + g) * kLine;
      constexpr int kRow = 2;  // at a time
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row + 8 * kRow * half;
        PanelRows<T, kRow> y{
            args, static_cast<T*>(args.y) + (block.first + row) * args.y_stride + block.m_block + 64 * out_warp,
            block.rows - row, outputs};
        y.load();
        float total[4][kRow][4];
        if constexpr (kSteps == 0) {
          Words<2> xs[kRow];
#pragma unroll
          for (int n = 0; n < kRow; ++n) {
            xs[n] = *reinterpret_cast<const Words<2>*>(x_lane + (8 * kRow * half + 8 * n) * kLine + place(0));
          }
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const Words<2> a = *reinterpret_cast<const Words<2>*>(w_lane + 16 * m * kLine + place(0));
            const Words<2> b = *reinterpret_cast<const Words<2>*>(w_lane + (16 * m + 8) * kLine + place(0));
#pragma unroll
            for (int n = 0; n < kRow; ++n) {
              mma_from_zero<T>(total[m][n], a.values[0], b.values[0], a.values[1], b.values[1], xs[n].values[0],
                               xs[n].values[1]);
            }
          }
        } else {
          Words<4> xs[kSteps][kRow];
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
#pragma unroll
            for (int n = 0; n < kRow; ++n) {
              xs[s][n] = *reinterpret_cast<const Words<4>*>(x_lane + (8 * kRow * half + 8 * n) * kLine + place(s));
            }
          }
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float chains[kRow][2][4] = {};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
              const Words<4> upper = *reinterpret_cast<const Words<4>*>(w_lane + 16 * m * kLine + place(s));
              const Words<4> lower = *reinterpret_cast<const Words<4>*>(w_lane + (16 * m + 8) * kLine + place(s));
#pragma unroll
              for (int n = 0; n < kRow; ++n) step_product<T>(chains[n], upper, lower, xs[s][n]);
            }
#pragma unroll
            for (int n = 0; n < kRow; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) total[m][n][e] = chains[n][0][e] + chains[n][1][e];
            }
          }
        }
        const uint32_t valid = __ballot_sync(0xffffffffu, mine);
        y.store(total, valid >> (8 * kRow * half), sums);
      }
    }
  }
}

// ---- h_in from 129 to 512 ------------------------------------------------------------------------------------------

// The rows g (upper) and g + 8 (lower) of a product's first operand, in the registers as the two products of a step
// take them. `zero` is 0, but the compiler does not know: otherwise it would copy all of them to a new place for every
// product, as where the loads left them they are not in their order.
struct StepRows {
  uint32_t a[2][4];

  __device__ __forceinline__ void set(const Words<4>& upper, const Words<4>& lower, uint32_t zero) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2 * 2] = upper.values[i] ^ zero;
      a[i / 2][i % 2 * 2 + 1] = lower.values[i] ^ zero;
    }
  }
};
__device__ __forceinline__ uint32_t hidden_zero(const BgmvArgs& args) { return static_cast<uint32_t>(args.h_in >> 31); }

// The products of a step, from zero, of kOut x 16 outputs and kRow x 8 rows: first those that wait for nothing.
template <class T, int kOut, int kRow>
__device__ __forceinline__ void step_products(float (&product)[kRow][kOut][4], const StepRows (&w)[kOut],
                                              const Words<4> (&x)[kRow]) {
#pragma unroll
  for (int n = 0; n < kRow; ++n) {
#pragma unroll
    for (int m = 0; m < kOut; ++m) {
      const auto& a = w[m].a[0];
      mma_from_zero<T>(product[n][m], a[0], a[1], a[2], a[3], x[n].values[0], x[n].values[1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kRow; ++n) {
    const uint32_t b[2] = {x[n].values[2], x[n].values[3]};
#pragma unroll
    for (int m = 0; m < kOut; ++m) mma_m16n8k16<T>(product[n][m], w[m].a[1], b);
  }
}

// kSteps: of K, 256 elements each. kRow x 8 rows of a warp.
template <int kSteps, int kRow>
struct PanelTile {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 8 * kRow * kWarps / 2;
  static constexpr int kPieces = 4 * kSteps, kLine = 16 * kPieces;  // of a row of a slice
  static constexpr int kWeightBytes = kPanelOutputs * kLine, kStageBytes = kRows * kLine;
  static constexpr int kSumBytes = kPanelSumBytes * kWarps;
  static constexpr int64_t kBlocks = kSteps == 1 && kRow == 2 ? 2 : 1;  // of a multiprocessor
  static constexpr int kRoom = (227 << 10) / kBlocks - (kBlocks > 1 ? 1024 : 0) - kSlices * kWeightBytes - kSumBytes;
  static constexpr int kStages = std::min(8, kRoom / kStageBytes);
  static constexpr size_t kSharedBytes = kSlices * kWeightBytes + kStages * kStageBytes + kSumBytes;
};

// Grid: (chunks of rows, tiles of outputs). args.steps: tiles of rows of a chunk.
template <Arch kArch, class T, int kSteps, int kRow>
__global__ void __launch_bounds__(256, PanelTile<kSteps, kRow>::kBlocks)
    bgmv_panel_kernel(const __grid_constant__ BgmvArgs args) {
  if constexpr (kCompiled<kArch>) {
    using Tile = PanelTile<kSteps, kRow>;
    constexpr int kStages = Tile::kStages, kOut = 4, kWarpRows = 8 * kRow;
    if (args.early_reads) launch_dependents<kArch>();
    extern __shared__ __align__(128) unsigned char bulk_shared[];
    unsigned char* const w_image = bulk_shared;
    unsigned char* const ring = w_image + kSlices * Tile::kWeightBytes;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int out_warp = warp % 2, row_warp = warp / 2;
    float* const sums = reinterpret_cast<float*>(ring + kStages * Tile::kStageBytes) + warp * (kPanelSumBytes / 4);
    PanelBlock<kArch, T, Tile::kRows, Tile::kThreads> block(args);
    const int units = min((args.h_in + 31) / 32, kSlices);  // of a tile: slices that are not all zeros
    block.prefetch_y(0);
    if (!args.early_reads) grid_dependency_wait<kArch>();
    if (!block.find()) {
      if (args.early_reads) grid_dependency_wait<kArch>();
      return;
    }
    const int k_thread = tid % Tile::kPieces / 4 * kDiagonalStep + tid % 4 * 8;
    const auto start_w = [&](int unit) {
      block.template copy_w<Tile::kPieces>(w_image + unit * Tile::kWeightBytes, k_thread + 32 * unit);
    };
    int copy_tile = 0, copy_unit = 0, copy_stage = 0;
    const auto start_x = [&] {
      block.template copy_x<Tile::kPieces>(ring + copy_stage * Tile::kStageBytes, copy_tile, k_thread + 32 * copy_unit);
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_unit == units) {
        copy_unit = 0;
        ++copy_tile;
      }
    };
    if (args.early_reads) {
#pragma unroll 1
      for (int i = 0; i < min(kStages - 1, units); ++i) start_w(i);
      grid_dependency_wait<kArch>();
    }
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (copy_tile < block.tiles) {
        if (!args.early_reads && copy_tile == 0) start_w(copy_unit);
        start_x();
      }
      copy_commit();
    }

    const unsigned char* const w_lane = w_image + (64 * out_warp + g) * Tile::kLine;
    const unsigned char* const x_lane = ring + (kWarpRows * row_warp + g) * Tile::kLine;
    const uint32_t zero = hidden_zero(args);
    int stage = 0;
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      const int tile_row = tile * Tile::kRows + kWarpRows * row_warp;
      float total[kOut][kRow][4];
#pragma unroll
      for (int i = 0; i < kOut * kRow * 4; ++i) total[i / 4 / kRow][i / 4 % kRow][i % 4] = 0;
      const bool mine = lane < kWarpRows && block.has_adapter(tile_row + lane);
      PanelRows<T, kRow> y{
          args, static_cast<T*>(args.y) + (block.first + tile_row) * args.y_stride + block.m_block + 64 * out_warp,
          block.rows - tile_row, block.outputs - 64 * out_warp};
      y.load();
#pragma unroll 1
      for (int unit = 0; unit < units; ++unit) {
        copy_wait<kStages - 2>();
        __syncthreads();  // this unit is there, and nobody reads the one before
        if (copy_tile < block.tiles) {
          if (copy_tile == 0) start_w(copy_unit);
          start_x();
        }
        copy_commit();
        const auto place = [&](int step) { return 16 * (kSteps == 2 ? (4 * step + t) ^ (g % 2 * 4) : t); };
        StepRows a[kSteps][kOut];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const unsigned char* const from = w_lane + unit * Tile::kWeightBytes + place(s);
#pragma unroll
          for (int m = 0; m < kOut; ++m) {
            a[s][m].set(*reinterpret_cast<const Words<4>*>(from + 16 * m * Tile::kLine),
                        *reinterpret_cast<const Words<4>*>(from + (16 * m + 8) * Tile::kLine), zero);
          }
        }
#pragma unroll
        for (int n = 0; n < kRow; ++n) {
          float product[kSteps][1][kOut][4];
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            const Words<4> xs[1] = {*reinterpret_cast<const Words<4>*>(x_lane + stage * Tile::kStageBytes +
                                                                       8 * n * Tile::kLine + place(s))};
            step_products<T>(product[s], a[s], xs);
          }
          // The sum of a slice begins with zero, which adds nothing.
#pragma unroll
          for (int i = 0; i < kOut * 4; ++i) {
            const float first = product[0][0][i / 4][i % 4];
            total[i / 4][n][i % 4] += kSteps == 2 ? first + product[kSteps - 1][0][i / 4][i % 4] : first;
          }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      y.store(total, __ballot_sync(0xffffffffu, mine), sums);
    }
  }
}

}  // namespace punica::cuda::bgmv
