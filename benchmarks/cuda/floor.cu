// What a kernel costs that only moves bytes: the floors of benchmarks/bench_cuda.py, which loads this as a library.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__device__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Reads num_read vectors, then reads and writes num_update ones. `early`: the first before griddepcontrol.wait.
template <int kUnroll>
__global__ void move_bytes(const uint4* read, int64_t num_read, uint4* update, int64_t num_update, unsigned* out,
                           bool early) {
  asm volatile("griddepcontrol.launch_dependents;");
  if (!early) asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  unsigned sum = 0;
  int64_t i = first;
  for (; i + (kUnroll - 1) * stride < num_read; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_once(read + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < num_read; i += stride) {
    const uint4 v = load_once(read + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (early) asm volatile("griddepcontrol.wait;" ::: "memory");
  i = first;
  for (; i + (kUnroll - 1) * stride < num_update; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = update[i + u * stride];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      v[u].x += 1;
      update[i + u * stride] = v[u];
    }
  }
  for (; i < num_update; i += stride) {
    uint4 v = update[i];
    v.x += 1;
    update[i] = v;
  }
  if (sum == 0x12345678u) *out = sum;  // never, in practice: keeps the loads
}

template <int kUnroll>
__global__ void copy_bytes(const uint4* from, uint4* to, int64_t count) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = from[i + u * stride];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) to[i + u * stride] = v[u];
  }
  for (; i < count; i += stride) to[i] = from[i];
}

__global__ void do_nothing() {}

cudaError_t launch(void (*kernel)(const uint4*, int64_t, uint4*, int64_t, unsigned*, bool), int grid, int threads,
                   bool dependent, cudaStream_t stream, const void* read, int64_t num_read, void* update,
                   int64_t num_update, void* out, bool early) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const uint4*>(read), num_read, static_cast<uint4*>(update),
                            num_update, static_cast<unsigned*>(out), early);
}

}  // namespace

// mode 0: an ordinary launch; 1: a dependent launch that waits first; 2: a dependent launch that reads first.
extern "C" int punica_floor_move(const void* read, int64_t read_bytes, void* update, int64_t update_bytes, void* out,
                                 int grid, int threads, int unroll, int mode, void* stream) {
  const auto kernel = unroll == 1 ? move_bytes<1> : unroll == 4 ? move_bytes<4> : move_bytes<8>;
  return launch(kernel, grid, threads, mode != 0, static_cast<cudaStream_t>(stream), read, read_bytes / 16, update,
                update_bytes / 16, out, mode == 2);
}

extern "C" int punica_floor_copy(const void* from, void* to, int64_t bytes, int grid, int threads, int unroll,
                                 bool dependent, void* stream) {
  const auto kernel = unroll == 1 ? copy_bytes<1> : unroll == 4 ? copy_bytes<4> : copy_bytes<8>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const uint4*>(from), static_cast<uint4*>(to), bytes / 16);
}

// Launches an empty kernel `count` times, as a programmatic dependent or plainly: what a launch costs its thread,
// without Python.
extern "C" int punica_floor_launches(int count, bool dependent, void* stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 32;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  for (int i = 0; i < count; ++i) {
    if (const cudaError_t error = cudaLaunchKernelEx(&config, do_nothing); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
