// sgmv on sm_90 for float16 and bfloat16 where d_in is at most 128 and y is large: y never stops moving.
//
// Each multiprocessor has one block. Its work is chunks of up to 16 items, one below the other, of 16 or 32 rows x a
// strip of columns. Four warps copy y and x of the items to come into a ring of stages in shared memory; eight compute:
// they have W of the strip in registers, add the products to what the stage has of y and write to memory. So what is on
// its way does not depend on registers, and nobody waits for the tables, for W and for y one after the other but at the
// beginning. Blocks take chunks in the order of memory: then what they read and write together is one piece of y that
// moves on, which memory serves better than pieces far from each other.
//
// The arithmetic is that of sgmv_expand.cu (d_in <= 16) and sgmv_wide.cu, which serve where y is small or anything is
// not aligned. As there, a lane has eight adjacent columns of y in four products: column c of product j is 4c + j
// of 32.
#include <algorithm>
#include <limits>

#include "src/cuda/common/mma.cuh"
#include "src/cuda/lora/sgmv_ring.cuh"

namespace punica::cuda {
namespace {

using namespace sgmv_ring;

constexpr int kMaxChunk = 16;  // items
constexpr int64_t kMaxIn = 128;
constexpr int64_t kLarge = int64_t{1} << 20;  // elements of y

template <Arch kArch, class T, bool kInOut, int kSlices, int kQuads, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    sgmv_ring_kernel(const SgmvArgs args, const int chunk_items, const int64_t chunks) {
  static_assert(kArch == Arch::kSm90, "the path is in the name, as in all kernels");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = Ring<kSlices, kQuads, kTiles>;
  constexpr int kRows = R::kRows;
  constexpr bool kPermuted = kSlices == 1;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ __align__(8) uint64_t full[kMaxStages], known[kMaxStages], empty[kMaxStages];
  __shared__ Item items[kMaxStages];
  launch_dependents<kArch>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = (args.d_out + R::kWidth - 1) / R::kWidth;
  const uint32_t ring = shared_address(memory);
  const uint32_t full_at = shared_address(full), known_at = shared_address(known), empty_at = shared_address(empty);

  if (threadIdx.x < R::kStages) {
    hopper::barrier_init(full_at + threadIdx.x * 8, kCopyThreads);
    hopper::barrier_init(known_at + threadIdx.x * 8, 1);
    hopper::barrier_init(empty_at + threadIdx.x * 8, kWarps);
  }
  prefetch_tables(args);
  // Lines of y of the first chunk if the segments cover all rows in order, as they mostly do.
  constexpr int kLines = R::kWidth * 2 / kLineBytes;
  const int64_t first = blockIdx.x / strips * (kRows * chunk_items);
  const int lines = kRows * min(chunk_items, R::kStages) * kLines;
  for (int i = threadIdx.x; i < lines; i += kThreads) {
    const int64_t row = first + i / kLines, column = blockIdx.x % strips * R::kWidth + i % kLines * (kLineBytes / 2);
    if (row < args.rows && column < args.d_out) {
      prefetch_line(static_cast<const T*>(args.y) + row * args.y_stride + column);
    }
  }
  if (!args.early_reads) grid_dependency_wait<kArch>();
  __syncthreads();

  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == R::kStages) stage = 0, parity ^= 1;
  };

  if (warp >= kWarps) {
    const int thread = threadIdx.x - kWarps * 32;
    // Of y: 16 bytes of every kStep-th row.
    constexpr int kAcross = R::kWidth / 8, kStep = kCopyThreads / kAcross;
    static_assert(kRows % kStep == 0);
    const int y_row = thread / kAcross, y_column = thread % kAcross * 8;
    const uint32_t y_to = ring + y_row * R::kPitchY + y_column * 2;
    // Of x: 16 bytes of rows of 2 * kSlices such parts.
    constexpr int kParts = kRows * 2 * kSlices;
    TileWalker<kRows> walker;
    walker.before = 0;
    walker.window(args, 0, lane);
    int64_t last_w = 0, last_column = -1;
    if (args.early_reads) grid_dependency_wait<kArch>();
    bool more = true;
    int fill = 0;
    // No more chunks than segments that do not overlap can have, whatever the tables hold.
    for (int64_t chunk = blockIdx.x; more && chunk < chunks; chunk += gridDim.x) {
      const int64_t column = chunk % strips * R::kWidth;
#pragma unroll 1
      for (int i = 0; i < chunk_items; ++i) {
        Item item = walker.find(args, chunk / strips * chunk_items + i, lane);
        if (item.rows == 0) {
          more = i > 0;  // other strips of the same rows may follow
          break;
        }
        item.w += args.w_offset * static_cast<int64_t>(sizeof(T));
        item.column = column;
        if (fill >= R::kStages) hopper::barrier_wait(empty_at + stage * 8, parity ^ 1);
        ++fill;
        if (thread == 0) {
          items[stage] = item;
          hopper::barrier_arrive(known_at + stage * 8);
        }
        if (item.w != last_w || column != last_column) {
          // The computing warps load W as fragments, some items from now.
          last_w = item.w, last_column = column;
          if constexpr (kInOut) {
            constexpr int kLines = R::kWidth * 2 / kLineBytes;
            for (int j = thread; j < args.d_in * kLines; j += kCopyThreads) {
              const int64_t c = column + j % kLines * (kLineBytes / 2);
              if (c < args.d_out) prefetch_line(reinterpret_cast<const T*>(item.w) + j / kLines * args.d_out + c);
            }
          } else {
            const int64_t bytes = min(args.d_out - column, int64_t{R::kWidth}) * args.d_in * 2;
            const char* const from = reinterpret_cast<const char*>(item.w) + column * args.d_in * 2;
            for (int64_t j = thread * kLineBytes; j < bytes; j += kCopyThreads * kLineBytes) prefetch_line(from + j);
          }
        }
        const uint32_t at = stage * R::kStageBytes;
        const int rows = static_cast<int>(item.rows);
        if (column + y_column < args.d_out) {
          const T* from = static_cast<const T*>(args.y) + (item.row + y_row) * args.y_stride + column + y_column;
#pragma unroll
          for (int r = 0; r < kRows; r += kStep) {
            if (r + y_row < rows) copy_async_16(y_to + at + r * R::kPitchY, from, 16);
            from += kStep * args.y_stride;
          }
        }
#pragma unroll
        for (int id = 0; id < kParts; id += kCopyThreads) {
          const int r = (id + thread) / (2 * kSlices), c = (id + thread) % (2 * kSlices) * 8;
          if (kParts >= kCopyThreads || thread < kParts) {
            const int have = r < rows ? static_cast<int>(min(max(args.d_in - c, int64_t{0}), int64_t{8})) : 0;
            const T* const from = static_cast<const T*>(args.x) + (item.row + r) * args.x_stride + c;
            copy_async_16(ring + at + R::kBytesY + r * R::kPitchX + c * 2, have > 0 ? from : args.x, have * 2);
          }
        }
        hopper::barrier_arrive_copies(full_at + stage * 8);
        advance();
      }
    }
    if (fill >= R::kStages) hopper::barrier_wait(empty_at + stage * 8, parity ^ 1);
    if (thread == 0) {
      items[stage].rows = 0;
      hopper::barrier_arrive(known_at + stage * 8);
    }
    copy_wait<0>();
    return;
  }

  const int g = lane / 4, t = lane % 4;
  uint32_t b[kQuads][kSlices][4][2];
  uint2 parts[R::kAhead ? kQuads : 1][kSlices][4];
  bool fetched = false;
  Place peek = {0, 0};
  int64_t w_now = 0, column_now = -1;
  bool waited = !args.early_reads;
#pragma unroll 1
  for (;;) {
    hopper::barrier_wait(known_at + stage * 8, parity);
    const Item item = items[stage];
    if (item.rows == 0) break;
    const auto fetch = [&](int64_t w, int64_t column) {
      const bool fast = w % 8 == 0 && (kInOut ? args.d_out : args.d_in) % 4 == 0;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        fetch_weights<T, kInOut, kPermuted>(parts[R::kAhead ? q : 0], reinterpret_cast<const T*>(w),
                                            static_cast<int>(args.d_in), args.d_out,
                                            column + warp * R::kWarpWidth + q * 32, fast, lane);
        if constexpr (!R::kAhead) place_weights<kInOut>(b[q], parts[0]);
      }
    };
    if constexpr (R::kAhead) {
      // The weights after those in use, as soon as the item that needs them is known: at the latest this one. The wait
      // behind the test is over at once; it is there for racecheck, which knows waits alone.
      while (!fetched && __all_sync(0xffffffffu, barrier_test(known_at + peek.stage * 8, peek.parity))) {
        hopper::barrier_wait(known_at + peek.stage * 8, peek.parity);
        if (items[peek.stage].rows == 0) break;
        if (items[peek.stage].w != w_now || items[peek.stage].column != column_now) {
          fetch(items[peek.stage].w, items[peek.stage].column);
          fetched = true;
        } else {
          peek.advance(R::kStages);
          if (peek.stage == stage) break;  // all that is known
        }
      }
    }
    if (item.w != w_now || item.column != column_now) {
      w_now = item.w, column_now = item.column;
      if constexpr (R::kAhead) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) place_weights<kInOut>(b[q], parts[q]);
        fetched = false;
        peek = {stage, parity};
        peek.advance(R::kStages);
      } else {
        fetch(w_now, column_now);
      }
    }
    const int64_t column = item.column + warp * R::kWarpWidth;
    if (!waited) {
      grid_dependency_wait<kArch>();
      waited = true;
    }
    hopper::barrier_wait(full_at + stage * 8, parity);
    const uint32_t at = ring + stage * R::kStageBytes;
    float sums[kTiles][kQuads][4][4] = {};
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t a[4];
        const uint32_t x = at + R::kBytesY + m * 16 * R::kPitchX + s * 32;
        if constexpr (kPermuted) {
          const uint2 low = load_shared_8(x + g * R::kPitchX + t * 8);
          const uint2 high = load_shared_8(x + (8 + g) * R::kPitchX + t * 8);
          a[0] = low.x, a[1] = high.x, a[2] = low.y, a[3] = high.y;
        } else {
          load_matrices(a, x + lane % 16 * R::kPitchX + lane / 16 * 16);
        }
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[m][q][j], a, b[q][s][j]);
        }
      }
    }
    uint4 old[kTiles * 2][kQuads];
#pragma unroll
    for (int r = 0; r < kTiles * 2; ++r) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        old[r][q] = load_shared_16(at + (r * 8 + g) * R::kPitchY + (warp * R::kWarpWidth + q * 32 + t * 8) * 2);
      }
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(empty_at + stage * 8);
    advance();
    T* to = static_cast<T*>(args.y) + (item.row + g) * args.y_stride + column + t * 8;
    const int rows = static_cast<int>(item.rows) - g;
#pragma unroll
    for (int r = 0; r < kTiles * 2; ++r) {
      const int h = r % 2 * 2;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const uint4 v = old[r][q];
        const float (&four)[4][4] = sums[r / 2][q];
        if (r * 8 < rows && column + q * 32 + t * 8 < args.d_out) {
          asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + q * 32),
                       "r"(add_pair<T>(v.x, four[0][h], four[1][h])), "r"(add_pair<T>(v.y, four[2][h], four[3][h])),
                       "r"(add_pair<T>(v.z, four[0][h + 1], four[1][h + 1])),
                       "r"(add_pair<T>(v.w, four[2][h + 1], four[3][h + 1]))
                       : "memory");
        }
      }
      to += 8 * args.y_stride;
    }
  }
  if (!waited) grid_dependency_wait<kArch>();
#endif
}

template <class T, bool kInOut, int kSlices, int kQuads, int kTiles>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  using R = Ring<kSlices, kQuads, kTiles>;
  const int blocks = launcher.num_multiprocessors();
  const int64_t strips = (args.d_out + R::kWidth - 1) / R::kWidth;
  // Few rounds of large chunks, as W is not read as often then, but all blocks busy in the last of them, and chunks no
  // longer than segments. A choice that no bit depends on.
  const int64_t tiles = (args.rows + R::kRows - 1) / R::kRows;
  int chunk = 1;
  int64_t least = std::numeric_limits<int64_t>::max();
  const int64_t mean = std::max<int64_t>(args.rows / args.num_segments / R::kRows, 1);
  for (int size = 1; size <= std::min<int64_t>(kMaxChunk, mean); ++size) {
    const int64_t rounds = ((tiles + size - 1) / size * strips + blocks - 1) / blocks;
    const int64_t cost = rounds * (4 * kTiles * size + 2);  // in quarters of 16 rows; two for a change of W
    if (cost <= least) least = cost, chunk = size;
  }
  const int64_t chunks = (max_tiles(args, R::kRows) + chunk - 1) / chunk * strips;
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(std::min<int64_t>(chunks, blocks));
  shape.block = kThreads;
  shape.shared_bytes = static_cast<size_t>(R::kStages * R::kStageBytes);
  return launcher.launch<sgmv_ring_kernel<Arch::kSm90, T, kInOut, kSlices, kQuads, kTiles>>(shape, args, chunk, chunks);
}

template <class T, bool kInOut>
Status launch(const Launcher& launcher, const SgmvArgs& args) {
  if (args.d_in <= 16) return launch<T, kInOut, 1, 2, 1>(launcher, args);
  if (args.d_in <= 32) return launch<T, kInOut, 2, 2, 1>(launcher, args);
  if (args.d_in <= 64) return launch<T, kInOut, 4, 1, 2>(launcher, args);
  return launch<T, kInOut, 8, 1, 2>(launcher, args);
}

}  // namespace

bool is_sgmv_ring(const Launcher& launcher, const SgmvArgs& args) {
  return launcher.arch == Arch::kSm90 && args.d_in <= kMaxIn && args.d_out % 8 == 0 && args.y_aligned &&
         args.x_aligned && args.rows * args.d_out >= kLarge &&
         args.rows >= (args.d_in <= 32 ? 8 : 17) * args.num_segments;
}

Status launch_sgmv_ring(const Launcher& launcher, SgmvWeights weights, DType dtype, const SgmvArgs& args) {
  const bool in_out = weights == SgmvWeights::kInOut;
  if (dtype == DType::kFloat16) {
    return in_out ? launch<__half, true>(launcher, args) : launch<__half, false>(launcher, args);
  }
  return in_out ? launch<__nv_bfloat16, true>(launcher, args) : launch<__nv_bfloat16, false>(launcher, args);
}

}  // namespace punica::cuda
