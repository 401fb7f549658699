// Times dispatch_bgmv alone: graphs of calls over weights, x and y that rotate over more than four times the L2.
// Columns, us a call: `chain`, calls after each other with early_reads; `default`, without; `alone`, each call between
// kernels that are no programmatic dependents (their own time, measured without the calls, is taken off).
// Usage: bgmv_probe [B h_in h_out adapters [offset]]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "benchmarks/cuda/probe.cuh"
#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

__global__ void nothing() {}

__global__ void fill(uint16_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    data[i] = static_cast<uint16_t>(0x3c00 + (i * 2654435761u >> 20) % 512);
  }
}

void probe(int64_t batch, int64_t h_in, int64_t h_out, int64_t adapters, int64_t offset) {
  const int64_t elements = h_in * h_out;
  const int64_t set_bytes = 2 * (adapters * elements + batch * (h_in + h_out));
  const int64_t sets = std::clamp<int64_t>((int64_t{300} << 20) / set_bytes, 4, 1500);
  const int64_t calls = std::max<int64_t>(sets, 60);
  uint16_t *w, *x, *y;
  int64_t *indices, *w_ptr;
  // The sets are the layers of the adapters.
  const size_t w_count = adapters * elements * sets + 16;
  must(cudaMalloc(&w, w_count * 2));
  must(cudaMalloc(&x, batch * h_in * sets * 2));
  must(cudaMalloc(&y, batch * h_out * sets * 2));
  must(cudaMalloc(&indices, batch * 8));
  must(cudaMalloc(&w_ptr, adapters * 8));
  fill<<<1024, 256>>>(w, w_count);
  fill<<<1024, 256>>>(x, batch * h_in * sets);
  fill<<<1024, 256>>>(y, batch * h_out * sets);
  std::vector<int64_t> host_indices(batch), host_ptr(adapters);
  for (int64_t b = 0; b < batch; ++b) host_indices[b] = (b * 37 + 11) % adapters;
  for (int64_t a = 0; a < adapters; ++a) host_ptr[a] = reinterpret_cast<int64_t>(w + a * elements * sets + offset);
  must(cudaMemcpy(indices, host_indices.data(), batch * 8, cudaMemcpyHostToDevice));
  must(cudaMemcpy(w_ptr, host_ptr.data(), adapters * 8, cudaMemcpyHostToDevice));
  must(cudaDeviceSynchronize());

  const auto call = [&](cudaStream_t stream, int64_t i, bool early) {
    const int64_t set = i % sets;
    punica::BgmvParams p;
    p.y = view(y + set * batch * h_out, punica::DType::kBFloat16, {batch, h_out});
    p.x = view(x + set * batch * h_in, punica::DType::kBFloat16, {batch, h_in});
    p.w_ptr = view(w_ptr, punica::DType::kInt64, {adapters});
    p.indices = view(indices, punica::DType::kInt64, {batch});
    p.layer_idx = set;
    p.scale = 1e-3f;
    punica::Context context;
    context.stream = stream;
    context.early_reads = early;
    if (const punica::Status status = punica::cuda::dispatch_bgmv(p, context); !status.ok()) {
      std::printf("%s\n", status.message().c_str());
      std::exit(1);
    }
  };
  const auto chain = [&](bool early) {
    return time_graph([&](cudaStream_t stream) {
             for (int64_t i = 0; i < calls; ++i) call(stream, i, early);
           }) /
           calls;
  };
  const double early = chain(true), standard = chain(false);
  const double pairs = time_graph([&](cudaStream_t stream) {
    for (int64_t i = 0; i < calls; ++i) {
      call(stream, i, false);
      nothing<<<1, 32, 0, stream>>>();
    }
  });
  const double empty = time_graph([&](cudaStream_t stream) {
    for (int64_t i = 0; i < calls; ++i) nothing<<<1, 32, 0, stream>>>();
  });
  const double alone = (pairs - empty) / calls;
  const double bytes = 2.0 * (std::min(adapters, batch) * elements + batch * h_in + 2 * batch * h_out);
  std::printf(
      "%6lld %7lld -> %-7lld %4lld adapters%s | %8.2f %8.2f %8.2f us | %6.2f TB/s in the chain, floor of its bytes "
      "%.2f\n",
      static_cast<long long>(batch), static_cast<long long>(h_in), static_cast<long long>(h_out),
      static_cast<long long>(adapters), offset != 0 ? " unaligned" : "", early, standard, alone, bytes / early * 1e-6,
      bytes / 4.5e6);
  std::fflush(stdout);
  for (void* memory : {static_cast<void*>(w), static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(indices),
                       static_cast<void*>(w_ptr)}) {
    must(cudaFree(memory));
  }
}

// A shrink and the expand that reads what it wrote, in turn: us a call. A kernel that finds no room beside the one
// before it shows here.
void probe_layer(int64_t batch, int64_t adapters, int64_t h, int64_t r) {
  const int64_t sets = std::clamp<int64_t>((int64_t{300} << 20) / (4 * adapters * h * r), 16, 300);
  const int64_t elements = h * r * sets;
  uint16_t *w, *x, *y, *v;
  int64_t *indices, *w_ptr;
  must(cudaMalloc(&w, 2 * adapters * elements * 2));
  must(cudaMalloc(&x, batch * h * sets * 2));
  must(cudaMalloc(&y, batch * h * sets * 2));
  must(cudaMalloc(&v, batch * r * sets * 2));
  must(cudaMalloc(&indices, batch * 8));
  must(cudaMalloc(&w_ptr, 2 * adapters * 8));
  fill<<<1024, 256>>>(w, 2 * adapters * elements);
  fill<<<1024, 256>>>(x, batch * h * sets);
  fill<<<1024, 256>>>(y, batch * h * sets);
  fill<<<1024, 256>>>(v, batch * r * sets);
  std::vector<int64_t> host_indices(batch), host_ptr(2 * adapters);
  for (int64_t b = 0; b < batch; ++b) host_indices[b] = (b * 37 + 11) % adapters;
  for (int64_t a = 0; a < 2 * adapters; ++a) host_ptr[a] = reinterpret_cast<int64_t>(w + a * elements);
  must(cudaMemcpy(indices, host_indices.data(), batch * 8, cudaMemcpyHostToDevice));
  must(cudaMemcpy(w_ptr, host_ptr.data(), 2 * adapters * 8, cudaMemcpyHostToDevice));
  must(cudaDeviceSynchronize());
  const auto chain = [&](bool early) {
    return time_graph([&](cudaStream_t stream) {
             for (int64_t set = 0; set < sets; ++set) {
               for (int half = 0; half < 2; ++half) {
                 punica::BgmvParams p;
                 const auto wide = [&](uint16_t* data) {
                   return view(data + set * batch * h, punica::DType::kBFloat16, {batch, h});
                 };
                 const auto narrow = view(v + set * batch * r, punica::DType::kBFloat16, {batch, r});
                 p.x = half == 0 ? wide(x) : narrow;
                 p.y = half == 0 ? narrow : wide(y);
                 p.w_ptr = view(w_ptr + half * adapters, punica::DType::kInt64, {adapters});
                 p.indices = view(indices, punica::DType::kInt64, {batch});
                 p.layer_idx = set;
                 p.scale = 1e-3f;
                 punica::Context context;
                 context.stream = stream;
                 context.early_reads = early;
                 if (const punica::Status status = punica::cuda::dispatch_bgmv(p, context); !status.ok()) {
                   std::printf("%s\n", status.message().c_str());
                   std::exit(1);
                 }
               }
             }
           }) /
           (2 * sets);
  };
  const double early = chain(true), standard = chain(false);
  std::printf("shrink and expand, mean, B=%lld, %lld adapters, h=%lld, r=%lld: chain %.2f, default %.2f us\n",
              static_cast<long long>(batch), static_cast<long long>(adapters), static_cast<long long>(h),
              static_cast<long long>(r), early, standard);
  for (void* memory : {static_cast<void*>(w), static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(v),
                       static_cast<void*>(indices), static_cast<void*>(w_ptr)}) {
    must(cudaFree(memory));
  }
}

}  // namespace

int main(int argc, char** argv) {
  must(cudaSetDevice(0));
  punica::cuda::Arch arch;
  if (const punica::Status status = punica::cuda::active_arch(0, &arch); !status.ok()) {
    std::printf("%s\n", status.message().c_str());
    return 1;
  }
  std::printf("%s, bfloat16: B, shape, adapters | chain, default, alone\n", punica::cuda::arch_name(arch));
  if (argc >= 5) {
    probe(std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]),
          argc > 5 ? std::atoll(argv[5]) : 0);
    return 0;
  }
  const struct {
    int64_t batch, h, r, adapters, offset;
  } rows[] = {{1, 4096, 16, 1, 0},     {16, 4096, 16, 16, 0},  {64, 4096, 8, 64, 0},      {64, 4096, 16, 64, 0},
              {64, 4096, 16, 1, 0},    {64, 4096, 32, 64, 0},  {64, 4096, 64, 64, 0},     {64, 4096, 128, 64, 0},
              {256, 4096, 16, 256, 0}, {256, 4096, 16, 8, 0},  {256, 4096, 64, 256, 0},   {1, 14336, 16, 1, 0},
              {64, 14336, 16, 64, 0},  {64, 14336, 64, 64, 0}, {1024, 4096, 16, 1024, 0}, {64, 4096, 16, 64, 1},
              {64, 4096, 64, 64, 1},   {64, 4099, 17, 64, 0}};
  for (const auto& row : rows) {
    probe(row.batch, row.h, row.r, row.adapters, row.offset);
    probe(row.batch, row.r, row.h, row.adapters, row.offset);
  }
  for (const auto& row : {rows[0], rows[3], rows[4], rows[6], rows[8], rows[12]}) {
    probe_layer(row.batch, row.adapters, row.h, row.r);
  }
  return 0;
}
