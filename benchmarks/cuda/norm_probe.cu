// Times rms_norm's kernel in other shapes than the one that norm.cu chooses: threads a row, chunks a thread, streaming
// or not; launched one after another and as programmatic dependents. Beside it a copy of the same bytes.
//
// bfloat16, CUDA graphs of many launches, each on the next part of 512 MB with a weight of its own; before a replay the
// second-level cache is filled with something else, so all comes from memory. The median of the replays, in
// microseconds a launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "src/cuda/norm/norm_kernels.cuh"

namespace {

using punica::cuda::Arch;
using T = __nv_bfloat16;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void copy_kernel(uint4* to, const uint4* from, int64_t count) {
  constexpr int kUnroll = 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * kUnroll + threadIdx.x;
  uint4 values[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * blockDim.x < count) values[i] = __ldcs(from + first + i * blockDim.x);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * blockDim.x < count) __stcs(to + first + i * blockDim.x, values[i]);
  }
}

__global__ void read_kernel(const uint4* from, int64_t count, uint4* to) {
  uint4 sum = {};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < count; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint4 value = __ldcs(from + i);
    sum.x ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum.x == 0x12345678u) *to = sum;  // never, in practice: keeps the loads
}

constexpr int64_t kPool = int64_t{512} << 20;  // bytes
char* g_other = nullptr;                       // kPool of them, which no launch touches

// Microseconds a launch; launch(i) is the i-th of `count`.
double time_of(int count, const std::function<void(cudaStream_t, int)>& launch) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < count; ++i) launch(stream, i);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int repeat = 0; repeat < 11; ++repeat) {
    read_kernel<<<528, 512, 0, stream>>>(reinterpret_cast<const uint4*>(g_other), kPool / 16,
                                         reinterpret_cast<uint4*>(g_other));
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(stop, stream));
    check(cudaEventSynchronize(stop));
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, start, stop));
    if (repeat > 1) times.push_back(elapsed);
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2] / count;
}

struct Problem {
  int64_t rows, columns;
  char *in, *out, *weight;  // kPool bytes behind each
  int launches;

  int64_t bytes() const { return rows * columns * 2; }
  char* turn(char* base, int i) const { return base + (i * bytes()) % (kPool - bytes() + 1) / 256 * 256; }
};

template <int kThreads, int kChunks, bool kStreaming>
void probe(const Problem& p) {
  if (kThreads * kChunks * 8 < p.columns) return;
  constexpr int kRowsPerBlock = kThreads < 128 ? 128 / kThreads : 1;
  double times[2];
  for (int dependent = 0; dependent < 2; ++dependent) {
    times[dependent] = time_of(p.launches, [&](cudaStream_t stream, int i) {
      punica::cuda::norm::Args args = {};
      args.output = p.turn(p.out, i);
      args.input = p.turn(p.in, i);
      args.weight = p.weight + i * p.columns * 2;
      args.output_stride = args.input_stride = p.columns;
      args.rows = p.rows;
      args.columns = p.columns;
      args.inverse_columns = 1.0f / static_cast<float>(p.columns);
      args.epsilon = 1e-5f;
      cudaLaunchAttribute attribute;
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = static_cast<unsigned>((p.rows + kRowsPerBlock - 1) / kRowsPerBlock);
      config.blockDim = kThreads * kRowsPerBlock;
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = dependent;
      check(cudaLaunchKernelEx(
          &config, punica::cuda::norm::rms_norm_in_registers<Arch::kSm90, T, kThreads, kChunks, kStreaming>, args));
    });
  }
  std::printf("%6lld x %5lld  %4d x %d %-9s  %8.3f  %8.3f us   %.3f TB/s\n", static_cast<long long>(p.rows),
              static_cast<long long>(p.columns), kThreads, kChunks, kStreaming ? "streaming" : "", times[0], times[1],
              2e-6 * static_cast<double>(p.bytes()) / std::min(times[0], times[1]));
}

template <bool kStreaming>
void probe_all(const Problem& p) {
  probe<32, 4, kStreaming>(p);
  probe<128, 2, kStreaming>(p);
  probe<128, 4, kStreaming>(p);
  probe<128, 8, kStreaming>(p);
  probe<256, 1, kStreaming>(p);
  probe<256, 2, kStreaming>(p);
  probe<256, 4, kStreaming>(p);
  probe<512, 1, kStreaming>(p);
  probe<512, 2, kStreaming>(p);
  probe<1024, 1, kStreaming>(p);
}

}  // namespace

int main() {
  Problem p = {};
  for (char** memory : {&p.in, &p.out, &p.weight, &g_other}) {
    check(cudaMalloc(memory, kPool));
    check(cudaMemset(*memory, 1, kPool));
  }
  std::printf("   rows x columns  threads x chunks    plain   dependent\n");
  const struct {
    int64_t rows, columns;
  } sizes[] = {{16384, 4096}, {8192, 8192}, {256, 4096}, {1, 4096}, {1, 576}, {256, 576}};
  for (const auto& size : sizes) {
    p.rows = size.rows;
    p.columns = size.columns;
    p.launches = size.rows > 4096 ? 20 : 240;
    const double copied = time_of(p.launches, [&](cudaStream_t stream, int i) {
      const int64_t count = p.bytes() / 16;
      copy_kernel<<<static_cast<unsigned>((count + 1023) / 1024), 256, 0, stream>>>(
          reinterpret_cast<uint4*>(p.turn(p.out, i)), reinterpret_cast<const uint4*>(p.turn(p.in, i)), count);
    });
    std::printf("%6lld x %5lld  copy %32.2f us %27.3f TB/s\n", static_cast<long long>(p.rows),
                static_cast<long long>(p.columns), copied, 2e-6 * static_cast<double>(p.bytes()) / copied);
    probe_all<false>(p);
    probe_all<true>(p);
  }
  return 0;
}
