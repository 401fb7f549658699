// What the probes share: errors, views, and the time of a graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "punica/status.h"
#include "punica/types.h"

inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

inline void must(const punica::Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message().c_str());
  std::exit(1);
}

inline punica::TensorView view(void* data, punica::DType dtype, std::vector<int64_t> shape) {
  punica::TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = {punica::DeviceType::kCuda, 0};
  v.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = v.rank - 1; i >= 0; --i) {
    v.shape[i] = shape[i];
    v.stride[i] = stride;
    stride *= shape[i];
  }
  return v;
}

// Median microseconds of a graph of what `record` puts into the stream, over all runs but the first `warm_up`.
inline double time_graph(const std::function<void(cudaStream_t)>& record, int runs = 15, int warm_up = 3) {
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record(stream);
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < runs; ++i) {
    must(cudaEventRecord(begin, stream));
    must(cudaGraphLaunch(exec, stream));
    must(cudaEventRecord(end, stream));
    must(cudaEventSynchronize(end));
    float ms;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= warm_up) times.push_back(ms * 1000);
  }
  std::sort(times.begin(), times.end());
  must(cudaGraphExecDestroy(exec));
  must(cudaGraphDestroy(graph));
  must(cudaStreamDestroy(stream));
  return times[times.size() / 2];
}
