// Times batch_prefill alone, causal, bfloat16, pages of 16 tokens scattered over the cache: microseconds and TFLOP/s.
// Usage: prefill_probe [B kv_len q_len heads kv_heads D [page_size [rope_theta [window_left [soft_cap]]]]]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

using namespace punica;

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void fill(__nv_bfloat16* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = static_cast<uint32_t>(i) * 2654435761u;
    data[i] = __float2bfloat16(static_cast<float>(static_cast<int32_t>(bits ^ bits << 13)) * 0x1p-31f);
  }
}

template <class E>
E* upload(const std::vector<E>& host) {
  E* device;
  must(cudaMalloc(&device, host.size() * sizeof(E)));
  must(cudaMemcpy(device, host.data(), host.size() * sizeof(E), cudaMemcpyHostToDevice));
  return device;
}

TensorView view(void* data, DType dtype, std::vector<int64_t> shape) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = {DeviceType::kCuda, 0};
  v.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = v.rank - 1; i >= 0; --i) v.shape[i] = shape[i], v.stride[i] = stride, stride *= shape[i];
  return v;
}

void probe(int64_t batch, int64_t kv_len, int64_t q_len, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page,
           double theta = 0, int64_t window_left = -1, double cap = 0) {
  const int64_t pages = (kv_len + page - 1) / page, all_pages = pages * batch,
                page_elements = 2 * kv_heads * page * dim;
  const int64_t rows = batch * q_len;
  __nv_bfloat16 *pool, *q, *o;
  must(cudaMalloc(&pool, all_pages * page_elements * 2));
  must(cudaMalloc(&q, rows * heads * dim * 2));
  must(cudaMalloc(&o, rows * heads * dim * 2));
  fill<<<2000, 256>>>(pool, all_pages * page_elements);
  fill<<<2000, 256>>>(q, rows * heads * dim);
  std::vector<int64_t> order(all_pages), ptrs;
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  for (const int64_t i : order) ptrs.push_back(reinterpret_cast<int64_t>(pool + i * page_elements));
  std::vector<int32_t> kv_indptr, qo_indptr, last(batch, static_cast<int32_t>(kv_len - (pages - 1) * page));
  for (int64_t i = 0; i <= batch; ++i) {
    kv_indptr.push_back(static_cast<int32_t>(i * pages));
    qo_indptr.push_back(static_cast<int32_t>(i * q_len));
  }
  BatchPrefillParams p;
  p.kv.kv_ptrs = view(upload(ptrs), DType::kInt64, {all_pages});
  p.kv.kv_indptr = view(upload(kv_indptr), DType::kInt32, {batch + 1});
  p.kv.last_page_offset = view(upload(last), DType::kInt32, {batch});
  p.kv.num_layers = 1, p.kv.num_kv_heads = kv_heads, p.kv.page_size = page;
  if (theta > 0) p.rope_theta = theta;
  p.window_left = window_left;
  p.logits_soft_cap = cap;
  p.q = view(q, DType::kBFloat16, {rows, heads, dim});
  p.o = view(o, DType::kBFloat16, {rows, heads, dim});
  p.qo_indptr = view(upload(qo_indptr), DType::kInt32, {batch + 1});
  if (const int64_t bytes = cuda::workspace_bytes(p); bytes > 0) {
    void* tmpbuf;
    must(cudaMalloc(&tmpbuf, bytes));
    p.tmpbuf = view(tmpbuf, DType::kUInt8, {bytes});
  }
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  constexpr int kCalls = 4;
  for (int i = 0; i < 12; ++i) {
    must(cudaEventRecord(begin));
    for (int j = 0; j < kCalls; ++j) {
      if (const Status status = cuda::batch_prefill(p, {}); !status.ok()) {
        std::printf("%s\n", status.message().c_str());
        std::exit(1);
      }
    }
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    float ms;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms * 1000 / kCalls);
  }
  std::sort(times.begin(), times.end());
  const double us = times[times.size() / 2];
  // Causal: query j sees kv_len - q_len + j + 1 keys.
  const double seen = static_cast<double>(q_len) * static_cast<double>(kv_len - q_len) + q_len * (q_len + 1) / 2.0;
  const double flops = 4.0 * static_cast<double>(batch * heads * dim) * seen;
  std::printf("B=%lld kv=%lld q=%lld %lld/%lld D=%lld P=%lld: %.1f us, %.0f TFLOP/s, %.2f TB/s of keys and values\n",
              (long long)batch, (long long)kv_len, (long long)q_len, (long long)heads, (long long)kv_heads,
              (long long)dim, (long long)page, us, flops / us * 1e-6,
              4.0 * static_cast<double>(batch * kv_heads * dim * kv_len) / us * 1e-6);
  std::fflush(stdout);
  must(cudaFree(pool));
  must(cudaFree(q));
  must(cudaFree(o));
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  if (argc > 6) {
    probe(number(1, 0), number(2, 0), number(3, 0), number(4, 0), number(5, 0), number(6, 0), number(7, 16),
          static_cast<double>(number(8, 0)), number(9, -1), static_cast<double>(number(10, 0)));
    return 0;
  }
  for (const int64_t dim : {128, 64}) {
    probe(16, 1024, 1024, 32, 8, dim, 16);
    probe(4, 4096, 4096, 32, 8, dim, 16);
    probe(1, 16384, 16384, 32, 8, dim, 16);
  }
  probe(1, 32768, 512, 32, 8, 128, 16);
  probe(1, 32768, 4, 32, 8, 128, 16);
  probe(1, 32768, 16, 32, 8, 128, 16);
  probe(4, 4096, 4096, 32, 8, 128, 1);
  for (int d : {64, 128}) {
    probe(16, 1024, 1024, 32, 8, d, 128);
    probe(4, 4096, 4096, 32, 8, d, 128);
    probe(1, 16384, 16384, 32, 8, d, 128);
  }
}
