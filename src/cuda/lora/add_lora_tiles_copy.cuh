// The warps of add_lora_tiles.cu that copy: of x and y, of A and B, into the rings of their teams.
#pragma once

#include "src/cuda/lora/add_lora_tiles.cuh"

namespace punica::cuda::fused_lora::tiles {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Without a count of bytes, which takes instructions.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

template <class T, class S>
struct Producer {
  const Block& b;
  Ring<S> ring = {b.ring, b.barriers};

  // All of the stage has been asked for. `stored`: some of it has been written by this thread.
  __device__ __forceinline__ void end_stage(bool stored) {
    if (stored) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      hopper::barrier_arrive(ring.full());
    } else {
      hopper::barrier_arrive_copies(ring.full());
    }
    ring.advance();
  }

  // A unit of A or B, of which `rows` rows and `columns` elements of each are there, perhaps none; zeros
  // elsewhere.
  // Whether it had to be read and written, for want of alignment.
  template <class PlaceOf>
  __device__ __forceinline__ bool copy_weights(uint32_t to, const T* from, int64_t stride, int row_bits, int rows,
                                               int columns, PlaceOf place_of) {
    const int row = b.lane >> row_bits, piece = b.lane & ((1 << row_bits) - 1), step = 32 >> row_bits;
    const int count = min(max(columns - 8 * piece, 0), 8);
    const bool aligned = ((reinterpret_cast<uintptr_t>(from) | 2 * stride) & 15) == 0;
    from += row * stride + 8 * piece;
    if (aligned && rows >= 4 * step && columns >= 8 << row_bits) {
      // All of it is there, as it mostly is.
      const int64_t more = 2 * step * stride;
      const char* at = reinterpret_cast<const char*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i, at += more) copy_16(to + 16 * place_of(i * step + row, piece), at);
      return false;
    }
    rows -= row;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = i * step < rows && count > 0;
        copy_async_16(to + 16 * place_of(i * step + row, piece), valid ? from : b.args.x, valid ? 2 * count : 0);
        from += step * stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from), i * step < rows ? count : 0);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16 * place_of(i * step + row, piece)),
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
        from += step * stride;
      }
    }
    return !aligned;
  }

  // All rows of x or y, 64 columns: `from` is the lane's column of row 0, row_at what is behind it. Units without rows
  // are left out. `all`: the columns are there in all lanes.
  template <class PlaceOf>
  __device__ __forceinline__ void copy_rows(const T* from, const int64_t* row_at, int count, bool all, bool inside,
                                            bool zeros, PlaceOf place_of) {
    const int row = b.lane / 8, piece = b.lane % 8;
#pragma unroll
    for (int u = 0; u < kRows / 16; ++u) {
      if (16 * u >= count) break;
      const uint32_t to = ring.rows() + u * kUnitBytes;
      // All addresses before all copies: these wait for what is read before them.
      const char* at[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) at[i] = reinterpret_cast<const char*>(from) + row_at[row + 4 * (4 * u + i)];
      if (all) {
#pragma unroll
        for (int i = 0; i < 4; ++i) copy_16(to + 16 * place_of(row + 4 * i, piece), at[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t to_row = to + 16 * place_of(row + 4 * i, piece);
          if (inside) {
            copy_16(to_row, at[i]);
          } else if (zeros) {
            copy_async_16(to_row, b.args.x, 0);
          }
        }
      }
    }
  }

  // The warp that looks for the tile after this one does so while the sums of this one are computed.
  template <class FindNext>
  __device__ __forceinline__ void copy_job(const Job& job, FindNext find_next) {
    const Args& args = b.args;
    const Work<kRows>& work = job.work;
    const int h_in = args.h_in, piece = b.lane % 8;
    if (work.count == 0) find_next();
#pragma unroll 1
    for (int p = 0; p < (work.count == 0 ? 0 : job.num_passes); ++p) {
      const Pass& pass = job.passes[p];
#pragma unroll 1
      for (int i = 0; i < S::kTeamChains; ++i) {
        const int chain = (b.rank * kTeams + b.team) * S::kTeamChains + i;
        // Leaf after leaf.
#pragma unroll 1
        for (int leaf = chain, n = chain; leaf < kLeaves && n * kPiece < h_in;) {
          const int k = n * kPiece;
          n += kLeaves;
          if (n * kPiece >= h_in) leaf += kChains, n = leaf;
          const T* const x = static_cast<const T*>(args.x) + k + 8 * piece;
          ring.wait_empty();
          copy_rows(x, job.x_at, work.count, k + kPiece <= h_in, k + 8 * piece < h_in, true,
                    [](int row, int piece) { return place<3>(row, piece); });
          bool stored = false;
#pragma unroll 1
          for (int j = 0; j < pass.tiles; ++j) {
            const Slice& s = work.slices[pass.slice_of[j]];
            const int first = pass.rank_of[j];
            stored |= copy_weights(ring.weights() + j * kUnitBytes,
                                   static_cast<const T*>(s.a) + int64_t{first} * h_in + k, h_in, 3, s.rank - first,
                                   h_in - k, [](int row, int piece) { return place<3>(row, piece); });
          }
          end_stage(stored);
        }
      }
      if (p == 0) find_next();
#pragma unroll 1
      for (int i = pass.begin; i < pass.end; ++i) {
        const Slice& s = work.slices[i];
        const int bits = s.rank <= 16 ? 1 : s.rank <= 32 ? 2 : 3, unit_rows = 128 >> bits;
#pragma unroll 1
        for (int c = (b.rank * kTeams + b.team) * kStrip; c < s.width; c += S::kBlocks * kTeams * kStrip) {
          ring.wait_empty();
          bool stored = false;
#pragma unroll 1
          for (int row = 0; row < kStrip; row += unit_rows) {
            stored |=
                copy_weights(ring.weights() + (row << bits) * 16, static_cast<const T*>(s.b) + (c + row) * s.b_stride,
                             s.b_stride, bits, s.width - c - row, s.rank, [bits](int row, int piece) {
                               return (row << bits | piece) ^ (bits == 1 ? (row >> 3 & 3) << 1 : (row >> 3 & 1) << 2);
                             });
          }
          const T* const y = static_cast<const T*>(args.y) + s.begin + c + 8 * piece;
          copy_rows(y, job.y_at, work.count, c + kStrip <= s.width, c + 8 * piece < s.width, false,
                    [](int row, int piece) { return place_y(row, piece); });
          end_stage(stored);
        }
      }
    }
  }

  template <int kT>
  __device__ __forceinline__ void run() {
    int n = 0;
#pragma unroll 1
    for (uint32_t tile = b.tile; tile < b.tiles; tile += b.step, ++n) {
      if (n > 0) wait_job(b.shared, n);
      const auto find_next = [&] {
        if (threadIdx.x / 32 != kWarps || tile + b.step >= b.tiles) return;
        // The place of the tile before.
        if (n > 0) hopper::barrier_wait(shared_address(&b.shared.done[(n + 1) & 1]), (n - 1) >> 1 & 1);
        find_job<T, kT>(b.args, tile + b.step, &b.shared.jobs[(n + 1) & 1]);
        hopper::barrier_arrive(shared_address(&b.shared.ready[(n + 1) & 1]));
      };
      copy_job(b.shared.jobs[n & 1], find_next);
      end_job(b.shared, n);
    }
    copy_wait<0>();
  }
};

#endif

}  // namespace punica::cuda::fused_lora::tiles
