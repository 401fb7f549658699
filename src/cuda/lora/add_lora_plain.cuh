// The way through add_lora_ring.cuh where nothing is in the way: everything aligned to 16 bytes, ranks multiples of 8
// up to 64. The same sums with as few instructions as possible, for these are what a small batch takes its time for: a
// multiprocessor has few warps at work, and each instruction of a warp waits for the one before it.
//
// Each warp has a tile of 16 ranks and a share of the leaves of K, so that it ends with one piece of v (a fragment, as
// the products leave it: lane (g, t) has two ranks of rows 2t and 2t + 1). Fragments are added as they are, by lanes:
// within a warp, over the warps of a block through shared memory, over the blocks of the team in the shared memory of
// each of them. Only the sum is turned round, by movmatrix, to be the second operand of the expand's products; which
// ranks a lane has is chosen so that this fits.
#pragma once

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_fragment.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"
#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kPlainWarps = 8;
// Units of a warp's ring. What teams of eight need is little, so they ask for all at once. Elsewhere there are bytes
// enough under way with two, and what is asked for too early only stands before what another block waits for.
__host__ __device__ constexpr int plain_depth(int max_team_bits) { return max_team_bits == 3 ? 4 : 2; }

__host__ __device__ constexpr int rank_tile_bits(int rank) { return rank <= 16 ? 0 : rank <= 32 ? 1 : 2; }

// Bytes of shared memory for fragments: received ones, [block of the team][tile], and behind them those of the warps.
constexpr int plain_fragment_bytes(int max_rank, int team_bits) {
  int most = 0;
  for (int tile_bits = 0; tile_bits <= rank_tile_bits(max_rank); ++tile_bits) {
    const int own = tile_bits == 2 ? 4 : team_bits - tile_bits == 2 ? 16 : 8;
    const int bytes = ((1 << (tile_bits + team_bits)) + own) * kFragment;
    most = bytes > most ? bytes : most;
  }
  return most;
}

template <Arch kArch, class T, int kTeamBits, int kTileBits, bool kLong>
struct PlainBlock {
  static constexpr int kShareBits = 3 - kTileBits;               // log2 of the warps that share a tile of ranks
  static constexpr int kGroupBits = 4 - kTeamBits - kShareBits;  // log2 of the groups of leaves of a warp
  static constexpr int kLeaves = 1 << (2 + kGroupBits);          // of a warp
  // A step is a piece of each of up to four leaves; a warp has kLookahead of them under way. Where there are many tiles
  // B is asked for only when A has come: memory gives what it is asked for in turn, and v would be late.
  static constexpr int kStep = kLeaves < 4 ? kLeaves : 4;
  static constexpr int kGroups = kLeaves < 4 ? 1 : kLeaves / 4;
  static constexpr int kDepth = kTeamBits == 3 || kStep > 1 ? plain_depth(kTeamBits) : 1;
  static constexpr int kLookahead = kDepth / kStep;  // 0: half of one
  static constexpr int kTiles = 1 << kTileBits;
  static constexpr int kUnitOutputs = 64 >> kTileBits;  // of B

  const Args& args;
  const Work<kTileRows>& work;
  uint64_t* received;
  uint32_t receive, ring;  // shared memory: what blocks send; units of the warp
  int team_rank, warp, lane;
  int count = 0;  // rows

  __device__ __forceinline__ int tile() const { return warp >> kShareBits; }
  __device__ __forceinline__ int share() const { return warp & ((1 << kShareBits) - 1); }
  __device__ __forceinline__ uint32_t place_of(int unit) const { return ring + (unit & (kDepth - 1)) * kUnitBytes; }
  // Row g of the warp's tile is this rank, row g + 8 the one two behind it.
  __device__ __forceinline__ static int rank_of(int tile, int g) {
    return kTileBits == 0 ? (g >> 1) * 4 + (g & 1) : 32 * (tile >> 1) + 4 * (tile & 1) + (g >> 1) * 8 + (g & 1);
  }

  // ---- A
  // ---------------------------------------------------------------------------------------------------------------

  // A lane copies 16 bytes of four rows: whole lines at a time, of which memory gives twice as many bytes as of halves.
  struct PartOfA {
    const char* from;  // of the next step that is asked for
    uint32_t to;
    int rest;  // elements of K from there on
    int m = 0;
    bool has[4];
  };
  __device__ __forceinline__ int first_k() const {
    const int group0 = team_rank << (4 - kTeamBits);
    if constexpr (kGroupBits >= 0) {
      return (group0 + (share() << kGroupBits)) * kPiece;
    } else {
      return (group0 + (share() >> -kGroupBits)) * kPiece + ((share() << (2 + kGroupBits)) & 3) * (16 * kPiece);
    }
  }
  // Elements from a step to the next one.
  __device__ __forceinline__ int advance(int& m) const {
    if (kLong && ++m < args.leaf_pieces) return 64 * kPiece;
    m = 0;
    return kPiece - (kLong ? (args.leaf_pieces - 1) * (64 * kPiece) : 0);
  }
  static constexpr int kRankStep = kTileBits == 0 ? 4 : 8;  // from pair to pair of rows of a tile
  __device__ __forceinline__ void begin_a(PartOfA& a) const {
    const Slice& s = work.slices[0];
    const int row = lane >> 3, rank = rank_of(tile(), row), k = first_k() + 8 * (lane & 7);
    a.from = static_cast<const char*>(s.a) + 2 * (int64_t{rank} * args.h_in + k);
    a.to = 16 * place<3>(row, lane & 7);
    a.rest = args.h_in - k;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.has[i] = rank + (i & 1) * 2 * kRankStep + (i & 2) < s.rank;
  }
  template <int kUnit>
  __device__ __forceinline__ void start_a(const PartOfA& a, int unit) const {
    const uint32_t to = place_of(unit) + a.to;
    const bool inside = a.rest > 16 * kPiece * kUnit;
    const char* from = a.from + 2 * 16 * kPiece * kUnit;
    const uint32_t next_rows = 4 * kRankStep * args.h_in, lower = 4 * args.h_in;
    copy_16_if(to, from, inside && a.has[0]);
    copy_16_if(to + 512, from + next_rows, inside && a.has[1]);
    copy_16_if(to + 1024, from + lower, inside && a.has[2]);
    copy_16_if(to + 1536, from + (next_rows + lower), inside && a.has[3]);
    copy_commit();
  }

  // ---- B
  // -------------------------------------------------------------------------------------------------------------

  static constexpr int kPieceBits = 1 + kTileBits;                           // log2 of the pieces of a row
  static constexpr int kUnitRows = kUnitOutputs * kPlainWarps << kTeamBits;  // from a unit of a warp to the next one
  struct PartOfB {
    const char* from;
    uint32_t copy_step, unit_step, to;
    int rest;  // rows, from the lane's first one on; none where it has no piece
    int left;  // units
  };
  __device__ __forceinline__ int first_output() const { return (team_rank * kPlainWarps + warp) * kUnitOutputs; }
  __device__ __forceinline__ void begin_b(PartOfB& b) const {
    const Slice& s = work.slices[0];
    const int row = lane >> kPieceBits, piece = lane & ((1 << kPieceBits) - 1), first = first_output() + row;
    const uint32_t row_bytes = 2 * static_cast<uint32_t>(s.b_stride);
    b.from = static_cast<const char*>(s.b) + (first * row_bytes + 16 * piece);
    b.copy_step = row_bytes << (5 - kPieceBits);
    b.unit_step = row_bytes * kUnitRows;
    b.to = 16 * place<kPieceBits>(row, piece);
    b.rest = 8 * piece < s.rank ? s.width - first : 0;
    b.left = s.width > first_output() ? (s.width - first_output() + kUnitRows - 1) / kUnitRows : 0;
  }
  __device__ __forceinline__ void start_b(PartOfB& b, int unit) const {
    if (b.left > 0) {
      constexpr int kRows = 32 >> kPieceBits;
      const uint32_t to = place_of(unit) + b.to;
      // place() of the rows that the lane copies one after the other goes on by 512 bytes; with two pieces a row the
      // swizzle of every other one is turned too.
      const uint32_t turned = kPieceBits == 1 ? to ^ 64 : to;
      copy_16_if(to, b.from, b.rest > 0);
      copy_16_if(turned + 512, b.from + b.copy_step, b.rest > kRows);
      copy_16_if(to + 1024, b.from + 2 * b.copy_step, b.rest > 2 * kRows);
      copy_16_if(turned + 1536, b.from + 3 * b.copy_step, b.rest > 3 * kRows);
      b.from += b.unit_step;
      b.rest -= kUnitRows;
      --b.left;
    }
    copy_commit();
  }

  // ---- v
  // -------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool has_rows() const { return 2 * (lane & 3) < count; }
  __device__ __forceinline__ uint32_t own() const {
    return receive + (kFragment << (kTileBits + kTeamBits)) + 16 * lane;
  }

  // The warp's sum. Of half a group it is in two parts, of which the second goes to shared memory.
  template <class Begin>
  __device__ __forceinline__ bool shrink(float4& run, PartOfB& b, Begin begin) {
    const int steps = kLong ? kGroups * args.leaf_pieces : kGroups;
    PartOfA a;
    begin_a(a);
    if constexpr (kDepth < kStep) {
      start_a<0>(a, 0);
      start_a<1>(a, 1);
    } else {
      start_step(a, 0);
    }
    begin_b(b);
#pragma unroll
    for (int q = 1; q < kLookahead; ++q) {
      if (q < steps) {
        start_step(a, q * kStep);
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i) start_b(b, q * kStep + i);
      }
    }
    if (!begin()) return false;
    constexpr int kAhead = kStep < 2 ? 1 : 2;
    const int g = lane >> 2, k = first_k() + 8 * (lane & 3);
    const T* x = reinterpret_cast<const T*>(static_cast<const char*>(args.x) +
                                            int64_t{work.rows[g < count ? g : 0]} * args.x_row_bytes) +
                 k;
    int x_rest = g < count ? args.h_in - k : 0, m = 0;
    bgmv::Words<4> xs[kAhead][2];
    const auto load_x = [&](int i, int from) {
#pragma unroll
      for (int c = 0; c < 2; ++c) xs[i % kAhead][c] = bgmv::load_if(from + 32 * c < x_rest, x + from + 32 * c);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_x(i, 16 * kPiece * i);
    __syncwarp();  // keeps these loads before the wait for the weights
    float sums[kStep][4] = {};
    [[maybe_unused]] float4 level0 = {}, level1 = {}, level2 = {};
#pragma unroll 1
    for (int step = 0;; ++step) {
      const bool last_piece = !kLong || m + 1 == args.leaf_pieces;
      const int next = advance(m);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        copy_wait<kDepth - 1>();
        __syncwarp();
        const uint32_t at = place_of(step * kStep + i) + 16 * place<3>(g, lane & 3);
        const uint4 upper0 = load_shared_16(at), upper1 = load_shared_16(at ^ 64);
        const uint4 lower0 = load_shared_16(at + 1024), lower1 = load_shared_16((at ^ 64) + 1024);
        const bgmv::Words<4>(&xi)[2] = xs[i % kAhead];
        mma_m16n8k16<T>(sums[i], {upper0.x, lower0.x, upper0.y, lower0.y}, {xi[0].values[0], xi[0].values[1]});
        mma_m16n8k16<T>(sums[i], {upper0.z, lower0.z, upper0.w, lower0.w}, {xi[0].values[2], xi[0].values[3]});
        mma_m16n8k16<T>(sums[i], {upper1.x, lower1.x, upper1.y, lower1.y}, {xi[1].values[0], xi[1].values[1]});
        mma_m16n8k16<T>(sums[i], {upper1.z, lower1.z, upper1.w, lower1.w}, {xi[1].values[2], xi[1].values[3]});
        if (i + kAhead < kStep) {
          load_x(i + kAhead, 16 * kPiece * (i + kAhead));
        } else if (step + 1 < steps) {
          load_x(i + kAhead, next + 16 * kPiece * (i + kAhead - kStep));
        }
        __syncwarp();  // all lanes have read
        if constexpr (kDepth < kStep) {
          static_assert(kDepth == 2 && kStep == 4);
          const int unit = step * kStep + i + 2;
          if (i == 0) start_a<2>(a, unit);
          if (i == 1) {
            start_a<3>(a, unit);
            end_step(a);
          }
          if (i >= 2) {
            if (step + 1 < steps) {
              if (i == 2) start_a<0>(a, unit);
              if (i == 3) start_a<1>(a, unit);
            } else {
              start_b(b, unit);
            }
          }
        } else if (step + kLookahead < steps) {
          if (i == 0) start_a<0>(a, step * kStep);
          if (i == 1) start_a<1>(a, step * kStep + 1);
          if (i == 2) start_a<2>(a, step * kStep + 2);
          if (i == 3) start_a<3>(a, step * kStep + 3);
          if (i == kStep - 1) end_step(a);
        } else {
          start_b(b, step * kStep + i);
        }
      }
      x += next;
      x_rest -= next;
      if (last_piece) {
        const auto sum = [&](int i) { return float4{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}; };
        if constexpr (kStep == 1) {
          run = sum(0);
        } else if constexpr (kStep == 2) {
          if ((warp & 1) == 0) {
            run = sum(0) + sum(1);
          } else {
            // The other half of the group comes first.
            run = sum(0);
            if (has_rows()) store_fragment(own() + (2 * warp + 1) * kFragment, sum(1));
          }
        } else {
          run = ((sum(0) + sum(1)) + sum(2)) + sum(3);
        }
        if constexpr (kGroups > 1) {
          // A balanced tree of the warp's groups.
          const int group = kLong ? step / args.leaf_pieces : step;
          if ((group & 1) == 0) {
            level0 = run;
          } else {
            run = level0 + run;
            if (kGroups > 2) {
              if ((group & 2) == 0) {
                level1 = run;
              } else {
                run = level1 + run;
                if (kGroups > 4) {
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
#pragma unroll
        for (int i = 0; i < kStep; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
      }
      if (step + 1 == steps) break;
    }
    return true;
  }
  __device__ __forceinline__ void end_step(PartOfA& a) const {
    const int by = advance(a.m);
    a.from += 2 * by;
    a.rest -= by;
  }
  __device__ __forceinline__ void start_step(PartOfA& a, int unit) const {
    start_a<0>(a, unit);
    if constexpr (kStep > 1) start_a<1>(a, unit + 1);
    if constexpr (kStep > 2) {
      start_a<2>(a, unit + 2);
      start_a<3>(a, unit + 3);
    }
    end_step(a);
  }

  // Sends the block's part of v to the team; all parts are in `receive` after wait_received().
  __device__ __forceinline__ void send(float4 sum) const {
    const int tile = this->tile(), share = this->share();
    const bool there = has_rows();
    const uint32_t own = this->own();
    if constexpr (kTileBits == 2) {
      // The first warp of a tile keeps its fragment.
      if (there && share == 1) store_fragment(own + tile * kFragment, sum);
    } else {
      if (there) store_fragment(own + (kGroupBits == -1 ? 2 : 1) * warp * kFragment, sum);
    }
    const uint32_t barrier = shared_address(received);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (kTeamBits > 0) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      if (threadIdx.x == 0) hopper::barrier_expect(barrier, (16 * 8 << (kTileBits + kTeamBits)) * ((count + 1) / 2));
    }
#endif
    __syncthreads();
    // Each of these sends to some blocks.
    constexpr int kSenderBits = kTileBits == 2 ? 0 : kShareBits < kTeamBits ? kShareBits : kTeamBits;
    if (share >= 1 << kSenderBits) return;
    const uint32_t first = own + ((kGroupBits == -1 ? 2 : 1) * tile << kShareBits) * kFragment;
    const auto fragment = [&](int i) { return load_fragment(first + i * kFragment, there); };
    if constexpr (kTileBits == 2) {
      sum = sum + load_fragment(own + tile * kFragment, there);
    } else if constexpr (kGroupBits == -2) {
      const auto four = [&](int i) { return ((fragment(i) + fragment(i + 1)) + fragment(i + 2)) + fragment(i + 3); };
      sum = four(0) + four(4);
    } else if constexpr (kGroupBits == -1) {
      const auto group = [&](int i) { return (fragment(4 * i) + fragment(4 * i + 2)) + fragment(4 * i + 3); };
      sum = group(0) + group(1);
      if constexpr (kShareBits == 3) sum = sum + (group(2) + group(3));
    } else {
      const auto two = [&](int i) { return fragment(i) + fragment(i + 1); };
      sum = two(0) + two(2);
      if constexpr (kShareBits == 3) sum = sum + (two(4) + two(6));
    }
    const uint32_t place = receive + ((team_rank << kTileBits) + tile) * kFragment + 16 * lane;
    if constexpr (kTeamBits == 0) {
      if (there) store_fragment(place, sum);
    } else {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
      const uint32_t first_block = hopper::cluster_rank() & ~((1u << kTeamBits) - 1);  // of the team
#pragma unroll
      for (int i = 0; i < 1 << (kTeamBits - kSenderBits); ++i) {
        const uint32_t peer = first_block + (i << kSenderBits) + share;
        const uint32_t remote = hopper::remote_address(place, peer);
        const uint32_t remote_barrier = hopper::remote_address(barrier, peer);
        if (there) hopper::store_async(remote, sum, remote_barrier);
      }
#endif
    }
  }

  __device__ __forceinline__ void wait_received() const {
    if constexpr (kTeamBits == 0) {
      __syncthreads();
    } else {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
      uint32_t done;
      do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            "selp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(received))
            : "memory");
      } while (done == 0);
#endif
    }
  }

  // v as operands: words 2q and 2q + 1 of tile q.
  struct Operands {
    uint32_t high[2 * kTiles], low[2 * kTiles];
    float factors[2];
  };
  __device__ __forceinline__ void load_v(Operands& o) const {
    const int g = lane >> 2, rank = work.slices[0].rank;
    const bool there = has_rows();
    const uint32_t at = receive + 16 * lane;
    o.factors[0] = o.factors[1] = work.slices[0].scale;
    float4 v[kTiles];
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      const auto part = [&](int i) { return load_fragment(at + ((i << kTileBits) + q) * kFragment, there); };
      v[q] = part(0);
      if constexpr (kTeamBits >= 1) v[q] = v[q] + part(1);
      if constexpr (kTeamBits >= 2) v[q] = v[q] + (part(2) + part(3));
      if constexpr (kTeamBits >= 3) v[q] = v[q] + ((part(4) + part(5)) + (part(6) + part(7)));
      // What stands behind A in the sums may be anything.
      const int r = rank_of(q, g);
      if (r >= rank) v[q].x = v[q].y = 0;
      if (r + 2 >= rank) v[q].z = v[q].w = 0;
    }
    if constexpr (std::is_same_v<T, __half>) {
      float largest[2] = {};
      const auto size = [](float value) { return isfinite(value) ? fabsf(value) : 0.0f; };
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
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
        o.factors[e] *= up_scale(exponent);
      }
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        v[q].x *= down[0], v[q].z *= down[0];
        v[q].y *= down[1], v[q].w *= down[1];
      }
    }
    float largest = 0;
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v[q].x), fabsf(v[q].y)), fmaxf(fabsf(v[q].z), fabsf(v[q].w))));
    }
    // Where a number is beyond the range or infinite: one by one.
    const bool large = __any_sync(0xffffffffu, largest >= (std::is_same_v<T, __half> ? 65504.0f : 3.3e38f));
    const auto turn = [&](int q, const uint2& upper, const uint2& lower) {
      o.high[2 * q] = turn_round(upper.x), o.high[2 * q + 1] = turn_round(lower.x);
      o.low[2 * q] = turn_round(upper.y), o.low[2 * q + 1] = turn_round(lower.y);
    };
    if (!large) [[likely]] {
#pragma unroll
      for (int q = 0; q < kTiles; ++q) turn(q, split_two<T>(v[q].x, v[q].y), split_two<T>(v[q].z, v[q].w));
    } else {
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        turn(q, split_two_large<T>(v[q].x, v[q].y), split_two_large<T>(v[q].z, v[q].w));
      }
    }
  }

  // ---- Expand
  // --------------------------------------------------------------------------------------------------------

  // A unit is four tiles of 16 outputs, or two or one where the rank is larger.
  __device__ __forceinline__ void expand(PartOfB& b) const {
    constexpr int kMTiles = 4 >> kTileBits, kCount = 2 * kMTiles;
    const int g = lane >> 2, t = lane & 3;
    const Slice& s = work.slices[0];
    // The lane's outputs: kCount neighbours of two rows of the batch.
    int column = first_output() + kCount * g;
    T* y[2];
    bool has_row[2];
    bgmv::Words<kMTiles> held[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      has_row[e] = 2 * t + e < count;
      y[e] = reinterpret_cast<T*>(static_cast<char*>(args.y) +
                                  int64_t{work.rows[has_row[e] ? 2 * t + e : 0]} * args.y_row_bytes) +
             (s.begin + column);
    }
    const auto load_y = [&] {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (has_row[e] && column < s.width) held[e] = *reinterpret_cast<const bgmv::Words<kMTiles>*>(y[e]);
      }
    };
    load_y();
    wait_received();
    Operands v;
    load_v(v);
    const int width = s.width;
    int unit = (kLong ? kGroups * args.leaf_pieces : kGroups) * kStep;
#pragma unroll 1
    for (int output = first_output(); output < width; output += kUnitRows, ++unit) {
      copy_wait<kDepth - 1>();
      __syncwarp();
      const uint32_t at = place_of(unit);
      float sums[kMTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        if constexpr (kTileBits == 0) {
          uint2 w[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(w[h].x), "=r"(w[h].y)
                         : "r"(at + 16 * place<1>(8 * g + 2 * i + h, t / 2) + t % 2 * 8)
                         : "memory");
          }
          mma_m16n8k16<T>(sums[i], {w[0].x, w[1].x, w[0].y, w[1].y}, {v.high[0], v.high[1]});
          mma_m16n8k16<T>(sums[i], {w[0].x, w[1].x, w[0].y, w[1].y}, {v.low[0], v.low[1]});
        } else {
          const int row = kCount * g + 2 * i;
#pragma unroll
          for (int c = 0; c < kTiles / 2; ++c) {
            const uint4 w0 = load_shared_16(at + 16 * place<kPieceBits>(row, 4 * c + t));
            const uint4 w1 = load_shared_16(at + 16 * place<kPieceBits>(row + 1, 4 * c + t));
            mma_m16n8k16<T>(sums[i], {w0.x, w1.x, w0.y, w1.y}, {v.high[4 * c], v.high[4 * c + 1]});
            mma_m16n8k16<T>(sums[i], {w0.x, w1.x, w0.y, w1.y}, {v.low[4 * c], v.low[4 * c + 1]});
            mma_m16n8k16<T>(sums[i], {w0.z, w1.z, w0.w, w1.w}, {v.high[4 * c + 2], v.high[4 * c + 3]});
            mma_m16n8k16<T>(sums[i], {w0.z, w1.z, w0.w, w1.w}, {v.low[4 * c + 2], v.low[4 * c + 3]});
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (has_row[e] && column < width) {
          Vec<T, kCount> after;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const uint16_t bits = static_cast<uint16_t>(held[e].values[i / 2] >> (16 * (i % 2)));
            after.values[i] = from_float<T>(
                fmaf(v.factors[e], sums[i / 2][2 * (i % 2) + e], to_float(*reinterpret_cast<const T*>(&bits))));
          }
          store<T, kCount>(y[e], after);
        }
      }
      if (output + kUnitRows >= width) break;
      column += kUnitRows;
      y[0] += kUnitRows, y[1] += kUnitRows;
      load_y();
      __syncwarp();  // all lanes have read
      start_b(b, unit);
    }
  }

  // `begin` is called by all threads when the first weights are on their way. On return from it rows are known.
  template <class Begin>
  __device__ __forceinline__ void run(Begin begin) {
    PartOfB b;
    float4 sum;
    if (shrink(sum, b, [&] {
          begin();
          count = work.count;
          return count > 0;
        })) {
      send(sum);
      expand(b);
    }
    copy_wait<0>();
  }
};

}  // namespace punica::cuda::fused_lora
