// The way through add_lora_ring.cuh where nothing is in the way: everything aligned to 16 bytes, ranks up to 64. The
// same sums with as few instructions as possible, for these are what a small batch takes its time for: a multiprocessor
// has few warps at work, and each instruction of a warp waits for the one before it.
//
// What is simpler here: a warp's units follow each other at fixed distances (Stream), pieces of x come with their units
// of A through the ring, v goes from the blocks' parts of it straight into registers, all of it at once.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"
#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kPlainDepth = 4;
inline constexpr int kPlainUnitBytes = kUnitBytes + 1024;  // with eight rows of x

// Shared memory of a block: the chains' parts of v, [chain][row][rank]; what the blocks of a team have sent each other,
// one or two buffers of [block][row][rank]; the rings.
__host__ __device__ constexpr int plain_width(int rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }
__host__ __device__ constexpr int plain_part_floats(int max_rank, int min_team_bits) {
  return (kChains >> min_team_bits) * kTileRows * (plain_width(max_rank) + 4);
}
__host__ __device__ constexpr int plain_receive_floats(int max_rank, int max_team_bits) {
  return kTileRows * plain_width(max_rank) << max_team_bits;
}

__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

template <Arch kArch, class T, int kWarps>
struct PlainBlock {
  const Args& args;
  const Work<kTileRows>& work;
  uint64_t* received;
  float* parts;
  float* receive;
  uint32_t ring;  // of the warp
  int receive_floats;
  int team_bits, team_rank;
  int warp, lane;

  // ---- What the warp copies ----------------------------------------------------------------------------------------

  // Units at equal distances: those of a chain and tile of A, or all of the warp's of B.
  const char* from;                  // of the lane's first piece of the next unit
  int64_t row_step;                  // bytes to its next piece of the unit, of four
  int64_t unit_step;                 // bytes to the next unit
  int left, pieces, pieces_of_last;  // units; pieces of the lane in a unit that are there
  int bytes;                         // of a piece, zeros behind them
  uint32_t to, to_odd;               // of pieces 0 and 2, and of the others, 512 bytes each after the one before
  int k;                             // of A: byte in the row; of B: 0
  bool of_a;
  uint32_t fill_at;  // the ring's place for the next unit
  int fill_slice, fill_task;
  // The lane's rows of x, two; null where there is none.
  const char* x[2];

  __device__ __forceinline__ int length() const {
    return ((args.h_in + kPiece - 1) / kPiece + kChains - 1) >> kChainBits;
  }
  __device__ __forceinline__ int chain_bits() const { return kChainBits - team_bits; }
  __device__ __forceinline__ int tasks(int rank) const { return (rank + 15) / 16 << chain_bits(); }
  __device__ __forceinline__ int chain_of(int task) const {
    return (team_rank << chain_bits()) + (task & ((1 << chain_bits()) - 1));
  }

  __device__ __forceinline__ void next_stream() {
#pragma unroll 1
    while (left == 0 && fill_slice < work.num_slices) {
      const Slice& s = work.slices[fill_slice];
      if (fill_task < tasks(s.rank)) {
        const int row = (fill_task >> chain_bits()) * 16 + lane / 8;
        of_a = true;
        k = 2 * kPiece * chain_of(fill_task) + lane % 8 * 16;
        from = static_cast<const char*>(s.a) + static_cast<int64_t>(row) * (2 * args.h_in) + k;
        row_step = int64_t{8} * args.h_in;
        unit_step = 2 * kPiece * kChains;
        pieces = pieces_of_last = (s.rank - row + 3) / 4;
        bytes = 16;
        to = to_odd = 16 * place<3>(lane / 8, lane % 8);
        left = length();
        fill_task += kWarps;
      } else {
        const int bits = s.rank <= 16 ? 1 : s.rank <= 32 ? 2 : 3;
        const int row = lane >> bits, piece = lane & ((1 << bits) - 1);
        const int outputs = 128 >> bits, first = (team_rank * kWarps + warp) * outputs;
        const int step = outputs * kWarps << team_bits, rows = 32 >> bits;
        of_a = false;
        k = 0;
        from = static_cast<const char*>(s.b) + 2 * ((first + row) * s.b_stride + 8 * piece);
        row_step = 2 * s.b_stride * rows;
        unit_step = 2 * s.b_stride * step;
        left = first < s.width ? (s.width - first + step - 1) / step : 0;
        pieces = 4;
        pieces_of_last = (s.width - first - (left - 1) * step - row + rows - 1) >> (5 - bits);
        bytes = 2 * min(max(s.rank - 8 * piece, 0), 8);
        // Of two pieces a row the swizzle turns with every 16 rows.
        to = 16 * (bits == 3 ? place<3>(row, piece) : bits == 2 ? place<2>(row, piece) : place<1>(row, piece));
        to_odd = bits == 1 ? to ^ 64 : to;
        fill_task = warp;
        ++fill_slice;
      }
    }
  }

  __device__ __forceinline__ void copy_x(uint32_t at, int k_at) const {
    const int bytes_at = k_at < 2 * args.h_in ? 16 : 0;
    if (x[0] != nullptr) copy_16(at + kUnitBytes, x[0] + k_at, bytes_at);
    if (x[1] != nullptr) copy_16(at + kUnitBytes + 512, x[1] + k_at, bytes_at);
  }

  // What lies behind the last row of A or B is not written: sums of it are not looked at. Behind the end of a row there
  // are zeros.
  template <bool kX>
  __device__ __forceinline__ void start_unit() {
    const int count = left == 1 ? pieces_of_last : pieces;
    const int size = k < 2 * args.h_in ? bytes : 0;
    const uint32_t even = fill_at + to, odd = fill_at + to_odd;
    const char* const second = from + row_step;
    const char* const third = second + row_step;
    if (count > 0) copy_16(even, from, size);
    if (count > 1) copy_16(odd + 512, second, size);
    if (count > 2) copy_16(even + 1024, third, size);
    if (count > 3) copy_16(odd + 1536, third + row_step, size);
    if (of_a) {
      if (kX) copy_x(even, k);
      k += 2 * kPiece * kChains;
    }
    from += unit_step;
    --left;
  }
  __device__ __forceinline__ void advance_fill() {
    fill_at += kPlainUnitBytes;
    if (fill_at == ring + kPlainDepth * kPlainUnitBytes) fill_at = ring;
  }

  __device__ __forceinline__ void start() {
    if (left == 0) next_stream();
    if (left > 0) start_unit<true>();
    copy_commit();
    advance_fill();
  }

  // With early reads the first units, as far as they are those of the first slice, before the wait. How many were
  // started.
  __device__ __forceinline__ int begin() {
    fill_at = read_at = ring;
    fill_slice = 0;
    fill_task = warp;
    left = 0;
    int started = 0;
    if (args.early_reads) {
#pragma unroll 1
      for (; started < kPlainDepth; ++started) {
        if (left == 0) next_stream();
        if (left == 0 || (of_a && fill_slice > 0)) break;
        start_unit<false>();
        advance_fill();
      }
      grid_dependency_wait<kArch>();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 8 + 4 * i;
      x[i] = row < work.count ? static_cast<const char*>(args.x) + work.rows[row] * (2 * args.x_stride) : nullptr;
    }
    if (args.early_reads) {
      const int end = tasks(work.slices[0].rank), length = this->length();
      int task = warp, m = 0;
#pragma unroll 1
      for (int i = 0; i < started; ++i) {
        if (task < end) {
          copy_x(ring + i * kPlainUnitBytes + 16 * place<3>(lane / 8, lane % 8),
                 2 * kPiece * (m * kChains + chain_of(task)) + lane % 8 * 16);
          if (++m == length) m = 0, task += kWarps;
        }
        copy_commit();
      }
    }
    return started;
  }

  // ---- A slice -----------------------------------------------------------------------------------------------------

  uint32_t read_at;  // the ring's place of the oldest unit

  // A unit of A with its x.
  __device__ __forceinline__ void multiply(float (&sum)[4]) const {
    const uint32_t offset = 16 * place<3>(lane / 4, lane % 4);
    uint4 upper[2], lower[2], x[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t at = read_at + (offset ^ 64 * c);  // pieces 4c + t of rows g, g + 8
      upper[c] = load_shared_16(at);
      lower[c] = load_shared_16(at + 1024);
      x[c] = load_shared_16(at + kUnitBytes);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      mma_m16n8k16<T>(sum, {upper[c].x, lower[c].x, upper[c].y, lower[c].y}, {x[c].x, x[c].y});
      mma_m16n8k16<T>(sum, {upper[c].z, lower[c].z, upper[c].w, lower[c].w}, {x[c].z, x[c].w});
    }
  }

  // The sums of a task: ranks g and g + 8 of its tile, rows 2t and 2t + 1.
  __device__ __forceinline__ void store_part(int task, const float (&sum)[4], int width) const {
    const int g = lane / 4, t = lane % 4, pitch = width + 4;
    float* const part =
        parts + ((task & ((1 << chain_bits()) - 1)) * kTileRows + 2 * t) * pitch + (task >> chain_bits()) * 16 + g;
    part[0] = sum[0], part[8] = sum[2];
    part[pitch] = sum[1], part[pitch + 8] = sum[3];
  }

  // The block's part of v[row][rank].
  __device__ __forceinline__ float block_part(int row, int rank, int width) const {
    const int stride = kTileRows * (width + 4);
    const float* const of_chain = parts + row * (width + 4) + rank;
    const auto two = [&](int i) { return of_chain[i * stride] + of_chain[(i + 1) * stride]; };
    const auto four = [&](int i) { return two(i) + two(i + 2); };
    float part;
    if (team_bits == 3) {
      part = two(0);
    } else if (team_bits == 2) {
      part = four(0);
    } else {
      part = four(0) + four(4);
      if (kArch == Arch::kSm80 && team_bits == 0) part += four(8) + four(12);
    }
    return part;
  }

  // Makes v known to the team; its blocks' parts of it are then in the buffer that comes back. `number`: of slices
  // before. A block sends for the n-th time when it has received for the (n - 1)-th, and so when all others have read
  // what they received before that: two buffers are enough.
  __device__ __forceinline__ const float* exchange(int rank, int width_bits, int number) {
    const int width = 1 << width_bits, values = work.count << width_bits;  // of a block
    float* const buffer = receive + (number & 1) * receive_floats;
    __syncthreads();  // all parts are there
    if (kArch == Arch::kSm80 || team_bits == 0) {
      for (int i = threadIdx.x; i < values; i += 32 * kWarps) {
        buffer[i] = block_part(i >> width_bits, i & (width - 1), width);
      }
      __syncthreads();
      return buffer;
    }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint32_t barrier = shared_address(received + (number & 1));
    if (threadIdx.x == 0) hopper::barrier_expect(barrier, 4 * work.count * rank << team_bits);
    uint32_t cluster_rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(cluster_rank));
    const uint32_t first_block = cluster_rank & ~((1u << team_bits) - 1);
    // A thread sends to one block at a time: neighbouring threads the same value to all of them.
    const uint32_t peer = first_block + (threadIdx.x & ((1u << team_bits) - 1));
    const uint32_t to = shared_address(buffer + (team_rank * kTileRows << width_bits));
#pragma unroll 1
    for (int i = threadIdx.x >> team_bits; i < values; i += 32 * kWarps >> team_bits) {
      const int row = i >> width_bits, r = i & (width - 1);
      if (r < rank) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                         hopper::remote_address(to + 4 * i, peer)),
                     "f"(block_part(row, r, width)), "r"(hopper::remote_address(barrier, peer))
                     : "memory");
      }
    }
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(number >> 1 & 1)
          : "memory");
    } while (done == 0);
#endif
    return buffer;
  }

  // kTiles tiles of 16 outputs are a unit of B: 4, 2, 1 for ranks up to 16, 32, 64.

  // The lane's part of v as the second operand of the products with B: words of high and low numbers, four for each 32
  // ranks, or two. Also the power of two by which sums are multiplied again (float16).
  template <int kTiles>
  __device__ __forceinline__ float load_v(const float* received_parts, int rank, uint32_t (&high)[8],
                                          uint32_t (&low)[8]) const {
    constexpr int kWidth = 64 / kTiles, kFours = kTiles == 4 ? 1 : kWidth / 16;  // of ranks, of a lane
    const int g = lane / 4, t = lane % 4;
    const float* const all = received_parts + g * kWidth;
    float v[4 * kFours], up = 1;
#pragma unroll
    for (int q = 0; q < kFours; ++q) {
      const int r = kTiles == 4 ? 4 * t : 32 * (q / 2) + 8 * t + 4 * (q % 2);
      const auto part = [&](int i) { return *reinterpret_cast<const float4*>(all + i * (kTileRows * kWidth) + r); };
      const auto sum = [](const float4& a, const float4& b) {
        return float4{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
      };
      float4 four = part(0);
      if (team_bits >= 1) four = sum(four, part(1));
      if (team_bits >= 2) four = sum(four, sum(part(2), part(3)));
      if (team_bits >= 3) four = sum(four, sum(sum(part(4), part(5)), sum(part(6), part(7))));
      v[4 * q] = r < rank ? four.x : 0.0f;
      v[4 * q + 1] = r + 1 < rank ? four.y : 0.0f;
      v[4 * q + 2] = r + 2 < rank ? four.z : 0.0f;
      v[4 * q + 3] = r + 3 < rank ? four.w : 0.0f;
    }
    if constexpr (std::is_same_v<T, __half>) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < 4 * kFours; ++i) largest = fmaxf(largest, isfinite(v[i]) ? fabsf(v[i]) : 0.0f);
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const int exponent = row_exponent(largest);
#pragma unroll
      for (int i = 0; i < 4 * kFours; ++i) v[i] *= down_scale(exponent);
      up = up_scale(exponent);
    }
#pragma unroll
    for (int i = 0; i < 2 * kFours; ++i) split_pair<T>(v[2 * i], v[2 * i + 1], &high[i], &low[i]);
    return up;
  }

  // What y holds of the lane's outputs, 2 * kTiles neighbours of rows 2t and 2t + 1.
  template <int kTiles>
  __device__ __forceinline__ void load_y(T* const (&y)[2], const int (&columns)[2], uint32_t (&held)[2][4]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (columns[e] > 0) {
        const auto words = *reinterpret_cast<const bgmv::Words<kTiles>*>(y[e]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) held[e][i] = words.values[i];
      }
    }
  }

  // A unit of B: adds to y.
  template <int kTiles>
  __device__ __forceinline__ void expand(int rank, const uint32_t (&high)[8], const uint32_t (&low)[8],
                                         T* const (&y)[2], const int (&columns)[2], const uint32_t (&held)[2][4],
                                         const float (&factors)[2]) const {
    const int g = lane / 4, t = lane % 4;
    // Where the lane reads: of the rows that are its outputs, 2 * kTiles * g + 2 i + h. See place().
    const uint32_t offset =
        kTiles == 4 ? 256 * g + 16 * (t / 2 ^ (g & 3) << 1) + t % 2 * 8 : 256 * g + (16 * t ^ 64 * (g & 1));
    float sums[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kTiles == 4) {
        uint2 b[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                       : "=r"(b[h].x), "=r"(b[h].y)
                       : "r"(read_at + (offset ^ (i % 2 * 64 + h * 32)) + i / 2 * 128)
                       : "memory");
        }
        mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {high[0], high[1]});
        mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {low[0], low[1]});
      } else {
#pragma unroll
        for (int c = 0; c < (kTiles == 2 ? 1 : 2); ++c) {
          if (32 * c >= rank) break;
          const uint4 b0 = load_shared_16(read_at + (kTiles == 2 ? offset + 128 * i : offset ^ 64 * c));
          const uint4 b1 =
              load_shared_16(read_at + (kTiles == 2 ? (offset ^ 64) + 128 * i : (offset ^ 64 * (1 - c)) + 128));
          mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {high[4 * c], high[4 * c + 1]});
          mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {low[4 * c], low[4 * c + 1]});
          mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {high[4 * c + 2], high[4 * c + 3]});
          mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {low[4 * c + 2], low[4 * c + 3]});
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (e < work.count && columns[e] > 0) {
        uint32_t after[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          after[i] = fma_pair<T>(held[e][i], factors[e], sums[i][e], sums[i][2 + e]);
        }
        if constexpr (kTiles == 4) {
          asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y[e]), "r"(after[0]), "r"(after[1]),
                       "r"(after[2]), "r"(after[3])
                       : "memory");
        } else if constexpr (kTiles == 2) {
          asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(y[e]), "r"(after[0]), "r"(after[1]) : "memory");
        } else {
          asm volatile("st.global.u32 [%0], %1;" ::"l"(y[e]), "r"(after[0]) : "memory");
        }
      }
    }
  }

  // Unit after unit in one loop, whatever they are of, so that there is little code: what is run for the first time has
  // to be fetched.
  __device__ __forceinline__ void run() {
    int started = begin();
    const int g = lane / 4, t = lane % 4, length = this->length();
    bool met = false;  // the other blocks' barriers are there
    int slice = -1, rank = 0, bits = 0, width = 0;
    int task = 0, end = 0, m = 0;  // of A
    int column = 0, step = 0;      // of B; before v is there, `waits`
    bool waits = false;
    float sum[4], factors[2];
    uint32_t high[8], low[8], held[2][4];
    T* y[2];
    int columns[2];
    const auto hold = [&] {
      if (bits == 1) {
        load_y<4>(y, columns, held);
      } else if (bits == 2) {
        load_y<2>(y, columns, held);
      } else {
        load_y<1>(y, columns, held);
      }
    };
#pragma unroll 1
    for (;;) {
      if (started < kPlainDepth) {
        ++started;
      } else {
        if (task >= end && !waits && column >= width) {
          // To the next slice.
          if (++slice == work.num_slices) break;
          const Slice& s = work.slices[slice];
          rank = s.rank, width = s.width;
          bits = rank <= 16 ? 1 : rank <= 32 ? 2 : 3;
          task = warp, end = tasks(rank), m = 0;
          sum[0] = sum[1] = sum[2] = sum[3] = 0;
          waits = true;
          column = (team_rank * kWarps + warp) * (128 >> bits);
          step = (128 >> bits) * kWarps << team_bits;
          factors[0] = factors[1] = s.scale;
          // What y holds is asked for before v is there.
          const int own = column + g * (16 >> bits);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool there = 2 * t + e < work.count;
            y[e] = static_cast<T*>(args.y) + work.rows[there ? 2 * t + e : 0] * args.y_stride + s.begin + own;
            columns[e] = there ? width - own : 0;
          }
          hold();
        }
        if (task < end) {
          copy_wait<kPlainDepth - 1>();
          __syncwarp();
          multiply(sum);
          if (++m == length) {
            store_part(task, sum, 8 << bits);
            sum[0] = sum[1] = sum[2] = sum[3] = 0;
            m = 0, task += kWarps;
          }
        } else {
          if (waits) {
            waits = false;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
            if (kArch == Arch::kSm90 && team_bits > 0 && !met)
              asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            met = true;
#endif
            const float* const all = exchange(rank, 3 + bits, slice);
            const float up = bits == 1   ? load_v<4>(all, rank, high, low)
                             : bits == 2 ? load_v<2>(all, rank, high, low)
                                         : load_v<1>(all, rank, high, low);
            if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
              for (int e = 0; e < 2; ++e) factors[e] *= __shfl_sync(0xffffffffu, up, 8 * t + 4 * e);
            }
          }
          if (column >= width) continue;
          copy_wait<kPlainDepth - 1>();
          __syncwarp();
          if (bits == 1) {
            expand<4>(rank, high, low, y, columns, held, factors);
          } else if (bits == 2) {
            expand<2>(rank, high, low, y, columns, held, factors);
          } else {
            expand<1>(rank, high, low, y, columns, held, factors);
          }
          column += step;
#pragma unroll
          for (int e = 0; e < 2; ++e) y[e] += step, columns[e] -= step;
          hold();
        }
        __syncwarp();  // all lanes have read
        read_at += kPlainUnitBytes;
        if (read_at == ring + kPlainDepth * kPlainUnitBytes) read_at = ring;
      }
      start();
    }
    copy_wait<0>();
  }
};

}  // namespace punica::cuda::fused_lora
