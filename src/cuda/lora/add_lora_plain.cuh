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
  const char* from;
  int64_t row_step;  // bytes from a unit's rows to those that the lane copies next, and to the next unit
  int64_t unit_step;
  int left, rows, rows_step, rows_of_unit, columns;
  int bytes;
  uint32_t to, turn;
  bool of_a;
  int k;  // of the lane's piece
  int fill_slice = 0, fill_task, fill_slot = 0;

  __device__ __forceinline__ int length() const {
    return ((args.h_in + kPiece - 1) / kPiece + kChains - 1) >> kChainBits;
  }
  __device__ __forceinline__ int chain_bits() const { return kChainBits - team_bits; }
  __device__ __forceinline__ int tasks(int rank) const { return (rank + 15) / 16 << chain_bits(); }
  __device__ __forceinline__ int chain_of(int task) const {
    return (team_rank << chain_bits()) + (task & ((1 << chain_bits()) - 1));
  }

  __device__ __forceinline__ void next_stream() {
    left = 0;
    while (left == 0 && fill_slice < work.num_slices) {
      const Slice& s = work.slices[fill_slice];
      if (fill_task < tasks(s.rank)) {
        const int row = (fill_task >> chain_bits()) * 16 + lane / 8, piece = lane % 8;
        of_a = true;
        k = chain_of(fill_task) * kPiece + 8 * piece;
        from = reinterpret_cast<const char*>(static_cast<const T*>(s.a) + int64_t{row} * args.h_in + k);
        row_step = int64_t{8} * args.h_in;
        unit_step = 2 * kPiece * kChains;
        rows = s.rank - row, rows_step = 4, rows_of_unit = 0;
        bytes = 16;
        to = 16 * place<3>(lane / 8, piece), turn = 0;
        left = length();
        fill_task += kWarps;
      } else {
        const int bits = s.rank <= 16 ? 1 : s.rank <= 32 ? 2 : 3;
        const int row = lane >> bits, piece = lane & ((1 << bits) - 1);
        const int outputs = 128 >> bits, first = (team_rank * kWarps + warp) * outputs;
        of_a = false;
        k = 0;
        from = reinterpret_cast<const char*>(static_cast<const T*>(s.b) + (first + row) * s.b_stride + 8 * piece);
        rows_step = 32 >> bits;
        rows_of_unit = outputs * kWarps << team_bits;
        row_step = 2 * s.b_stride * rows_step;
        unit_step = 2 * s.b_stride * rows_of_unit;
        rows = s.width - first - row;
        bytes = 2 * min(max(s.rank - 8 * piece, 0), 8);
        // place() of the rows that the lane copies one after the other goes on by 512 bytes; with two pieces a row the
        // swizzle of every other one is turned too.
        to = 16 * (bits == 3 ? place<3>(row, piece) : bits == 2 ? place<2>(row, piece) : place<1>(row, piece));
        turn = bits == 1 ? 64 : 0;
        left = first < s.width ? (s.width - first + rows_of_unit - 1) / rows_of_unit : 0;
        fill_task = warp;
        ++fill_slice;
      }
    }
  }

  __device__ __forceinline__ void copy_x(uint32_t slot_at, int k_at) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 8 + 4 * i;
      const bool valid = row < work.count && k_at < args.h_in;
      const T* const x = static_cast<const T*>(args.x) + work.rows[valid ? row : 0] * args.x_stride + k_at;
      copy_16(slot_at + kUnitBytes + 16 * place<3>(row, lane % 8), x, valid ? 16 : 0);
    }
  }

  // The next unit without its x; then on to the one after it.
  __device__ __forceinline__ uint32_t start_weights() {
    const uint32_t slot_at = ring + fill_slot * kPlainUnitBytes;
    const bool inside = k < args.h_in;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_16(slot_at + 512 * i + (i % 2 == 0 ? to : to ^ turn), from + i * row_step,
              inside && rows > i * rows_step ? bytes : 0);
    }
    from += unit_step;
    rows -= rows_of_unit;
    --left;
    return slot_at;
  }

  __device__ __forceinline__ void start() {
    if (left == 0) next_stream();
    if (left > 0) {
      const uint32_t slot_at = start_weights();
      if (of_a) {
        copy_x(slot_at, k);
        k += kPiece * kChains;
      }
    }
    copy_commit();
    fill_slot = (fill_slot + 1) % kPlainDepth;
  }

  // The first units, those of the first slice before the wait.
  __device__ __forceinline__ void start_first(bool early_reads) {
    fill_task = warp;
    left = 0;
    int started = 0;
#pragma unroll 1
    for (; started < kPlainDepth; ++started) {
      if (left == 0) next_stream();
      if (left == 0 || (of_a && fill_slice > 0)) break;
      start_weights();
      if (of_a) k += kPiece * kChains;
      fill_slot = (fill_slot + 1) % kPlainDepth;
    }
    if (early_reads) grid_dependency_wait<kArch>();
    const int end = tasks(work.slices[0].rank), length = this->length();
    int task = warp, m = 0;
#pragma unroll 1
    for (int i = 0; i < started; ++i) {
      if (task < end) {
        copy_x(ring + i * kPlainUnitBytes, (m * kChains + chain_of(task)) * kPiece + lane % 8 * 8);
        if (++m == length) m = 0, task += kWarps;
      }
      copy_commit();
    }
#pragma unroll 1
    for (int i = started; i < kPlainDepth; ++i) start();
  }

  // ---- A slice -----------------------------------------------------------------------------------------------------

  int slot = 0;

  __device__ __forceinline__ uint32_t arrived() const {
    copy_wait<kPlainDepth - 1>();
    __syncwarp();
    return ring + slot * kPlainUnitBytes;
  }
  __device__ __forceinline__ void release() {
    __syncwarp();  // all lanes have read
    slot = (slot + 1) % kPlainDepth;
    start();
  }

  template <int kWidth>
  __device__ __forceinline__ void shrink(int rank) {
    const int g = lane / 4, t = lane % 4, end = tasks(rank), length = this->length();
#pragma unroll 1
    for (int task = warp; task < end; task += kWarps) {
      float sum[4] = {};
#pragma unroll 1
      for (int m = 0; m < length; ++m) {
        const uint32_t at = arrived();
        uint4 upper[2], lower[2], x[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          upper[c] = load_shared_16(at + 16 * place<3>(g, 4 * c + t));
          lower[c] = load_shared_16(at + 1024 + 16 * place<3>(g, 4 * c + t));
          x[c] = load_shared_16(at + kUnitBytes + 16 * place<3>(g, 4 * c + t));
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          mma_m16n8k16<T>(sum, {upper[c].x, lower[c].x, upper[c].y, lower[c].y}, {x[c].x, x[c].y});
          mma_m16n8k16<T>(sum, {upper[c].z, lower[c].z, upper[c].w, lower[c].w}, {x[c].z, x[c].w});
        }
        release();
      }
      constexpr int kPitch = kWidth + 4;
      float* const part =
          parts + ((task & ((1 << chain_bits()) - 1)) * kTileRows + 2 * t) * kPitch + (task >> chain_bits()) * 16 + g;
      part[0] = sum[0], part[8] = sum[2];
      part[kPitch] = sum[1], part[kPitch + 8] = sum[3];
    }
  }

  // The block's part of v[row][rank].
  template <int kWidth>
  __device__ __forceinline__ float block_part(int row, int rank) const {
    constexpr int kStride = kTileRows * (kWidth + 4);
    const float* const of_chain = parts + row * (kWidth + 4) + rank;
    const auto two = [&](int i) { return of_chain[i * kStride] + of_chain[(i + 1) * kStride]; };
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
  template <int kWidth>
  __device__ __forceinline__ const float* exchange(int rank, int number) {
    constexpr int kBits = kWidth == 16 ? 4 : kWidth == 32 ? 5 : 6;
    const int values = work.count << kBits;  // of a block
    float* const buffer = receive + (number & 1) * receive_floats;
    __syncthreads();  // all parts are there
    if (kArch == Arch::kSm80 || team_bits == 0) {
      for (int i = threadIdx.x; i < values; i += 32 * kWarps) {
        buffer[i] = block_part<kWidth>(i >> kBits, i & (kWidth - 1));
      }
      __syncthreads();
      return buffer;
    }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (number == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    const uint32_t barrier = shared_address(received + (number & 1));
    if (threadIdx.x == 0) hopper::barrier_expect(barrier, 4 * work.count * rank << team_bits);
    uint32_t cluster_rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(cluster_rank));
    const uint32_t first_block = cluster_rank & ~((1u << team_bits) - 1);
    // A thread sends to one block at a time: neighbouring threads the same value to all of them.
    const uint32_t peer = first_block + (threadIdx.x & ((1u << team_bits) - 1));
    const uint32_t to = shared_address(buffer + team_rank * kTileRows * kWidth);
#pragma unroll 1
    for (int i = threadIdx.x >> team_bits; i < values; i += 32 * kWarps >> team_bits) {
      const int row = i >> kBits, r = i & (kWidth - 1);
      if (r < rank) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                         hopper::remote_address(to + 4 * i, peer)),
                     "f"(block_part<kWidth>(row, r)), "r"(hopper::remote_address(barrier, peer))
                     : "memory");
      }
    }
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(number >> 1 & 1)
          : "memory");
    } while (done == 0);
#endif
    return buffer;
  }

  // kTiles tiles of 16 outputs are a unit of B: 4, 2, 1 for ranks up to 16, 32, 64.
  template <int kTiles>
  __device__ __forceinline__ void run_slice(const Slice& s, int number) {
    constexpr int kWidth = 64 / kTiles, kCount = 2 * kTiles;
    constexpr int kOutputs = 16 * kTiles;
    constexpr int kFours = kTiles == 4 ? 1 : kWidth / 16;  // of ranks, of a lane
    const int g = lane / 4, t = lane % 4, count = work.count, rank = s.rank;
    const int first = (team_rank * kWarps + warp) * kOutputs, step = kOutputs * kWarps << team_bits;
    // What y holds is asked for before v is there. The lane's outputs: kCount neighbours of rows 2t and 2t + 1.
    T* y[2];
    int columns[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = 2 * t + e < count;
      y[e] = static_cast<T*>(args.y) + work.rows[there ? 2 * t + e : 0] * args.y_stride + s.begin + first + g * kCount;
      columns[e] = there ? s.width - first - g * kCount : 0;
    }
    bgmv::Words<kTiles> held[2];
    const auto load_y = [&] {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (columns[e] > 0) held[e] = *reinterpret_cast<const bgmv::Words<kTiles>*>(y[e]);
      }
    };
    load_y();

    shrink<kWidth>(rank);
    const float* const all = exchange<kWidth>(rank, number) + g * kWidth;

    uint32_t high[2 * kFours], low[2 * kFours];
    float factors[2] = {s.scale, s.scale};
    {
      float v[4 * kFours];
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
#pragma unroll
        for (int e = 0; e < 2; ++e) factors[e] *= __shfl_sync(0xffffffffu, up_scale(exponent), 8 * t + 4 * e);
      }
#pragma unroll
      for (int i = 0; i < 2 * kFours; ++i) {
        uint16_t h[2], l[2];
        split<T>(v[2 * i], &h[0], &l[0]);
        split<T>(v[2 * i + 1], &h[1], &l[1]);
        high[i] = h[0] | uint32_t{h[1]} << 16;
        low[i] = l[0] | uint32_t{l[1]} << 16;
      }
    }

#pragma unroll 1
    for (int column = first; column < s.width; column += step) {
      const uint32_t at = arrived();
      float sums[kTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if constexpr (kTiles == 4) {
          uint2 b[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(b[h].x), "=r"(b[h].y)
                         : "r"(at + 16 * place<1>(8 * g + 2 * i + h, t / 2) + t % 2 * 8)
                         : "memory");
          }
          mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {high[0], high[1]});
          mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {low[0], low[1]});
        } else {
          constexpr int kRowBits = kTiles == 2 ? 2 : 3;
          const int row = kCount * g + 2 * i;
#pragma unroll
          for (int c = 0; c < kFours / 2; ++c) {
            if (32 * c >= rank) break;
            const uint4 b0 = load_shared_16(at + 16 * place<kRowBits>(row, 4 * c + t));
            const uint4 b1 = load_shared_16(at + 16 * place<kRowBits>(row + 1, 4 * c + t));
            mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {high[4 * c], high[4 * c + 1]});
            mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {low[4 * c], low[4 * c + 1]});
            mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {high[4 * c + 2], high[4 * c + 3]});
            mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {low[4 * c + 2], low[4 * c + 3]});
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e < count && columns[e] > 0) {
          Vec<T, kCount> after;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const uint16_t bits = static_cast<uint16_t>(held[e].values[i / 2] >> (16 * (i % 2)));
            after.values[i] = from_float<T>(
                fmaf(factors[e], sums[i / 2][2 * (i % 2) + e], to_float(*reinterpret_cast<const T*>(&bits))));
          }
          store<T, kCount>(y[e], after);
        }
        y[e] += step;
        columns[e] -= step;
      }
      load_y();
      release();
    }
  }

  __device__ __forceinline__ void run() {
    start_first(args.early_reads);
#pragma unroll 1
    for (int i = 0; i < work.num_slices; ++i) {
      const Slice& s = work.slices[i];
      if (s.rank <= 16) {
        run_slice<4>(s, i);
      } else if (s.rank <= 32) {
        run_slice<2>(s, i);
      } else {
        run_slice<1>(s, i);
      }
    }
    copy_wait<0>();
  }
};

}  // namespace punica::cuda::fused_lora
