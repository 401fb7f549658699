// What the warps of add_lora_tiles.cu share: sizes, tiles and what there is to do for them, rings of units.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "src/cuda/common/hopper.cuh"
#include "src/cuda/lora/add_lora.cuh"
#include "src/cuda/lora/add_lora_unit.cuh"

namespace punica::cuda::fused_lora::tiles {

inline constexpr int kRows = 64;
inline constexpr int kWarps = 8;      // that compute, in teams of two
inline constexpr int kCopyWarps = 4;  // each for a team
inline constexpr int kTeams = kCopyWarps;
inline constexpr int kWarpUnits = 2;              // of 16 rows, of a warp: every other one of the tile
inline constexpr int kRowBytes = 4 * kUnitBytes;  // all rows of a piece of x or of a strip of y
inline constexpr int kThreads = 32 * (kWarps + kCopyWarps);
inline constexpr int kRanks = 64;  // of a pass, at most
inline constexpr int kStrip = 64;  // columns of y
inline constexpr int kGroups = kRows / 8;
inline constexpr int kMaxStages = 3;  // of a ring; with four more is under way and all of it slower
inline constexpr int kLeaves = 64;    // of pieces of K: see add_lora_ring.cuh

// What a pass takes x for: the ranks of one slice or of several, in tiles of 16.
struct Pass {
  int begin, end;  // slices
  int tiles;
  int slice_of[kRanks / 16];
  int rank_of[kRanks / 16];  // the tile's first one
};

struct RingBarriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

// A tile and what there is to do.
struct Job {
  Work<kRows> work;
  int64_t x_at[kRows], y_at[kRows];  // bytes from row 0
  int num_passes;
  Pass passes[kMaxLoraSlices];
};

struct Shared {
  RingBarriers rings[kTeams];
  uint64_t received;           // the sums of the others
  uint64_t drained;            // the others have read what they received
  uint64_t ready[2], done[2];  // of jobs
  TileScratch<kWarps + kCopyWarps> scratch;
  Job jobs[2];
  float up[kRanks / 16][kRows];  // float16, of a slice of the pass: see row_exponent()
};
inline constexpr size_t kHeadBytes = (sizeof(Shared) + 127) / 128 * 128;
inline constexpr size_t kMostShared = 227 * 1024;

// kT: tiles of 16 ranks of a pass, at most.
template <int kT, int kClusterBits, bool kOfAnyLength = true>
struct Shape {
  static constexpr bool kAnyLength = kOfAnyLength;  // otherwise a leaf has one piece of K at most
  static constexpr int kBlocks = 1 << kClusterBits;
  static constexpr int kTeamChains = (kChains >> kClusterBits) / kTeams;  // one after the other
  static constexpr int kTileFours = kGroups * 32;                         // of four sums, of a tile of ranks
  static constexpr size_t kPartBytes = size_t{16} * kTeams * kT * kTileFours;
  static constexpr size_t kReceiveBytes = size_t{16} * (kBlocks - 1) * kT * kTileFours;
  // A stage: rows of a piece of K or of a strip, and the weights that go with them.
  static constexpr int kStageBytes = kRowBytes + kT * kUnitBytes;
  static constexpr int kStages = std::min<int>(
      kMaxStages, (kMostShared - kHeadBytes - kPartBytes - kReceiveBytes) / (size_t{kStageBytes} * kTeams));
  // Of x, asked for in L2 before the wait for the kernels ahead. With ranks to 64 more than one takes longer.
  static constexpr int kPrefetchStages = kT < 4 ? 4 : 1;
  static constexpr size_t kSharedBytes =
      kHeadBytes + kPartBytes + kReceiveBytes + size_t{kStageBytes} * kTeams * kStages;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The tables of one slice and a few adapters, asked for together with the segments, in one wait for memory; and the
// rows, if the tile begins at `position`.
class AtOnce {
 public:
  static constexpr int kMostSegments = 96;
  static constexpr int kMostAdapters = 64;
  static __device__ __forceinline__ bool can(const Args& args) {
    return args.num_slices == 1 && args.max_segments <= kMostSegments && args.num_adapters_32 <= kMostAdapters;
  }

  __device__ __forceinline__ AtOnce(const Args& args, int position) : position_(position) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 32 * i + threadIdx.x % 32;
      if (at < args.num_adapters_32) {
        a_[i] = args.a_ptr[at], b_[i] = args.b_ptr[at];
        rank_[i] = args.ranks[at], scale_[i] = args.scales[at];
      }
      if (position + at < args.capacity) row_[i] = args.order[position + at];
    }
  }
  __device__ __forceinline__ void get_adapter(const Args&, int adapter, int64_t* a, int64_t* b, int* rank,
                                              float* scale) const {
    const int from = adapter % 32;
    const bool second = adapter >= 32;
    const auto get = [&](const auto(&of)[2]) {
      const auto one = __shfl_sync(0xffffffffu, of[0], from), other = __shfl_sync(0xffffffffu, of[1], from);
      return second ? other : one;
    };
    const int64_t of_a = get(a_), of_b = get(b_);
    const int of_rank = get(rank_);
    const float of_scale = get(scale_);
    if (threadIdx.x % 32 == 0) *a = of_a, *b = of_b, *rank = of_rank, *scale = of_scale;
  }
  __device__ __forceinline__ int row(const Args& args, int position, int i) const {
    return position == position_ ? row_[i] : Tables().row(args, position, i);
  }

 private:
  int position_;
  int64_t a_[2] = {}, b_[2] = {};
  int rank_[2] = {}, row_[2] = {-1, -1};
  float scale_[2] = {};
};

// Tiles of a slice in a pass: what its last product of the expand reads is there.
__device__ __forceinline__ int padded_tiles(int rank) { return rank <= 16 ? 1 : (rank + 31) / 32 * 2; }

template <int kT>
__device__ __forceinline__ void plan(Job* job) {
  const Work<kRows>& work = job->work;
  if (work.num_slices == 1) {
    Pass& pass = job->passes[0];
    pass.begin = 0, pass.end = 1;
    pass.tiles = padded_tiles(work.slices[0].rank);
#pragma unroll
    for (int i = 0; i < kT; ++i) pass.slice_of[i] = 0, pass.rank_of[i] = 16 * i;
    job->num_passes = 1;
    return;
  }
  int number = 0;
  for (int s = 0; s < work.num_slices; ++number) {
    Pass& pass = job->passes[number];
    pass.begin = s;
    int tiles = 0;
    for (; s < work.num_slices; ++s) {
      const int more = padded_tiles(work.slices[s].rank);
      if (tiles + more > kT) break;
      for (int i = 0; i < more; ++i) {
        pass.slice_of[tiles + i] = s;
        pass.rank_of[tiles + i] = 16 * i;
      }
      tiles += more;
    }
    pass.end = s;
    pass.tiles = tiles;
  }
  job->num_passes = number;
}

template <class T>
__device__ __forceinline__ void place_rows(const Args& args, Job* job, int i) {
  const int64_t row = i < job->work.count ? job->work.rows[i] : 0;  // otherwise: copied and not used
  job->x_at[i] = row * args.x_stride * static_cast<int64_t>(sizeof(T));
  job->y_at[i] = row * args.y_stride * static_cast<int64_t>(sizeof(T));
}

// Tile `number`, which there is, for any number of segments, by one warp.
template <class T, int kT>
__device__ __forceinline__ void find_job(const Args& args, uint32_t number, Job* job) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) job->work.count = 0;
  uint32_t before = 0;
#pragma unroll 1
  for (int i = 0; i < args.max_segments; i += 32) {
    Segment segment = load_segment<kRows>(args, i + lane, args.max_segments);
    cut_segment<kRows>(args, &segment);
    const uint32_t sum = inclusive_sum(segment.tiles, lane), of_lane = before + sum - segment.tiles;
    const uint32_t owners = __ballot_sync(0xffffffffu, owns_tile(number, of_lane, segment.tiles));
    if (owners != 0) {
      const int owner = __ffs(owners) - 1;
      const int position = segment.start + static_cast<int>(number - of_lane) * kRows;
      load_work<T>(args, __shfl_sync(0xffffffffu, position, owner), __shfl_sync(0xffffffffu, segment.end, owner),
                   __shfl_sync(0xffffffffu, segment.adapter, owner), &job->work);
      break;
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  __syncwarp();
  for (int i = lane; i < kRows; i += 32) place_rows<T>(args, job, i);
  if (lane == 0) plan<kT>(job);
  __syncwarp();
}

// A ring of stages in shared memory, from the side of one that fills or reads it.
template <class S>
struct Ring {
  uint32_t stages, barriers;
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty() const {
    return barriers + static_cast<uint32_t>(offsetof(RingBarriers, empty)) + 8 * slot;
  }
  __device__ __forceinline__ uint32_t rows() const { return stages + slot * S::kStageBytes; }
  __device__ __forceinline__ uint32_t weights() const { return rows() + kRowBytes; }
  __device__ __forceinline__ void wait_full() const { hopper::barrier_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { hopper::barrier_wait(empty(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++slot == S::kStages) slot = 0, parity ^= 1;
  }
  // By each thread of a warp that has read it: racecheck sees no order where one lane arrives for its warp.
  __device__ __forceinline__ void release() {
    hopper::barrier_arrive(empty());
    advance();
  }
};

// Where a piece of 16 bytes of a unit of B lies: 64, 32 or 16 rows of 2, 4 or 8 pieces.
template <int kRowBits>
__device__ __forceinline__ int place_b(int row, int piece) {
  if constexpr (kRowBits == 3) return row * 8 + (piece ^ (row >> 3 & 1) << 2);
  if constexpr (kRowBits == 2) return (row * 4 + piece) ^ (row >> 3 & 1) << 2;
  return (row * 2 + piece) ^ (row >> 3 & 3) << 1;
}
// And of y, 16 rows of 8 pieces.
__device__ __forceinline__ int place_y(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

// Job n > 0, which a warp has looked for.
__device__ __forceinline__ void wait_job(Shared& shared, int n) {
  hopper::barrier_wait(shared_address(&shared.ready[n & 1]), (n - 1) >> 1 & 1);
}
__device__ __forceinline__ void end_job(Shared& shared, int n) {
  hopper::barrier_arrive(shared_address(&shared.done[n & 1]));
}

struct Block {
  const Args& args;
  Shared& shared;
  float4* parts;  // of the sums, of teams: [team][tile][group of rows][lane]; in the first one's place: v
  float4* receive;
  uint32_t ring, barriers;
  int rank;             // in the cluster
  uint32_t tile, step;  // the first one, and to the next
  uint32_t tiles;
  int team, part, lane;
  uint32_t zero;
};

#endif

}  // namespace punica::cuda::fused_lora::tiles
