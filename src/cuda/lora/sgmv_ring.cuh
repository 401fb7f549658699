// What sgmv_ring.cu is made of: barriers, W as fragments in registers, the way over the tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/cuda/common/device.cuh"
#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda::sgmv_ring {

inline constexpr int kWarps = 8;  // that compute
inline constexpr int kCopyThreads = 128;
inline constexpr int kThreads = kWarps * 32 + kCopyThreads;
inline constexpr int kMaxStages = 20;
// Bytes on their way: more of them only wait for each other, and W and the tables for them.
inline constexpr int kInFlight = 96 << 10;

// kSlices: of 16 of K. kQuads: of 32 columns, of a warp. kTiles: of 16 rows, of an item.
template <int kSlices, int kQuads, int kTiles>
struct Ring {
  static constexpr int kRows = kTiles * 16;
  static constexpr int kWarpWidth = kQuads * 32;
  static constexpr int kWidth = kWarps * kWarpWidth;
  // The accesses of a warp to eight rows meet no bank twice.
  static constexpr int kPitchY = kWidth * 2 + 64;
  static constexpr int kPitchX = kSlices * 32 + (kSlices == 1 ? 0 : 16);
  static constexpr int kBytesY = kRows * kPitchY;
  static constexpr int kStageBytes = kBytesY + kRows * kPitchX;
  // Registers for the weights to come, too.
  static constexpr bool kAhead = kSlices * kQuads <= 4;
  static constexpr int kStages = std::min(kMaxStages, kInFlight / kStageBytes);
};

struct Place {
  int stage;
  uint32_t parity;  // of its phase

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// What a stage is for.
struct Item {
  int64_t w;  // address
  int64_t column;
  int64_t row;
  int64_t rows;  // 0: there are no more items
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

#endif

// The lane's part of W of 32 columns from `column` on, as it comes: of each slice, if K is the row, columns c .. c + 3
// of four of K, otherwise those of K of each of four columns. kPermuted: the order of K of sgmv_expand.cu. `fast`: at a
// multiple of 8 bytes, rows of a multiple of four elements.
template <class T, bool kInOut, bool kPermuted, int kSlices>
__device__ __forceinline__ void fetch_weights(uint2 (&parts)[kSlices][4], const T* w, int d_in, int64_t d_out,
                                              int64_t column, bool fast, int lane) {
  const uint16_t* const elements = reinterpret_cast<const uint16_t*>(w);
  const int64_t c = column + lane / 4 * 4;
  const int t = lane % 4;
  // The lane's four of K in a slice.
  const auto k_of = [&](int i) { return kPermuted ? t * 4 + i : t * 2 + i / 2 * 8 + i % 2; };
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[s][i] = {0, 0};
    if (fast && kInOut) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = s * 16 + k_of(i);
        if (c < d_out && k < d_in) parts[s][i] = __ldg(reinterpret_cast<const uint2*>(elements + k * d_out + c));
      }
    } else if (fast) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t* const row = elements + (c + i) * d_in + s * 16;
        if constexpr (kPermuted) {
          if (c + i < d_out && s * 16 + t * 4 < d_in) parts[s][i] = __ldg(reinterpret_cast<const uint2*>(row + t * 4));
        } else if (c + i < d_out) {
          if (s * 16 + t * 2 < d_in) parts[s][i].x = __ldg(reinterpret_cast<const uint32_t*>(row + t * 2));
          if (s * 16 + t * 2 + 8 < d_in) parts[s][i].y = __ldg(reinterpret_cast<const uint32_t*>(row + t * 2 + 8));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pair[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int k = s * 16 + k_of(kInOut ? i : j);
          const int64_t from = c + (kInOut ? j : i);
          if (k < d_in && from < d_out) {
            pair[j / 2] |= uint32_t{__ldg(elements + (kInOut ? k * d_out + from : from * d_in + k))} << (16 * (j % 2));
          }
        }
        parts[s][i] = {pair[0], pair[1]};
        __syncwarp();  // one after the other: all at once take too many registers
      }
    }
  }
}

// Fragments of that: b[slice][product].
template <bool kInOut, int kSlices>
__device__ __forceinline__ void place_weights(uint32_t (&b)[kSlices][4][2], const uint2 (&parts)[kSlices][4]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const uint2(&v)[4] = parts[s];
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

// A warp that goes over the items of all segments, mostly forward. A lane has one of 32 adjacent segments.
template <int kRows>
struct TileWalker {
  int64_t base;    // the first of the 32
  int64_t before;  // tiles before it
  SgmvSegment segment;
  int64_t address;
  int64_t sum;  // tiles of the 32 up to the lane's

  __device__ __forceinline__ void window(const SgmvArgs& args, int64_t first, int lane) {
    base = first;
    const int64_t i = base + lane;
    const bool there = i < args.num_segments;
    segment = there ? cut_segment<kRows>(args, args.s_start[i], args.s_end[i]) : SgmvSegment{0, 0, 0};
    address = there ? args.w_ptr[i] : 0;
    sum = warp_inclusive_sum(segment.tiles, lane);
  }

  // Tile `number`; rows 0 if there are fewer.
  __device__ __forceinline__ Item find(const SgmvArgs& args, int64_t number, int lane) {
    Item item = {0, 0, 0, 0};
    if (number < before) {
      before = 0;
      window(args, 0, lane);
    }
    unsigned owners;
    while ((owners = __ballot_sync(0xffffffffu, number - before < sum)) == 0) {
      if (base + 32 >= args.num_segments) return item;
      before += __shfl_sync(0xffffffffu, sum, 31);
      window(args, base + 32, lane);
    }
    const int owner = __ffs(owners) - 1;
    const int64_t row = segment.start + (number - before - (sum - segment.tiles)) * kRows;
    item.row = __shfl_sync(0xffffffffu, row, owner);
    item.rows = min(__shfl_sync(0xffffffffu, segment.end, owner) - item.row, int64_t{kRows});
    item.w = __shfl_sync(0xffffffffu, address, owner);
    return item;
  }
};

}  // namespace punica::cuda::sgmv_ring
