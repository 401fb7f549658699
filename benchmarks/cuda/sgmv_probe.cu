// Times sgmv on a GPU: graphs of calls that take turns over buffers of more than four times the L2 cache, so that each
// call finds a cold cache. Beside them, in the same harness, a kernel that does nothing but read x, and one that does
// nothing but add one to y: the floor.
//
//   sgmv_probe [early]     early: with early_reads
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

using punica::Context;
using punica::DeviceType;
using punica::DType;
using punica::SgmvParams;
using punica::SgmvWeights;
using punica::TensorView;

#define CHECK_CUDA(call)                                                                     \
  do {                                                                                       \
    const cudaError_t check_error = (call);                                                  \
    if (check_error != cudaSuccess) {                                                        \
      std::printf("FATAL %s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(check_error)); \
      std::exit(2);                                                                          \
    }                                                                                        \
  } while (false)

__global__ void read_floor(const uint4* from, int64_t count, unsigned* sink) {
  unsigned all = 0;
  for (int64_t i = blockIdx.x * int64_t{1024} + threadIdx.x; i < count; i += int64_t{gridDim.x} * 1024) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = i + j * 256 < count ? __ldcs(from + i + j * 256) : uint4{};
#pragma unroll
    for (int j = 0; j < 4; ++j) all |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (all == 0x12345678u) *sink = all;
}

__global__ void update_floor(uint4* at, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{1024} + threadIdx.x; i < count; i += int64_t{gridDim.x} * 1024) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = i + j * 256 < count ? at[i + j * 256] : uint4{};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j].x += 1;
      if (i + j * 256 < count) at[i + j * 256] = v[j];
    }
  }
}

constexpr int64_t kTurnBytes = int64_t{300} << 20;  // more than four times an H200's 60 MiB

struct Case {
  SgmvWeights weights;
  int64_t d_in, d_out, rows, segments;
  double goal;  // us, 0: none
  DType dtype = DType::kBFloat16;
  int64_t shift = 0;  // elements that tensors are off alignment
};

template <class Body>
double time_us(cudaStream_t stream, int turns, Body body) {
  const int per_graph = std::max(turns, 40 / turns * turns);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < per_graph; ++i) body(i % turns);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, end;
  CHECK_CUDA(cudaEventCreate(&start));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 12; ++i) {
    CHECK_CUDA(cudaEventRecord(start, stream));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, start, end));
    if (i >= 2) times.push_back(ms * 1e3 / per_graph);
  }
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaEventDestroy(start));
  CHECK_CUDA(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

TensorView view(void* data, DType dtype, std::vector<int64_t> shape) {
  TensorView v;
  v.data = data, v.dtype = dtype, v.device = {DeviceType::kCuda, 0}, v.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = v.rank - 1; i >= 0; --i) v.shape[i] = shape[i], v.stride[i] = stride, stride *= shape[i];
  return v;
}

void run(const Case& c, bool early, cudaStream_t stream, char* pool, int64_t pool_bytes, unsigned* sink) {
  const int64_t item = static_cast<int64_t>(punica::dtype_size(c.dtype));
  const auto round = [](int64_t bytes) { return (bytes + 255 + 64) / 256 * 256; };
  const int64_t x_bytes = round(c.rows * c.d_in * item), y_bytes = round(c.rows * c.d_out * item);
  const int64_t w_bytes = round(c.d_in * c.d_out * item), table_bytes = round(c.segments * 16);
  const int64_t turn_bytes = x_bytes + y_bytes + c.segments * w_bytes + table_bytes;
  const int turns = static_cast<int>(std::clamp<int64_t>(kTurnBytes / turn_bytes + 1, 3, 200));
  if (turn_bytes * turns > pool_bytes) {
    std::printf("case too large\n");
    return;
  }
  std::vector<SgmvParams> params;
  std::vector<char*> xs, ys;
  char* at = pool;
  for (int t = 0; t < turns; ++t) {
    char* x = at;
    char* y = x + x_bytes;
    char* w = y + y_bytes;
    char* table = w + c.segments * w_bytes;
    at = table + table_bytes;
    std::vector<int64_t> w_ptr;
    std::vector<int32_t> bounds;
    for (int64_t i = 0; i < c.segments; ++i)
      w_ptr.push_back(reinterpret_cast<int64_t>(w + i * w_bytes + c.shift * item));
    for (int64_t i = 0; i < c.segments; ++i) bounds.push_back(static_cast<int32_t>(c.rows * i / c.segments));
    for (int64_t i = 0; i < c.segments; ++i) bounds.push_back(static_cast<int32_t>(c.rows * (i + 1) / c.segments));
    CHECK_CUDA(cudaMemcpy(table, w_ptr.data(), w_ptr.size() * 8, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(table + c.segments * 8, bounds.data(), bounds.size() * 4, cudaMemcpyHostToDevice));
    SgmvParams p;
    p.weights = c.weights;
    p.x = view(x + c.shift * item, c.dtype, {c.rows, c.d_in});
    p.y = view(y + c.shift * item, c.dtype, {c.rows, c.d_out});
    p.w_ptr = view(table, DType::kInt64, {c.segments});
    p.s_start = view(table + c.segments * 8, DType::kInt32, {c.segments});
    p.s_end = view(table + c.segments * 12, DType::kInt32, {c.segments});
    params.push_back(p);
    xs.push_back(x), ys.push_back(y);
  }
  Context context;
  context.stream = stream;
  context.early_reads = early;
  const double us = time_us(stream, turns, [&](int t) {
    const punica::Status status = punica::cuda::sgmv(params[t], context);
    if (!status.ok()) {
      std::printf("FATAL %s\n", status.message().c_str());
      std::exit(2);
    }
  });
  const auto blocks = [](int64_t count) {
    return static_cast<unsigned>(std::clamp<int64_t>((count + 1023) / 1024, 1, 1056));
  };
  const double read = time_us(stream, turns, [&](int t) {
    const int64_t count = x_bytes / 16;
    read_floor<<<blocks(count), 256, 0, stream>>>(reinterpret_cast<const uint4*>(xs[t]), count, sink);
  });
  const double update = time_us(stream, turns, [&](int t) {
    const int64_t count = y_bytes / 16;
    update_floor<<<blocks(count), 256, 0, stream>>>(reinterpret_cast<uint4*>(ys[t]), count);
  });
  const double bytes =
      c.rows * (c.d_in + 2.0 * c.d_out) * item + c.segments * c.d_in * c.d_out * static_cast<double>(item);
  const std::string goal = c.goal > 0 ? std::to_string(c.goal).substr(0, 5) : "-";
  std::printf(
      "%-8s %-12s %6lld -> %6lld  rows %5lld segments %5lld shift %lld %9.2f us  goal %5s  %6.2f TB/s  read x %7.2f  "
      "update y %7.2f\n",
      punica::dtype_name(c.dtype), c.weights == SgmvWeights::kInOut ? "sgmv_cutlass" : "sgmv_shrink",
      static_cast<long long>(c.d_in), static_cast<long long>(c.d_out), static_cast<long long>(c.rows),
      static_cast<long long>(c.segments), static_cast<long long>(c.shift), us, goal.c_str(), bytes / us * 1e-6, read,
      update);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const bool early = argc > 1 && std::strcmp(argv[1], "early") == 0;
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  const int64_t pool_bytes = int64_t{4} << 30;
  char* pool;
  unsigned* sink;
  CHECK_CUDA(cudaMalloc(&pool, pool_bytes));
  CHECK_CUDA(cudaMalloc(&sink, sizeof(unsigned)));
  CHECK_CUDA(cudaMemset(pool, 0, pool_bytes));
  constexpr SgmvWeights kShrink = SgmvWeights::kOutIn, kExpand = SgmvWeights::kInOut;
  std::vector<Case> cases = {
      {kShrink, 4096, 16, 4096, 1, 10.5}, {kShrink, 4096, 16, 4096, 8, 10.5}, {kShrink, 4096, 16, 4096, 64, 12},
      {kExpand, 16, 4096, 4096, 1, 20},   {kExpand, 16, 4096, 4096, 8, 20},   {kExpand, 16, 4096, 4096, 64, 22},
      {kShrink, 4096, 64, 4096, 8, 11.5}, {kExpand, 64, 4096, 4096, 8, 21},   {kShrink, 14336, 16, 4096, 8, 31},
      {kExpand, 16, 14336, 4096, 8, 66},
  };
  for (const int64_t rows : {1, 16, 64, 256, 1024}) {
    for (const int64_t segments : {int64_t{1}, rows}) {
      cases.push_back({kShrink, 4096, 16, rows, segments, 0});
      cases.push_back({kExpand, 16, 4096, rows, segments, 0});
      if (rows == 1) break;
    }
  }
  for (const int64_t rank : {1, 8, 32, 128, 256, 512}) {
    cases.push_back({kShrink, 4096, rank, 4096, 8, 0});
    cases.push_back({kExpand, rank, 4096, 4096, 8, 0});
  }
  cases.push_back({kExpand, 4096, 16, 4096, 8, 0});
  cases.push_back({kShrink, 16, 4096, 4096, 8, 0});
  cases.push_back({kShrink, 4096, 4096, 1024, 8, 0});
  for (const int64_t shift : {1, 2}) {
    cases.push_back({kShrink, 4096, 16, 4096, 8, 0, DType::kBFloat16, shift});
    cases.push_back({kExpand, 16, 4096, 4096, 8, 0, DType::kBFloat16, shift});
  }
  cases.push_back({kShrink, 4099, 16, 4096, 8, 0});
  cases.push_back({kExpand, 16, 4099, 4096, 8, 0});
  cases.push_back({kShrink, 4096, 16, 4096, 8, 0, DType::kFloat32});
  cases.push_back({kExpand, 16, 4096, 4096, 8, 0, DType::kFloat32});
  cases.push_back({kShrink, 4096, 64, 4096, 8, 0, DType::kFloat32});
  for (const Case& c : cases) run(c, early, stream, pool, pool_bytes, sink);
  const char* arch = punica::cuda::last_arch();
  std::printf("%s%s\n", arch == nullptr ? "?" : arch, early ? ", early reads" : "");
  return 0;
}
