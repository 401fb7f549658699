// add_lora of float32, with ordinary multiply-adds.
//
// A block takes a tile of up to eight rows and a share of the outputs. It computes v of all ranks: a warp takes a rank,
// lane l of it the elements 4 (l + 32 i) .. + 3 of K, i = 0, 1, ..., in this order; the lanes' sums are added by a
// butterfly. Then a thread takes an output and adds up its ranks in order. Blocks that share a tile compute the same v.
#include <algorithm>

#include "src/cuda/lora/add_lora.cuh"

namespace punica::cuda::fused_lora {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

__host__ __device__ constexpr int float_pitch(int max_rank) { return (max_rank + 3) / 4 * 4; }

// Four floats, zeros from `count` on.
__device__ __forceinline__ float4 load_floats(const float* from, int count, bool vectors) {
  if (vectors && count >= 4) return *reinterpret_cast<const float4*>(from);
  float4 r = {0, 0, 0, 0};
  if (count > 0) r.x = from[0];
  if (count > 1) r.y = from[1];
  if (count > 2) r.z = from[2];
  if (count > 3) r.w = from[3];
  return r;
}

// Grid: (tiles, shares of the outputs).
template <Arch kArch>
__global__ void __launch_bounds__(kThreads) add_lora_float_kernel(const __grid_constant__ Args args) {
  if constexpr (kCompiled<kArch>) {
    extern __shared__ __align__(16) float v[];  // [row][rank]
    __shared__ Work<kTileRows> work;
    __shared__ TileScratch<kWarps> scratch;
    launch_dependents<kArch>();
    if (!args.early_reads) grid_dependency_wait<kArch>();
    find_work<float>(args, &scratch, &work, [&](uint32_t) { return blockIdx.x; });
    if (args.early_reads) grid_dependency_wait<kArch>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = work.count;
    if (count == 0) return;
    const int pitch = float_pitch(args.max_rank), h_in = args.h_in;
    const float* x[kTileRows];
#pragma unroll
    for (int n = 0; n < kTileRows; ++n) {
      x[n] = static_cast<const float*>(args.x) + work.rows[n < count ? n : 0] * args.x_stride;
    }
    for (int i = 0; i < work.num_slices; ++i) {
      const Slice& s = work.slices[i];
      const bool a_vectors = reinterpret_cast<uintptr_t>(s.a) % 16 == 0 && h_in % 4 == 0;
      for (int rank = warp; rank < s.rank; rank += kWarps) {
        const float* const a = static_cast<const float*>(s.a) + int64_t{rank} * h_in;
        float sum[kTileRows] = {};
        for (int k = 4 * lane; k < h_in; k += 128) {
          const float4 w = load_floats(a + k, h_in - k, a_vectors);
#pragma unroll
          for (int n = 0; n < kTileRows; ++n) {
            if (n < count) {
              const float4 e = load_floats(x[n] + k, h_in - k, args.x_vectors);
              sum[n] = fmaf(w.w, e.w, fmaf(w.z, e.z, fmaf(w.y, e.y, fmaf(w.x, e.x, sum[n]))));
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kTileRows; ++n) {
          sum[n] = warp_sum(sum[n]);
          if (lane == 0 && n < count) v[n * pitch + rank] = sum[n];
        }
      }
      __syncthreads();
      const bool b_vectors = reinterpret_cast<uintptr_t>(s.b) % 16 == 0 && s.b_stride % 4 == 0;
      for (int64_t m = int64_t{blockIdx.y} * kThreads + threadIdx.x; m < s.width; m += int64_t{gridDim.y} * kThreads) {
        const float* const b = static_cast<const float*>(s.b) + m * s.b_stride;
        float sum[kTileRows] = {};
        for (int rank = 0; rank < s.rank; rank += 4) {
          const float4 w = load_floats(b + rank, s.rank - rank, b_vectors);
          const float of_b[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (rank + e < s.rank) {
#pragma unroll
              for (int n = 0; n < kTileRows; ++n) {
                if (n < count) sum[n] = fmaf(of_b[e], v[n * pitch + rank + e], sum[n]);
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kTileRows; ++n) {
          if (n < count) {
            float* const y = static_cast<float*>(args.y) + work.rows[n] * args.y_stride + s.begin + m;
            *y = fmaf(s.scale, sum[n], *y);
          }
        }
      }
      __syncthreads();
    }
  }
}

template <Arch kArch>
Status launch(const Launcher& launcher, const Args& args) {
  const int64_t tiles = max_tiles(args, kTileRows);
  LaunchShape shape;
  // A choice that no bit depends on: shares for about two blocks a multiprocessor.
  shape.grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(std::clamp<int64_t>(264 / tiles, 1, 16)));
  shape.block = kThreads;
  shape.shared_bytes = sizeof(float) * kTileRows * float_pitch(args.max_rank);
  return launcher.launch<add_lora_float_kernel<kArch>>(shape, args);
}

}  // namespace

Status launch_float32(const Launcher& launcher, const Args& args) {
  return launcher.arch == Arch::kSm90 ? launch<Arch::kSm90>(launcher, args) : launch<Arch::kSm80>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
