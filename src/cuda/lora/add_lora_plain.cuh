// The way through add_lora_ring.cuh where nothing is in the way: everything aligned to 16 bytes, ranks up to 64. The
// same sums with as few instructions as possible, for these are what a small batch takes its time for: a multiprocessor
// has few warps at work, and each instruction of a warp waits for the one before it.
//
// A pass serves the next slices of the tile that have up to four tiles of 16 ranks together. Each warp has one of these
// and a share of the leaves of K, so that it ends with one piece of v (a fragment, as the products leave it: lane (g, t)
// has two ranks of rows 2t and 2t + 1). Fragments are added as they are, by lanes: within a warp, over the warps of a
// block through shared memory, over the blocks of the team in the shared memory of each of them. Only the sum is turned
// round, by movmatrix, to be the second operand of the expand's products; which ranks a lane has is chosen so that this
// fits.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"
#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kPlainWarps = 8;
inline constexpr int kPlainDepth = 4;
inline constexpr int kPlainTiles = 4;  // of a pass
inline constexpr int kFragment = 512;  // bytes

__host__ __device__ constexpr int rank_tile_bits(int rank) { return rank <= 16 ? 0 : rank <= 32 ? 1 : 2; }

// Whether a tile may take more than one pass. Then what blocks send each other has two buffers of the largest size.
__host__ __device__ constexpr bool plain_many(int num_slices, int max_rank) {
  return num_slices << rank_tile_bits(max_rank) > kPlainTiles;
}

// Bytes of shared memory for fragments: received ones, [block of the team][tile of the pass], and behind them those of
// the warps.
constexpr int plain_fragment_bytes(int num_slices, int max_rank, int min_team_bits, int max_team_bits) {
  if (plain_many(num_slices, max_rank)) return (2 * kPlainTiles << max_team_bits) * kFragment + 16 * kFragment;
  int most = 0;
  for (int team_bits = min_team_bits; team_bits <= max_team_bits; ++team_bits) {
    for (int tile_bits = 0; tile_bits <= 2; ++tile_bits) {
      const int groups = 4 - team_bits - (3 - tile_bits);
      const int own = tile_bits == 2 ? 4 : groups == -1 ? 16 : 8;
      const int bytes = ((1 << (tile_bits + team_bits)) + own) * kFragment;
      most = bytes > most ? bytes : most;
    }
  }
  return most;
}

__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ float4 load_fragment(uint32_t from, bool there) {
  float4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
      : "r"(from), "r"(static_cast<int>(there))
      : "memory");
  return v;
}
__device__ __forceinline__ void store_fragment(uint32_t to, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// A matrix of 8 x 8 16-bit numbers, the other way round.
__device__ __forceinline__ uint32_t turn_round(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// split() of two numbers into packed pairs, of which the first is in the low half.
template <class T>
__device__ __forceinline__ void split_two(float v0, float v1, uint32_t* high, uint32_t* low) {
  // Where a number is beyond the range or not finite: one by one.
  constexpr uint32_t kLimit = std::is_same_v<T, __half> ? 0x477fe000u : 0x7f7f0000u;
  if (max(__float_as_uint(v0) & 0x7fffffffu, __float_as_uint(v1) & 0x7fffffffu) >= kLimit) {
    uint16_t h[2], l[2];
    split<T>(v0, &h[0], &l[0]);
    split<T>(v1, &h[1], &l[1]);
    *high = h[0] | uint32_t{h[1]} << 16;
    *low = l[0] | uint32_t{l[1]} << 16;
    return;
  }
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*high) : "f"(v1), "f"(v0));
    const float r0 = v0 - __uint_as_float(*high << 16), r1 = v1 - __uint_as_float(*high & 0xffff0000u);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*low) : "f"(r1), "f"(r0));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*high) : "f"(v1), "f"(v0));
    const float2 back = __half22float2(*reinterpret_cast<const __half2*>(high));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*low) : "f"(v1 - back.y), "f"(v0 - back.x));
  }
}

template <Arch kArch, class T>
struct PlainBlock {
  const Args& args;
  const Work<kTileRows>& work;
  uint64_t* received;
  uint32_t fragments;  // shared memory: see plain_fragment_bytes()
  uint32_t ring;       // of the warp
  int cluster_bits, team_bits, team_rank;
  int warp, lane;

  // ---- The pass ----------------------------------------------------------------------------------------------------

  int begin_slice = 0, end_slice = 0;
  uint32_t slice_of, tile_of;  // a byte for each tile: its slice, its number in that
  int tiles, tile_bits;

  __device__ __forceinline__ void plan() {
    slice_of = tile_of = 0;
    tiles = 0;
    for (end_slice = begin_slice; end_slice < work.num_slices; ++end_slice) {
      const int more = 1 << rank_tile_bits(work.slices[end_slice].rank);
      if (tiles + more > kPlainTiles) break;
      const uint32_t mask = 0xffffffffu >> (32 - 8 * more);
      slice_of |= (static_cast<uint32_t>(end_slice) * 0x01010101u & mask) << (8 * tiles);
      tile_of |= (0x03020100u & mask) << (8 * tiles);
      tiles += more;
    }
    tile_bits = tiles <= 1 ? 0 : tiles == 2 ? 1 : 2;
  }

  // Of the warp: its tile of ranks, its share of the leaves of K. Leaves of the block are numbered group by group.
  __device__ __forceinline__ int share_bits() const { return 3 - tile_bits; }  // log2 of the warps that share a tile
  __device__ __forceinline__ int tile() const { return warp >> share_bits(); }
  __device__ __forceinline__ int share() const { return warp & ((1 << share_bits()) - 1); }
  __device__ __forceinline__ int group_bits() const { return 4 - team_bits - share_bits(); }  // groups of the warp
  // log2 of the units of a leaf; those behind the end of K are zeros.
  __device__ __forceinline__ int leaf_bits() const {
    return args.h_in <= 64 * kPiece ? 0 : 32 - __clz((args.h_in - 1) / (64 * kPiece));
  }
  __device__ __forceinline__ int leaf_of(int unit) const { return (share() << (2 + group_bits())) + (unit >> leaf_bits()); }
  __device__ __forceinline__ int k_of(int unit) const {
    const int first_group = team_rank << (4 - team_bits), leaf = leaf_of(unit);
    return ((first_group + (leaf >> 2)) + ((leaf & 3) << 4) + ((unit & ((1 << leaf_bits()) - 1)) << 6)) * kPiece;
  }
  __device__ __forceinline__ const Slice& slice_of_tile(int i) const {
    return work.slices[slice_of >> (8 * i) & 255];
  }
  // The rank of the first row of the tile, and from pair to pair of rows. Row g has rank first + (g / 2) * step + g % 2,
  // row g + 8 the one two behind it.
  __device__ __forceinline__ static int first_rank(int rank, int i) { return rank <= 16 ? 0 : 32 * (i >> 1) + 4 * (i & 1); }
  __device__ __forceinline__ static int rank_step(int rank) { return rank <= 16 ? 4 : 8; }

  // Units of B of a slice are dealt out to the warps of the team, going on where those of the slice before ended.
  struct Deal {
    int next_warp = 0;
    int first, count, bits;  // first: output
    __device__ __forceinline__ void next(const PlainBlock& b, const Slice& s) {
      const int warp_bits = 3 + b.team_bits, warps = 1 << warp_bits;
      bits = rank_tile_bits(s.rank);
      const int units = (s.width + (64 >> bits) - 1) >> (6 - bits);
      const int mine = (b.team_rank * kPlainWarps + b.warp - next_warp) & (warps - 1);
      next_warp = (next_warp + units) & (warps - 1);
      first = mine << (6 - bits);
      count = (units - mine + warps - 1) >> warp_bits;
    }
  };

  // ---- What the warp copies ----------------------------------------------------------------------------------------

  // Four pieces of 16 bytes a lane and unit, off1, off2 and both behind the first one; there if `rest` is more than d1,
  // d2 and both.
  const char* from;
  uint32_t off1, off2, unit_step, to, turn;
  int d1, d2, rest, unit_rows, bytes;
  int units_a, left, fill_slice;
  Deal fill_deal;

  __device__ __forceinline__ void begin_copies() {
    left = 0;
    fill_slice = begin_slice;
    fill_deal.next_warp = 0;
    units_a = tile() < tiles ? 1 << (leaf_bits() + 2 + group_bits()) : 0;
    const int of = tile() < tiles ? tile() : 0;
    const Slice& s = slice_of_tile(of);
    const int row = lane >> 3, step = rank_step(s.rank);
    const int rank = first_rank(s.rank, tile_of >> (8 * of) & 255) + (row >> 1) * step + (row & 1);
    from = reinterpret_cast<const char*>(s.a) + 2 * (int64_t{rank} * args.h_in + 8 * (lane & 7));
    d1 = 2 * step, d2 = 2;
    off1 = 4 * step * args.h_in, off2 = 4 * args.h_in;
    rest = s.rank - rank;
    to = 16 * place<3>(row, lane & 7), turn = 0;
    bytes = 16;
    unit_step = 0;
    unit_rows = 0;
  }

  // Unit n, to the place of unit n - kPlainDepth.
  __device__ __forceinline__ void start(int n) {
    const char* source = from;
    int there = 0;
    bool works = true;
    if (n < units_a) {
      const int k = k_of(n);
      source += 2 * k;
      there = k + 8 * (lane & 7) < args.h_in ? rest : 0;
    } else {
      while (left <= 0 && fill_slice < end_slice) {
        const Slice& s = work.slices[fill_slice++];
        fill_deal.next(*this, s);
        left = fill_deal.count;
        const int bits = 1 + fill_deal.bits, row = lane >> bits, piece = lane & ((1 << bits) - 1);
        const uint32_t row_bytes = 2 * static_cast<uint32_t>(s.b_stride);
        from = reinterpret_cast<const char*>(s.b) + (fill_deal.first + row) * row_bytes + 16 * piece;
        source = from;
        d1 = 32 >> bits, d2 = 64 >> bits;
        off1 = row_bytes * d1, off2 = row_bytes * d2;
        unit_rows = 128 >> bits << (3 + team_bits);
        unit_step = row_bytes * unit_rows;
        rest = s.width - fill_deal.first - row;
        bytes = 2 * min(max(s.rank - 8 * piece, 0), 8);
        // place() of the rows that the lane copies one after the other goes on by 512 bytes; with two pieces a row the
        // swizzle of every other one is turned too.
        to = 16 * (bits == 3 ? place<3>(row, piece) : bits == 2 ? place<2>(row, piece) : place<1>(row, piece));
        turn = bits == 1 ? 64 : 0;
      }
      works = left > 0;
      --left;
      there = rest;
      rest -= unit_rows;
      from += unit_step;
    }
    if (works) {
      const uint32_t at = place_of(n);
      copy_16(at + to, source, there > 0 ? bytes : 0);
      copy_16(at + 512 + (to ^ turn), source + off1, there > d1 ? bytes : 0);
      copy_16(at + 1024 + to, source + off2, there > d2 ? bytes : 0);
      copy_16(at + 1536 + (to ^ turn), source + (off1 + off2), there > d1 + d2 ? bytes : 0);
    }
    copy_commit();
  }

  __device__ __forceinline__ uint32_t place_of(int n) const { return ring + (n & (kPlainDepth - 1)) * kUnitBytes; }
  __device__ __forceinline__ uint32_t arrived(int n) const {
    copy_wait<kPlainDepth - 1>();
    __syncwarp();
    return place_of(n);
  }
  __device__ __forceinline__ void release() const { __syncwarp(); }  // all lanes have read

  // ---- v -----------------------------------------------------------------------------------------------------------

  int count, number = 0;  // rows; passes before

  __device__ __forceinline__ bool has_rows() const { return 2 * (lane % 4) < count; }
  __device__ __forceinline__ uint32_t receive() const {
    return fragments + (plain_many(args.num_slices, args.max_rank)
                            ? (number & 1) * (kPlainTiles * kFragment << cluster_bits)
                            : 0);
  }
  __device__ __forceinline__ uint32_t own_fragments() const {
    return fragments + (plain_many(args.num_slices, args.max_rank) ? 2 * kPlainTiles * kFragment << cluster_bits
                                                                   : kFragment << (tile_bits + team_bits));
  }

  // The warp's fragment from its units of A, unless it goes to shared memory because it is no sum of whole groups.
  // `begin` is called when the first units are on their way.
  template <class Begin>
  __device__ __forceinline__ bool shrink(Begin begin) {
    const int g = lane / 4, t = lane % 4;
    const int group_bits = this->group_bits(), last_piece = (1 << leaf_bits()) - 1;
    const T* x = nullptr;
    int x_rest = 0;  // of the row, from the lane's first element on
    bgmv::Words<4> x0[2] = {}, x1[2] = {};
    const auto load_x = [&](int n, bgmv::Words<4>(&to)[2]) {
      const int k = k_of(n);
#pragma unroll
      for (int c = 0; c < 2; ++c) to[c] = bgmv::load_if(k + 32 * c < x_rest, x + k + 32 * c);
    };
    const uint32_t own = own_fragments() + 16 * lane;
    const int step = group_bits == -1 ? 2 : 1;
    uint32_t to = own + (tile_bits == 2 ? tile() : step * warp) * kFragment;
    float sum[4] = {};
    float4 run = {}, level0 = {}, level1 = {}, level2 = {};
#pragma unroll 1
    for (int n = -kPlainDepth;; ++n) {
      if (n >= 0) {
        if (n == 0) {
          if (!begin()) return false;
          x = static_cast<const T*>(args.x) + work.rows[g < count ? g : 0] * args.x_stride + 8 * t;
          x_rest = g < count ? args.h_in - 8 * t : 0;
          if (units_a > 0) load_x(0, x0);
          if (units_a > 1) load_x(1, x1);
        }
        if (n >= units_a) break;
        const uint32_t at = arrived(n);
        uint4 upper[2], lower[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          upper[c] = load_shared_16(at + 16 * place<3>(g, 4 * c + t));
          lower[c] = load_shared_16(at + 1024 + 16 * place<3>(g, 4 * c + t));
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          mma_m16n8k16<T>(sum, {upper[c].x, lower[c].x, upper[c].y, lower[c].y}, {x0[c].values[0], x0[c].values[1]});
          mma_m16n8k16<T>(sum, {upper[c].z, lower[c].z, upper[c].w, lower[c].w}, {x0[c].values[2], x0[c].values[3]});
        }
        release();
#pragma unroll
        for (int c = 0; c < 2; ++c) x0[c] = x1[c];
        if (n + 2 < units_a) load_x(n + 2, x1);
        if ((n & last_piece) == last_piece) {
          const int leaf = leaf_of(n);
          const float4 leaf_sum = {sum[0], sum[1], sum[2], sum[3]};
          const int in_group = leaf & 3;
          if (group_bits == -1 && in_group == 3) {
            // The other half of the group comes first: the two leaves go to shared memory one by one.
            if (has_rows()) store_fragment(to + kFragment, leaf_sum);
          } else if (group_bits == -2 || in_group == 0 || (group_bits == -1 && in_group == 2)) {
            run = leaf_sum;
          } else {
            run = run + leaf_sum;
          }
          if (group_bits > 0 && in_group == 3) {
            // A balanced tree of the warp's groups.
            const int group = leaf >> 2;
            if ((group & 1) == 0) {
              level0 = run;
            } else {
              run = level0 + run;
              if (kArch == Arch::kSm80 && group_bits > 1) {
                if ((group & 2) == 0) {
                  level1 = run;
                } else {
                  run = level1 + run;
                  if (group_bits > 2) {
                    if ((group & 4) == 0) {
                      level2 = run;
                    } else {
                      run = level2 + run;
                    }
                  }
                }
              }
            }
          }
          sum[0] = sum[1] = sum[2] = sum[3] = 0;
        }
      }
      start(n + kPlainDepth);
    }
    exchange(run, to, own);
    return true;
  }

  // Sends the block's part of v to the team; all parts are in receive() after wait_received(). A block sends for the n-th time when it has
  // received for the (n - 1)-th, and so when all others have read what they received before that: two buffers are
  // enough.
  __device__ __forceinline__ void exchange(float4 sum, uint32_t to, uint32_t own) {
    const int tile = this->tile(), share = this->share(), share_bits = this->share_bits();
    const int group_bits = this->group_bits();
    const bool there = has_rows();
    const bool used = tile < tiles;
    // With four tiles the first warp of each keeps its fragment.
    const bool keeps = tile_bits == 2 && share == 0;
    if (used && there && !keeps) store_fragment(to, sum);
    const uint32_t barrier = shared_address(received + (number & 1));
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (kArch == Arch::kSm90 && number == 0 && cluster_bits > 0) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
    if (kArch == Arch::kSm90 && team_bits > 0 && threadIdx.x == 0) {
      hopper::barrier_expect(barrier, 16 * 8 * ((count + 1) / 2) * tiles << team_bits);
    }
#endif
    __syncthreads();
    // Each of these sends to some blocks.
    const int sender_bits = tile_bits == 2 ? 0 : min(share_bits, team_bits);
    if (used && share < 1 << sender_bits) {
      const uint32_t first = own + (tile << share_bits) * kFragment;
      if (tile_bits == 2) {
        sum = sum + load_fragment(own + tile * kFragment, there);
      } else if (group_bits == -2) {
        float4 leaf[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) leaf[i] = load_fragment(first + i * kFragment, there);
        sum = (((leaf[0] + leaf[1]) + leaf[2]) + leaf[3]) + (((leaf[4] + leaf[5]) + leaf[6]) + leaf[7]);
      } else if (group_bits == -1) {
        const auto group = [&](int i) {
          const uint32_t at = own + ((tile << share_bits) * 2 + 4 * i) * kFragment;
          return (load_fragment(at, there) + load_fragment(at + 2 * kFragment, there)) +
                 load_fragment(at + 3 * kFragment, there);
        };
        sum = group(0) + group(1);
        if (share_bits == 3) sum = sum + (group(2) + group(3));
      } else {
        const auto two = [&](int i) {
          return load_fragment(first + i * kFragment, there) + load_fragment(first + (i + 1) * kFragment, there);
        };
        sum = two(0) + two(2);
        if (share_bits == 3) sum = sum + (two(4) + two(6));
      }
      const uint32_t place = receive() + ((team_rank << tile_bits) + tile) * kFragment + 16 * lane;
      if (kArch == Arch::kSm80 || team_bits == 0) {
        if (there) store_fragment(place, sum);
      } else {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        uint32_t cluster_rank;
        asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(cluster_rank));
        const uint32_t first_block = cluster_rank & ~((1u << team_bits) - 1);
#pragma unroll 1
        for (int peer = share; peer < 1 << team_bits; peer += 1 << sender_bits) {
          const uint32_t remote = hopper::remote_address(place, first_block + peer);
          const uint32_t remote_barrier = hopper::remote_address(barrier, first_block + peer);
          if (there) hopper::store_async(remote, sum, remote_barrier);
        }
#endif
      }
    }
  }

  __device__ __forceinline__ void wait_received() const {
    if (kArch == Arch::kSm80 || team_bits == 0) {
      __syncthreads();
      return;
    }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(received + (number & 1))), "r"(number >> 1 & 1)
          : "memory");
    } while (done == 0);
#endif
  }

  // v of a slice as operands: words 2q and 2q + 1 of tile q. first: of the tiles, in the pass.
  struct Operands {
    uint32_t high[2 * kPlainTiles], low[2 * kPlainTiles];
    float factors[2];
  };

  __device__ __forceinline__ void load_v(const Slice& s, int first, Operands& o) const {
    const int g = lane / 4, rank = s.rank, q_end = 1 << rank_tile_bits(rank);
    const bool there = has_rows();
    const uint32_t at = receive() + first * kFragment + 16 * lane;
    const int pair = (g >> 1) * rank_step(rank) + (g & 1);
    o.factors[0] = o.factors[1] = s.scale;
    float4 v[kPlainTiles];
#pragma unroll
    for (int q = 0; q < kPlainTiles; ++q) {
      if (q >= q_end) break;
      const auto part = [&](int i) { return load_fragment(at + ((i << tile_bits) + q) * kFragment, there); };
      v[q] = part(0);
      if (team_bits >= 1) v[q] = v[q] + part(1);
      if (team_bits >= 2) v[q] = v[q] + (part(2) + part(3));
      if (team_bits >= 3) v[q] = v[q] + ((part(4) + part(5)) + (part(6) + part(7)));
      // What stands behind A in the sums may be anything.
      const int r = first_rank(rank, q) + pair;
      if (r >= rank) v[q].x = v[q].y = 0;
      if (r + 2 >= rank) v[q].z = v[q].w = 0;
    }
    if constexpr (std::is_same_v<T, __half>) {
      float largest[2] = {};
      const auto size = [](float value) { return isfinite(value) ? fabsf(value) : 0.0f; };
#pragma unroll
      for (int q = 0; q < kPlainTiles; ++q) {
        if (q >= q_end) break;
        largest[0] = fmaxf(largest[0], fmaxf(size(v[q].x), size(v[q].z)));
        largest[1] = fmaxf(largest[1], fmaxf(size(v[q].y), size(v[q].w)));
      }
      float down[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          largest[e] = fmaxf(largest[e], __shfl_xor_sync(0xffffffffu, largest[e], step));
        }
        const int exponent = row_exponent(largest[e]);
        down[e] = down_scale(exponent);
        o.factors[e] *= up_scale(exponent);
      }
#pragma unroll
      for (int q = 0; q < kPlainTiles; ++q) {
        if (q >= q_end) break;
        v[q].x *= down[0], v[q].z *= down[0];
        v[q].y *= down[1], v[q].w *= down[1];
      }
    }
#pragma unroll
    for (int q = 0; q < kPlainTiles; ++q) {
      if (q >= q_end) break;
      uint32_t h[2], l[2];
      split_two<T>(v[q].x, v[q].y, &h[0], &l[0]);
      split_two<T>(v[q].z, v[q].w, &h[1], &l[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        o.high[2 * q + i] = turn_round(h[i]);
        o.low[2 * q + i] = turn_round(l[i]);
      }
    }
  }

  // ---- Expand ------------------------------------------------------------------------------------------------------

  // The slice whose units come next, its first tile in the pass, and the lane's outputs: 8 >> deal.bits neighbours of
  // rows 2t and 2t + 1 of the batch.
  struct Place {
    int slice, tile;
    Deal deal;
    T* y[2];
    int columns[2];
    uint32_t held[2][4];
  };

  __device__ __forceinline__ void load_y(Place& p) const {
    auto& [slice, tile, deal, y, columns, held] = p;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (columns[e] > 0) {
        if (deal.bits == 0) {
          const uint4 v = *reinterpret_cast<const uint4*>(y[e]);
          held[e][0] = v.x, held[e][1] = v.y, held[e][2] = v.z, held[e][3] = v.w;
        } else if (deal.bits == 1) {
          const uint2 v = *reinterpret_cast<const uint2*>(y[e]);
          held[e][0] = v.x, held[e][1] = v.y;
        } else {
          held[e][0] = *reinterpret_cast<const uint32_t*>(y[e]);
        }
      }
    }
  }

  __device__ __forceinline__ bool next_slice(Place& p) const {
    auto& [slice, tile, deal, y, columns, held] = p;
    while (++slice < end_slice) {
      const Slice& s = work.slices[slice];
      if (slice > begin_slice) tile += 1 << deal.bits;
      deal.next(*this, s);
      if (deal.count == 0) continue;
      const int g = lane / 4, t = lane % 4, outputs = 8 >> deal.bits;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool there = 2 * t + e < count;
        const int column = deal.first + g * outputs;
        y[e] = static_cast<T*>(args.y) + work.rows[there ? 2 * t + e : 0] * args.y_stride + s.begin + column;
        columns[e] = there ? s.width - column : 0;
      }
      load_y(p);
      return true;
    }
    return false;
  }

  // A unit: kTiles tiles of 16 outputs, 4, 2, 1 for ranks up to 16, 32, 64.
  template <int kTiles>
  __device__ __forceinline__ void expand_unit(int n, Place& p, const Operands& o) const {
    const auto& [high, low, factors] = o;
    auto& [slice, tile, deal, y, columns, held] = p;
    constexpr int kCount = 2 * kTiles;
    const int g = lane / 4, t = lane % 4;
    const uint32_t at = arrived(n);
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
        for (int c = 0; c < 2 / kTiles; ++c) {
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
      if (columns[e] > 0) {
        Vec<T, kCount> after;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const uint16_t bits = static_cast<uint16_t>(held[e][i / 2] >> (16 * (i % 2)));
          after.values[i] = from_float<T>(
              fmaf(factors[e], sums[i / 2][2 * (i % 2) + e], to_float(*reinterpret_cast<const T*>(&bits))));
        }
        store<T, kCount>(y[e], after);
      }
    }
  }

  __device__ __forceinline__ void expand() {
    Place p;
    p.slice = begin_slice - 1;
    p.tile = 0;
    p.deal.next_warp = 0;
    bool more = next_slice(p), has_v = false;  // asks for what y holds
    wait_received();
    Operands o;
#pragma unroll 1
    for (int n = units_a; more; ++n) {
      if (!has_v) load_v(work.slices[p.slice], p.tile, o);
      has_v = true;
      if (p.deal.bits == 0) {
        expand_unit<4>(n, p, o);
      } else if (p.deal.bits == 1) {
        expand_unit<2>(n, p, o);
      } else {
        expand_unit<1>(n, p, o);
      }
      release();
      if (--p.deal.count > 0) {
        const int step = 512 << team_bits >> p.deal.bits;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          p.y[e] += step;
          p.columns[e] -= step;
        }
        load_y(p);
      } else {
        more = next_slice(p);
        has_v = false;
      }
      start(n + kPlainDepth);
    }
  }

  // `begin` is called by all threads when the first weights are on their way; false: there is nothing to do. On return
  // rows are known.
  template <class Begin>
  __device__ __forceinline__ void run(Begin begin) {
    bool works = true;
    while (works && begin_slice < work.num_slices) {
      plan();
      begin_copies();
      works = shrink([&] {
        if (number == 0) {
          begin();
          count = work.count;
          if (count == 0) return false;
        } else {
          __syncthreads();  // the fragments of the pass before have been read
        }
        return true;
      });
      if (!works) break;
      expand();
      ++number;
      begin_slice = end_slice;
    }
    copy_wait<0>();
  }
};

}  // namespace punica::cuda::fused_lora
