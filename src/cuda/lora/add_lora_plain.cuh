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

// Bytes of shared memory for fragments: received ones, [block of the team][tile of the pass], and behind them those of
// the warps. Where a tile may take more than one pass there are two buffers of the largest size for received ones.
constexpr int plain_fragment_bytes(bool many, int max_rank, int team_bits) {
  if (many) return (2 * kPlainTiles << team_bits) * kFragment + 16 * kFragment;
  int most = 0;
  for (int tile_bits = 0; tile_bits <= rank_tile_bits(max_rank); ++tile_bits) {
    const int own = tile_bits == 2 ? 4 : team_bits - tile_bits == 2 ? 16 : 8;
    const int bytes = ((1 << (tile_bits + team_bits)) + own) * kFragment;
    most = bytes > most ? bytes : most;
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

// split() of two numbers into packed pairs, of which the first is in the low half: x the high ones, y the low ones.
template <class T>
__device__ __forceinline__ uint2 split_two_large(float v0, float v1) {
  uint16_t h0, l0, h1, l1;
  split<T>(v0, &h0, &l0);
  split<T>(v1, &h1, &l1);
  return {h0 | uint32_t{h1} << 16, l0 | uint32_t{l1} << 16};
}

// The same of numbers within the range of T.
template <class T>
__device__ __forceinline__ uint2 split_two(float v0, float v1) {
  uint2 r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.x) : "f"(v1), "f"(v0));
    const float r0 = v0 - __uint_as_float(r.x << 16), r1 = v1 - __uint_as_float(r.x & 0xffff0000u);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.y) : "f"(r1), "f"(r0));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.x) : "f"(v1), "f"(v0));
    const float r0 = v0 - __half2float(__ushort_as_half(static_cast<uint16_t>(r.x)));
    const float r1 = v1 - __half2float(__ushort_as_half(static_cast<uint16_t>(r.x >> 16)));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.y) : "f"(r1), "f"(r0));
  }
  return r;
}

// kMany: several slices. kTeamBits: log2 of the blocks of a team.
template <Arch kArch, class T, int kTeamBits, bool kMany>
struct PlainBlock {
  const Args& args;
  const Work<kTileRows>& work;
  uint64_t* received;
  uint32_t fragments;  // shared memory: see plain_fragment_bytes()
  uint32_t ring;       // of the warp
  int team_rank, warp, lane;
  int count = 0;  // rows

  static constexpr int kWarpBits = 3 + kTeamBits;  // of the team

  // The slices of a pass, and for each of its tiles of ranks a byte: its slice, its number in that.
  struct Plan {
    int begin = 0, end = 1, tiles = 1;
    uint32_t slice_of = 0, tile_of = 0;
  };
  __device__ __forceinline__ void plan(Plan& p) const {
    p.begin = p.end;
    p.slice_of = p.tile_of = 0;
    p.tiles = 0;
    for (; p.end < work.num_slices; ++p.end) {
      const int more = 1 << rank_tile_bits(work.slices[p.end].rank);
      if (p.tiles + more > kPlainTiles) break;
      const uint32_t mask = 0xffffffffu >> (32 - 8 * more);
      p.slice_of |= (static_cast<uint32_t>(p.end) * 0x01010101u & mask) << (8 * p.tiles);
      p.tile_of |= (0x03020100u & mask) << (8 * p.tiles);
      p.tiles += more;
    }
  }

  // Row g of tile i of a slice is rank first + g / 2 * step + g % 2, row g + 8 the one two behind it.
  __device__ __forceinline__ static int first_rank(int rank, int i) {
    return rank <= 16 ? 0 : 32 * (i >> 1) + 4 * (i & 1);
  }
  __device__ __forceinline__ static int rank_step(int rank) { return rank <= 16 ? 4 : 8; }

  // The warp's units of B: 64 outputs, or 32 or 16 (bits) where the rank is larger. Those of a slice are dealt out to the
  // warps of the team, going on where those of the slice before ended.
  template <int kTileBits>
  struct Deal {
    int slice, first;  // output; there is no more unit where slice == end
    int next_warp = 0;

    __device__ __forceinline__ static int bits(const Slice& s) { return kMany ? rank_tile_bits(s.rank) : kTileBits; }
    __device__ __forceinline__ void begin(const PlainBlock& b, const Plan& plan) {
      slice = plan.begin - 1;
      next_warp = 0;
      next_slice(b, plan);
    }
    __device__ __forceinline__ void next_slice(const PlainBlock& b, const Plan& plan) {
      const int mine = b.team_rank * kPlainWarps + b.warp;
      if constexpr (!kMany) {
        ++slice;
        first = mine << (6 - kTileBits);
        if (first >= b.work.slices[0].width) slice = 1;
      } else {
        while (++slice < plan.end) {
          const Slice& s = b.work.slices[slice];
          const int bits = rank_tile_bits(s.rank);
          first = (mine - next_warp & (1 << kWarpBits) - 1) << (6 - bits);
          next_warp = next_warp + ((s.width + (64 >> bits) - 1) >> (6 - bits)) & (1 << kWarpBits) - 1;
          if (first < s.width) return;
        }
      }
    }
    // To the next unit; true if it is of the same slice.
    __device__ __forceinline__ bool next(const PlainBlock& b, const Plan& plan) {
      const Slice& s = b.work.slices[kMany ? slice : 0];
      first += 64 << kWarpBits >> bits(s);
      if (first < s.width) return true;
      if constexpr (kMany) {
        next_slice(b, plan);
      } else {
        slice = 1;
      }
      return false;
    }
  };

  __device__ __forceinline__ uint32_t place_of(int n) const { return ring + (n & (kPlainDepth - 1)) * kUnitBytes; }
  __device__ __forceinline__ uint32_t arrived(int n) const {
    copy_wait<kPlainDepth - 1>();
    __syncwarp();
    return place_of(n);
  }
  __device__ __forceinline__ void release() const { __syncwarp(); }  // all lanes have read

  // ---- What the warp copies: first its units of A, then those of B ---------------------------------------------------

  // Pieces of a unit's rows, and those of other rows, that the lane copies: four of 16 bytes. There if `rest` is more
  // than 0, d1, d2 and both.
  __device__ __forceinline__ static void copy_four(uint32_t at, uint32_t turn, const char* from, uint32_t off1,
                                                   uint32_t off2, int rest, int d1, int d2, int bytes) {
    copy_16(at, from, rest > 0 ? bytes : 0);
    copy_16((at ^ turn) + 512, from + off1, rest > d1 ? bytes : 0);
    copy_16(at + 1024, from + off2, rest > d2 ? bytes : 0);
    copy_16((at ^ turn) + 1536, from + (off1 + off2), rest > d1 + d2 ? bytes : 0);
  }

  // The warp's part of A: a tile of ranks and a share of the leaves of K, whole groups or a part of one.
  template <int kTileBits>
  struct PartOfA {
    static constexpr int kShareBits = 3 - kTileBits;                // log2 of the warps that share a tile
    static constexpr int kGroupBits = 4 - kTeamBits - kShareBits;  // log2 of the groups of a warp
    int units, k0, leaf_bits;
    const char* from;
    int step, rest;

    __device__ __forceinline__ PartOfA(const PlainBlock& b, const Plan& plan) {
      const int tile = b.warp >> kShareBits, share = b.warp & ((1 << kShareBits) - 1);
      leaf_bits = b.args.leaf_bits;
      units = !kMany || tile < plan.tiles ? 1 << (leaf_bits + 2 + kGroupBits) : 0;
      const int group0 = b.team_rank << (4 - kTeamBits);
      if constexpr (kGroupBits >= 0) {
        k0 = (group0 + (share << kGroupBits)) * kPiece;
      } else {
        k0 = (group0 + (share >> -kGroupBits)) * kPiece + ((share << (2 + kGroupBits)) & 3) * (16 * kPiece);
      }
      const Slice& s = b.work.slices[kMany ? plan.slice_of >> (8 * tile) & 255 : 0];
      step = kMany ? rank_step(s.rank) : kTileBits == 0 ? 4 : 8;
      const int i = kMany ? plan.tile_of >> (8 * tile) & 255 : tile;
      const int rank = (kMany ? first_rank(s.rank, i) : 32 * (i >> 1) + 4 * (i & 1)) + (b.lane >> 4) * step +
                       (b.lane >> 3 & 1);
      from = reinterpret_cast<const char*>(s.a) + 2 * (int64_t{rank} * b.args.h_in + 8 * (b.lane & 7));
      rest = s.rank - rank;
    }
    __device__ __forceinline__ int leaf(int n) const { return n >> leaf_bits; }  // of the warp
    __device__ __forceinline__ int k_of(int n) const {
      const int i = leaf(n), m = n & ((1 << leaf_bits) - 1);
      return k0 + m * (64 * kPiece) + (i & 3) * (16 * kPiece) + (kGroupBits > 0 ? (i >> 2) * kPiece : 0);
    }
    __device__ __forceinline__ void copy(const PlainBlock& b, int n) const {
      const int k = k_of(n), h_in = b.args.h_in;
      copy_four(b.place_of(n) + 16 * place<3>(b.lane >> 3, b.lane & 7), 0, from + 2 * k, 4 * step * h_in, 4 * h_in,
                k + 8 * (b.lane & 7) < h_in ? rest : 0, 2 * step, 2, 16);
    }
  };

  template <int kTileBits>
  __device__ __forceinline__ void start(int n, const PartOfA<kTileBits>& a, Deal<kTileBits>& deal,
                                        const Plan& plan) const {
    if (n < a.units) {
      a.copy(*this, n);
    } else if (deal.slice < plan.end) {
      const Slice& s = work.slices[kMany ? deal.slice : 0];
      const int bits = 1 + deal.bits(s), row = lane >> bits, piece = lane & ((1 << bits) - 1);
      const uint32_t row_bytes = 2 * static_cast<uint32_t>(s.b_stride);
      // place() of the rows that the lane copies one after the other goes on by 512 bytes; with two pieces a row the
      // swizzle of every other one is turned too.
      const int to = bits == 3 ? place<3>(row, piece) : bits == 2 ? place<2>(row, piece) : place<1>(row, piece);
      copy_four(place_of(n) + 16 * to, bits == 1 ? 64 : 0,
                static_cast<const char*>(s.b) + ((deal.first + row) * row_bytes + 16 * piece), row_bytes * (32 >> bits),
                row_bytes * (64 >> bits), s.width - deal.first - row, 32 >> bits, 64 >> bits,
                2 * min(max(s.rank - 8 * piece, 0), 8));
      deal.next(*this, plan);
    }
    copy_commit();
  }

  // ---- v -----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool has_rows() const { return 2 * (lane % 4) < count; }
  // `number`: of passes before.
  __device__ __forceinline__ uint32_t receive(int number) const {
    return fragments + (kMany ? (number & 1) * (kPlainTiles * kFragment << kTeamBits) : 0);
  }
  template <int kTileBits>
  __device__ __forceinline__ uint32_t own_fragments() const {
    return fragments + (kMany ? 2 * kPlainTiles * kFragment << kTeamBits : kFragment << (kTileBits + kTeamBits)) +
           16 * lane;
  }

  // The warp's sums, from its units of A, to shared memory or (four tiles) to `run`.
  template <int kTileBits, class Begin>
  __device__ __forceinline__ bool shrink(const PartOfA<kTileBits>& a, Deal<kTileBits>& deal, const Plan& plan,
                                         float4& run, Begin begin) {
    constexpr int kGroupBits = PartOfA<kTileBits>::kGroupBits;
    const int g = lane / 4, t = lane % 4, last_piece = (1 << a.leaf_bits) - 1;
    const T* x = nullptr;
    int x_rest = 0;  // of the row, from the lane's first element on
    bgmv::Words<4> x0[2] = {}, x1[2] = {};
    const auto load_x = [&](int n, bgmv::Words<4>(&to)[2]) {
      const int k = a.k_of(n);
#pragma unroll
      for (int c = 0; c < 2; ++c) to[c] = bgmv::load_if(k + 32 * c < x_rest, x + k + 32 * c);
    };
    float sum[4] = {};
    [[maybe_unused]] float4 level0 = {}, level1 = {}, level2 = {};
#pragma unroll 1
    for (int n = -kPlainDepth;; ++n) {
      if (n >= 0) {
        if (n == 0) {
          if (!begin()) return false;
          x = static_cast<const T*>(args.x) + work.rows[g < count ? g : 0] * args.x_stride + 8 * t;
          x_rest = g < count ? args.h_in - 8 * t : 0;
          if (a.units > 0) load_x(0, x0);
          if (a.units > 1) load_x(1, x1);
        }
        if (n >= a.units) break;
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
        if (n + 2 < a.units) load_x(n + 2, x1);
        if (kGroupBits > -2 && (n & last_piece) == last_piece) {
          const float4 leaf_sum = {sum[0], sum[1], sum[2], sum[3]};
          const int leaf = a.leaf(n), in_group = kGroupBits == -1 ? 2 * (warp & 1) + leaf : leaf & 3;
          if (kGroupBits == -1 && in_group == 3) {
            // The other half of the group comes first: the two leaves go to shared memory one by one.
            if (has_rows()) store_fragment(own_fragments<kTileBits>() + (2 * warp + 1) * kFragment, leaf_sum);
          } else if (in_group == 0 || (kGroupBits == -1 && in_group == 2)) {
            run = leaf_sum;
          } else {
            run = run + leaf_sum;
          }
          // A balanced tree of the warp's groups.
          if (kGroupBits > 0 && in_group == 3) {
            if ((leaf & 4) == 0) {
              level0 = run;
            } else {
              run = level0 + run;
              if (kGroupBits > 1) {
                if ((leaf & 8) == 0) {
                  level1 = run;
                } else {
                  run = level1 + run;
                  if (kGroupBits > 2) {
                    if ((leaf & 16) == 0) {
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
      start<kTileBits>(n + kPlainDepth, a, deal, plan);
    }
    if (kGroupBits == -2) run = {sum[0], sum[1], sum[2], sum[3]};
    return true;
  }

  // Sends the block's part of v to the team; all parts are in receive() after wait_received(). A block sends for the n-th
  // time when it has received for the (n - 1)-th, and so when all others have read what they received before that: two
  // buffers are enough.
  template <int kTileBits>
  __device__ __forceinline__ void send(float4 sum, const Plan& plan, int number) const {
    constexpr int kShareBits = PartOfA<kTileBits>::kShareBits, kGroupBits = PartOfA<kTileBits>::kGroupBits;
    const int tile = warp >> kShareBits, share = warp & ((1 << kShareBits) - 1);
    const bool there = has_rows(), used = !kMany || tile < plan.tiles;
    const uint32_t own = own_fragments<kTileBits>();
    if constexpr (kTileBits == 2) {
      // The first warp of a tile keeps its fragment.
      if (used && there && share == 1) store_fragment(own + tile * kFragment, sum);
    } else {
      if (used && there) store_fragment(own + (kGroupBits == -1 ? 2 : 1) * warp * kFragment, sum);
    }
    const uint32_t barrier = shared_address(received + (number & 1));
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (kTeamBits > 0) {
      if (number == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      if (threadIdx.x == 0) {
        hopper::barrier_expect(barrier, (kMany ? plan.tiles : 1 << kTileBits) * (16 * 8 << kTeamBits) * ((count + 1) / 2));
      }
    }
#endif
    __syncthreads();
    // Each of these sends to some blocks.
    constexpr int kSenderBits = kTileBits == 2 ? 0 : kShareBits < kTeamBits ? kShareBits : kTeamBits;
    if (!used || share >= 1 << kSenderBits) return;
    const auto fragment = [&](int i) { return load_fragment(own + i * kFragment, there); };
    const int first = tile << kShareBits;
    if constexpr (kTileBits == 2) {
      sum = sum + fragment(tile);
    } else if constexpr (kGroupBits == -2) {
      const auto four = [&](int i) {
        return ((fragment(first + i) + fragment(first + i + 1)) + fragment(first + i + 2)) + fragment(first + i + 3);
      };
      sum = four(0) + four(4);
    } else if constexpr (kGroupBits == -1) {
      const auto group = [&](int i) {
        const int at = 2 * first + 4 * i;
        return (fragment(at) + fragment(at + 2)) + fragment(at + 3);
      };
      sum = group(0) + group(1);
      if constexpr (kShareBits == 3) sum = sum + (group(2) + group(3));
    } else {
      const auto two = [&](int i) { return fragment(first + i) + fragment(first + i + 1); };
      sum = two(0) + two(2);
      if constexpr (kShareBits == 3) sum = sum + (two(4) + two(6));
    }
    const uint32_t place = receive(number) + ((team_rank << kTileBits) + tile) * kFragment + 16 * lane;
    if constexpr (kTeamBits == 0) {
      if (there) store_fragment(place, sum);
    } else {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
      for (int i = 0; i < 1 << (kTeamBits - kSenderBits); ++i) {
        const uint32_t peer = (i << kSenderBits) + share;
        const uint32_t remote = hopper::remote_address(place, peer);
        const uint32_t remote_barrier = hopper::remote_address(barrier, peer);
        if (there) hopper::store_async(remote, sum, remote_barrier);
      }
#endif
    }
  }

  __device__ __forceinline__ void wait_received(int number) const {
    if constexpr (kTeamBits == 0) {
      __syncthreads();
    } else {
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
  }

  // v of a slice as operands: words 2q and 2q + 1 of tile q.
  template <int kTileBits>
  struct Operands {
    static constexpr int kTiles = 1 << kTileBits;
    uint32_t high[2 * kTiles], low[2 * kTiles];
    float factors[2];

    // `first`: tile of the slice in the pass.
    __device__ __forceinline__ void load(const PlainBlock& b, const Slice& s, int first, int number) {
      const int g = b.lane / 4, rank = s.rank, q_end = kMany ? 1 << rank_tile_bits(rank) : kTiles;
      const bool there = b.has_rows();
      const uint32_t at = b.receive(number) + first * kFragment + 16 * b.lane;
      const int step = kMany ? rank_step(rank) : kTileBits == 0 ? 4 : 8;
      const int pair = (g >> 1) * step + (g & 1);
      factors[0] = factors[1] = s.scale;
      float4 v[kTiles];
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (q >= q_end) break;
        const auto part = [&](int i) { return load_fragment(at + ((i << kTileBits) + q) * kFragment, there); };
        v[q] = part(0);
        if constexpr (kTeamBits >= 1) v[q] = v[q] + part(1);
        if constexpr (kTeamBits >= 2) v[q] = v[q] + (part(2) + part(3));
        if constexpr (kTeamBits >= 3) v[q] = v[q] + ((part(4) + part(5)) + (part(6) + part(7)));
        // What stands behind A in the sums may be anything.
        const int r = (kMany ? first_rank(rank, q) : 32 * (q >> 1) + 4 * (q & 1)) + pair;
        if (r >= rank) v[q].x = v[q].y = 0;
        if (r + 2 >= rank) v[q].z = v[q].w = 0;
      }
      if constexpr (std::is_same_v<T, __half>) {
        float largest[2] = {};
        const auto size = [](float value) { return isfinite(value) ? fabsf(value) : 0.0f; };
#pragma unroll
        for (int q = 0; q < kTiles; ++q) {
          if (q >= q_end) break;
          largest[0] = fmaxf(largest[0], fmaxf(size(v[q].x), size(v[q].z)));
          largest[1] = fmaxf(largest[1], fmaxf(size(v[q].y), size(v[q].w)));
        }
        float down[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) {
            largest[e] = fmaxf(largest[e], __shfl_xor_sync(0xffffffffu, largest[e], lanes));
          }
          const int exponent = row_exponent(largest[e]);
          down[e] = down_scale(exponent);
          factors[e] *= up_scale(exponent);
        }
#pragma unroll
        for (int q = 0; q < kTiles; ++q) {
          if (q >= q_end) break;
          v[q].x *= down[0], v[q].z *= down[0];
          v[q].y *= down[1], v[q].w *= down[1];
        }
      }
      float largest = 0;
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (q >= q_end) break;
        largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v[q].x), fabsf(v[q].y)), fmaxf(fabsf(v[q].z), fabsf(v[q].w))));
      }
      // Where a number is beyond the range or not finite: one by one.
      const bool large = __any_sync(0xffffffffu, largest >= (std::is_same_v<T, __half> ? 65504.0f : 3.3e38f));
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (q >= q_end) break;
        const uint2 upper = large ? split_two_large<T>(v[q].x, v[q].y) : split_two<T>(v[q].x, v[q].y);
        const uint2 lower = large ? split_two_large<T>(v[q].z, v[q].w) : split_two<T>(v[q].z, v[q].w);
        high[2 * q] = turn_round(upper.x), high[2 * q + 1] = turn_round(lower.x);
        low[2 * q] = turn_round(upper.y), low[2 * q + 1] = turn_round(lower.y);
      }
    }
  };

  // ---- Expand ------------------------------------------------------------------------------------------------------

  // A unit: kTiles tiles of 16 outputs, 4, 2, 1 for ranks up to 16, 32, 64.
  template <int kTiles, int kTileBits>
  __device__ __forceinline__ void expand_unit(uint32_t at, const Operands<kTileBits>& v, T* const (&y)[2],
                                              const bool (&there)[2], const uint32_t (&held)[2][4]) const {
    constexpr int kCount = 2 * kTiles;
    const int g = lane / 4, t = lane % 4;
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
        mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {v.high[0], v.high[1]});
        mma_m16n8k16<T>(sums[i], {b[0].x, b[1].x, b[0].y, b[1].y}, {v.low[0], v.low[1]});
      } else {
        constexpr int kRowBits = kTiles == 2 ? 2 : 3;
        const int row = kCount * g + 2 * i;
#pragma unroll
        for (int c = 0; c < 2 / kTiles; ++c) {
          const uint4 b0 = load_shared_16(at + 16 * place<kRowBits>(row, 4 * c + t));
          const uint4 b1 = load_shared_16(at + 16 * place<kRowBits>(row + 1, 4 * c + t));
          mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {v.high[4 * c], v.high[4 * c + 1]});
          mma_m16n8k16<T>(sums[i], {b0.x, b1.x, b0.y, b1.y}, {v.low[4 * c], v.low[4 * c + 1]});
          mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {v.high[4 * c + 2], v.high[4 * c + 3]});
          mma_m16n8k16<T>(sums[i], {b0.z, b1.z, b0.w, b1.w}, {v.low[4 * c + 2], v.low[4 * c + 3]});
        }
      }
    }
    release();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (there[e]) {
        Vec<T, kCount> after;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const uint16_t bits = static_cast<uint16_t>(held[e][i / 2] >> (16 * (i % 2)));
          after.values[i] = from_float<T>(
              fmaf(v.factors[e], sums[i / 2][2 * (i % 2) + e], to_float(*reinterpret_cast<const T*>(&bits))));
        }
        store<T, kCount>(y[e], after);
      }
    }
  }

  template <int kTileBits>
  __device__ __forceinline__ void expand(const PartOfA<kTileBits>& a, Deal<kTileBits>& fill, const Plan& plan,
                                         int number) const {
    const int g = lane / 4, t = lane % 4;
    T* rows[2];
    bool has_row[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      has_row[e] = 2 * t + e < count;
      rows[e] = static_cast<T*>(args.y) + work.rows[has_row[e] ? 2 * t + e : 0] * args.y_stride;
    }
    Deal<kTileBits> deal;
    deal.begin(*this, plan);
    // The lane's outputs: neighbours of two rows of the batch.
    T* y[2];
    bool there[2];
    uint32_t held[2][4];
    const auto load_y = [&] {
      const Slice& s = work.slices[kMany ? deal.slice : 0];
      const int bits = deal.bits(s), column = deal.first + (8 * g >> bits);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        y[e] = rows[e] + (s.begin + column);
        there[e] = has_row[e] && column < s.width;
        if (there[e]) {
          if (bits == 0) {
            const uint4 v = *reinterpret_cast<const uint4*>(y[e]);
            held[e][0] = v.x, held[e][1] = v.y, held[e][2] = v.z, held[e][3] = v.w;
          } else if (bits == 1) {
            const uint2 v = *reinterpret_cast<const uint2*>(y[e]);
            held[e][0] = v.x, held[e][1] = v.y;
          } else {
            held[e][0] = *reinterpret_cast<const uint32_t*>(y[e]);
          }
        }
      }
    };
    bool more = deal.slice < plan.end;
    if (more) load_y();
    wait_received(number);
    Operands<kTileBits> v;
    bool has_v = false;
    int first_tile = 0, v_slice = plan.begin;
#pragma unroll 1
    for (int n = a.units; more; ++n) {
      const Slice& s = work.slices[kMany ? deal.slice : 0];
      if (!has_v) {
        if constexpr (kMany) {
          for (; v_slice < deal.slice; ++v_slice) first_tile += 1 << rank_tile_bits(work.slices[v_slice].rank);
        }
        v.load(*this, s, first_tile, number);
        has_v = true;
      }
      const uint32_t at = arrived(n);
      if constexpr (!kMany) {
        expand_unit<(4 >> kTileBits), kTileBits>(at, v, y, there, held);
      } else {
        const int bits = rank_tile_bits(s.rank);
        if (bits == 0) {
          expand_unit<4, kTileBits>(at, v, y, there, held);
        } else if constexpr (kTileBits >= 1) {
          if (bits == 1) {
            expand_unit<2, kTileBits>(at, v, y, there, held);
          } else if constexpr (kTileBits == 2) {
            expand_unit<1, kTileBits>(at, v, y, there, held);
          }
        }
      }
      has_v = deal.next(*this, plan);
      more = deal.slice < plan.end;
      if (more) load_y();
      start<kTileBits>(n + kPlainDepth, a, fill, plan);
    }
  }

  template <int kTileBits, class Begin>
  __device__ __forceinline__ bool pass(const Plan& plan, int number, Begin begin) {
    const PartOfA<kTileBits> a(*this, plan);
    Deal<kTileBits> fill;
    fill.begin(*this, plan);
    float4 run = {};
    if (!shrink<kTileBits>(a, fill, plan, run, begin)) return false;
    send<kTileBits>(run, plan, number);
    expand<kTileBits>(a, fill, plan, number);
    return true;
  }

  // `begin` is called by all threads when the first weights are on their way. On return from it rows are known.
  template <class Begin>
  __device__ __forceinline__ void run(Begin begin) {
    const auto begin_first = [&] {
      begin();
      count = work.count;
      return count > 0;
    };
    Plan p;
    if constexpr (!kMany) {
      const int rank = work.slices[0].rank;
      if (rank <= 16) {
        pass<0>(p, 0, begin_first);
      } else if (rank <= 32) {
        pass<1>(p, 0, begin_first);
      } else {
        pass<2>(p, 0, begin_first);
      }
    } else {
      p.end = 0;
      int number = 0;
      const auto begin_pass = [&] {
        if (number == 0) return begin_first();
        __syncthreads();  // the fragments of the pass before have been read
        return true;
      };
#pragma unroll 1
      for (; p.end < work.num_slices; ++number) {
        plan(p);
        bool works;
        if (p.tiles == 1) {
          works = pass<0>(p, number, begin_pass);
        } else if (p.tiles == 2) {
          works = pass<1>(p, number, begin_pass);
        } else {
          works = pass<2>(p, number, begin_pass);
        }
        if (!works) break;
      }
    }
    copy_wait<0>();
  }
};

}  // namespace punica::cuda::fused_lora
