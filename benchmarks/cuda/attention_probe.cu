// Times batch_decode, append_kv and init_kv alone: graphs of calls over layers of a cache that rotate over more than
// four times the L2, pages scattered. Columns, us a call: `chain`, calls after each other with early_reads; `default`,
// without; `alone`, each call between kernels that are no programmatic dependents (their own time, measured without the
// calls, is taken off). Beside them TB/s of the bytes of keys and values, and what a kernel takes that only reads so
// many bytes from one place. Usage: attention_probe [goals | decode | write | all] [part of the names of the rows]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "benchmarks/cuda/probe.cuh"
#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

__global__ void nothing() {}

__global__ void fill(uint16_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = static_cast<uint32_t>(i * 2654435761u >> 7);
    data[i] = static_cast<uint16_t>((bits & 0x8000) | (0x3f00 + bits % 128));
  }
}

template <int kUnroll>
__global__ void read_bytes(const uint4* from, int64_t count, unsigned* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  unsigned sum = 0;
  const auto load_once = [](const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
  };
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_once(from + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < count; i += stride) sum ^= load_once(from + i).x;
  if (sum == 0x12345678u) *out = sum;  // never, in practice: keeps the loads
}

// Median microseconds of a graph of what `record` puts into the stream.
double time_few_runs(const std::function<void(cudaStream_t)>& record) { return time_graph(record, 11, 2); }

template <class To>
void launch_dependent(cudaStream_t stream, int grid, int threads, void (*kernel)(const uint4*, int64_t, To*),
                      const uint4* from, int64_t count, To* out) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  must(cudaLaunchKernelEx(&config, kernel, from, count, out));
}

// The quickest way of those tried to read `bytes`, in a rotation over `pool`, us.
double read_floor(const uint4* pool, int64_t pool_bytes, int64_t bytes, unsigned* out) {
  const int64_t turns = std::max<int64_t>(1, pool_bytes / bytes);
  const int calls = static_cast<int>(std::max<int64_t>(turns, 4));
  double best = 1e30;
  for (const int threads : {512, 1024}) {
    for (const int blocks : {132, 264, 528, 1056}) {
      if (blocks * threads > 132 * 2048 * 4) continue;
      for (const int unroll : {4, 8}) {
        best =
            std::min(best, time_few_runs([&](cudaStream_t stream) {
                             for (int i = 0; i < calls; ++i) {
                               launch_dependent(stream, blocks, threads, unroll == 4 ? &read_bytes<4> : &read_bytes<8>,
                                                pool + i % turns * (bytes / 16), bytes / 16, out);
                             }
                           }) / calls);
      }
    }
  }
  return best;
}

struct Work {
  std::string name;
  std::vector<int64_t> lengths;
  int64_t heads, kv_heads, dim, page_size;
  double goal;  // us, 0: none
  double rope = 0;
  int64_t window = -1;
};

std::string only;  // part of the names of the rows to run

struct Arena {
  unsigned char* pool;
  int64_t pool_bytes;
  unsigned* out;
};

struct Problem {
  int64_t batch, pages = 0, tokens = 0, layers, layer_bytes;
  int64_t* ptrs;
  int32_t *indptr, *last;
  uint16_t *q, *o;
  void* tmpbuf;
  int64_t tmp_bytes = 0;

  Problem(const Work& w, const Arena& arena) {
    batch = static_cast<int64_t>(w.lengths.size());
    std::vector<int32_t> host_indptr = {0}, host_last;
    for (const int64_t n : w.lengths) {
      const int64_t p = (n + w.page_size - 1) / w.page_size;
      host_indptr.push_back(host_indptr.back() + static_cast<int32_t>(p));
      host_last.push_back(static_cast<int32_t>(n == 0 ? 1 : n - (p - 1) * w.page_size));
      pages += p;
      tokens += n;
    }
    layer_bytes = 2 * w.kv_heads * w.page_size * w.dim * 2;
    layers = std::clamp<int64_t>((int64_t{320} << 20) / std::max<int64_t>(1, pages * layer_bytes) + 1, 1, 400);
    if (pages * layers * layer_bytes > arena.pool_bytes) layers = arena.pool_bytes / (pages * layer_bytes);
    if (layers == 0) {
      std::printf("%s: the pool is too small\n", w.name.c_str());
      std::exit(1);
    }
    std::vector<int64_t> order(pages), host_ptrs(pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    for (int64_t i = 0; i < pages; ++i) {
      host_ptrs[i] = reinterpret_cast<int64_t>(arena.pool + order[i] * layers * layer_bytes);
    }
    must(cudaMalloc(&ptrs, std::max<int64_t>(pages, 1) * 8));
    must(cudaMalloc(&indptr, (batch + 1) * 4));
    must(cudaMalloc(&last, batch * 4));
    must(cudaMalloc(&q, batch * w.heads * w.dim * 2));
    must(cudaMalloc(&o, batch * w.heads * w.dim * 2));
    must(cudaMemcpy(ptrs, host_ptrs.data(), pages * 8, cudaMemcpyHostToDevice));
    must(cudaMemcpy(indptr, host_indptr.data(), (batch + 1) * 4, cudaMemcpyHostToDevice));
    must(cudaMemcpy(last, host_last.data(), batch * 4, cudaMemcpyHostToDevice));
    fill<<<1024, 256>>>(q, batch * w.heads * w.dim);
    tmp_bytes = punica::cuda::workspace_bytes(params(w, 0));
    must(cudaMalloc(&tmpbuf, tmp_bytes + 16));
    must(cudaDeviceSynchronize());
  }
  ~Problem() {
    for (void* memory : {static_cast<void*>(ptrs), static_cast<void*>(indptr), static_cast<void*>(last),
                         static_cast<void*>(q), static_cast<void*>(o), tmpbuf}) {
      must(cudaFree(memory));
    }
  }
  punica::PagedKv kv(const Work& w, int64_t layer) const {
    punica::PagedKv kv;
    kv.kv_ptrs = view(ptrs, punica::DType::kInt64, {pages});
    kv.kv_indptr = view(indptr, punica::DType::kInt32, {batch + 1});
    kv.last_page_offset = view(last, punica::DType::kInt32, {batch});
    kv.num_layers = layers;
    kv.layer_idx = layer;
    kv.num_kv_heads = w.kv_heads;
    kv.page_size = w.page_size;
    return kv;
  }
  punica::BatchDecodeParams params(const Work& w, int64_t layer) const {
    punica::BatchDecodeParams p;
    p.kv = kv(w, layer);
    p.q = view(q, punica::DType::kBFloat16, {batch, w.heads, w.dim});
    p.o = view(o, punica::DType::kBFloat16, {batch, w.heads, w.dim});
    if (tmp_bytes > 0) p.tmpbuf = view(tmpbuf, punica::DType::kUInt8, {tmp_bytes});
    if (w.rope > 0) p.rope_theta = w.rope;
    p.window_left = w.window;
    return p;
  }
};

// Graphs of `calls` calls: chained with early_reads, chained, alone.
struct Times {
  double early, standard, alone;
};
Times time_calls(int64_t calls, const std::function<void(cudaStream_t, int64_t, bool)>& call) {
  const auto chain = [&](bool early) {
    return time_few_runs([&](cudaStream_t stream) {
             for (int64_t i = 0; i < calls; ++i) call(stream, i, early);
           }) /
           static_cast<double>(calls);
  };
  Times times;
  times.early = chain(true);
  times.standard = chain(false);
  const double pairs = time_few_runs([&](cudaStream_t stream) {
    for (int64_t i = 0; i < calls; ++i) {
      call(stream, i, false);
      nothing<<<1, 32, 0, stream>>>();
    }
  });
  const double empty = time_few_runs([&](cudaStream_t stream) {
    for (int64_t i = 0; i < calls; ++i) nothing<<<1, 32, 0, stream>>>();
  });
  times.alone = (pairs - empty) / static_cast<double>(calls);
  return times;
}

void probe_decode(const Work& w, const Arena& arena, bool floors) {
  if (w.name.find(only) == std::string::npos) return;
  const Problem problem(w, arena);
  const int64_t calls = std::max<int64_t>(problem.layers, 5);
  const Times times = time_calls(calls, [&](cudaStream_t stream, int64_t i, bool early) {
    punica::Context context;
    context.stream = stream;
    context.early_reads = early;
    must(punica::cuda::batch_decode(problem.params(w, i % problem.layers), context));
  });
  int64_t tokens = 0;
  for (const int64_t n : w.lengths) tokens += w.window < 0 ? n : std::min(n, w.window + 1);
  const int64_t bytes = tokens * 2 * w.kv_heads * w.dim * 2;
  const double floor =
      floors ? read_floor(reinterpret_cast<const uint4*>(arena.pool), arena.pool_bytes, bytes, arena.out) : 0;
  std::printf("%-44s | %8.2f %8.2f %8.2f us | %5.2f TB/s in the chain", w.name.c_str(), times.early, times.standard,
              times.alone, static_cast<double>(bytes) / times.early * 1e-6);
  if (floors) {
    std::printf(", streaming read %7.2f us (%.2f), %5.1f%% / %5.1f%%", floor, static_cast<double>(bytes) / floor * 1e-6,
                100 * floor / times.early, 100 * floor / times.standard);
  }
  if (w.goal > 0) std::printf(", goal %.1f us", w.goal);
  std::printf("\n");
  std::fflush(stdout);
}

__global__ void copy_bytes(const uint4* from, int64_t count, uint4* to) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[u] = from[i + u * stride];
#pragma unroll
    for (int u = 0; u < 4; ++u) to[i + u * stride] = v[u];
  }
  for (; i < count; i += stride) to[i] = from[i];
}

// init_kv of whole prompts, or append_kv where `append`: k and v are read and written once.
void probe_write(const Work& w, const Arena& arena, bool append) {
  if (w.name.find(only) == std::string::npos) return;
  const Problem problem(w, arena);
  const int64_t rows = append ? problem.batch : problem.tokens, row = w.kv_heads * w.dim;
  const int64_t bytes = rows * row * 2 * 2;
  const int64_t sets = std::clamp<int64_t>((int64_t{160} << 20) / bytes, 1, 100);
  uint16_t *k, *v;
  int32_t* indptr;
  must(cudaMalloc(&k, sets * bytes / 2));
  must(cudaMalloc(&v, sets * bytes / 2));
  std::vector<int32_t> host_indptr = {0};
  for (const int64_t n : w.lengths) host_indptr.push_back(host_indptr.back() + static_cast<int32_t>(n));
  must(cudaMalloc(&indptr, host_indptr.size() * 4));
  must(cudaMemcpy(indptr, host_indptr.data(), host_indptr.size() * 4, cudaMemcpyHostToDevice));
  fill<<<1024, 256>>>(k, sets * bytes / 4);
  fill<<<1024, 256>>>(v, sets * bytes / 4);
  must(cudaDeviceSynchronize());
  const int64_t calls = append ? 100 : std::max<int64_t>(problem.layers, 5);
  const auto fields = [&](auto& p, int64_t i) {
    p.kv = problem.kv(w, i % problem.layers);
    p.k = view(k + i % sets * rows * row, punica::DType::kBFloat16, {rows, w.kv_heads, w.dim});
    p.v = view(v + i % sets * rows * row, punica::DType::kBFloat16, {rows, w.kv_heads, w.dim});
  };
  const Times times = time_calls(calls, [&](cudaStream_t stream, int64_t i, bool early) {
    punica::Context context;
    context.stream = stream;
    context.early_reads = early;
    if (append) {
      punica::AppendKvParams p;
      fields(p, i);
      must(punica::cuda::append_kv(p, context));
    } else {
      punica::InitKvParams p;
      fields(p, i);
      p.seqlen_indptr = view(indptr, punica::DType::kInt32, {problem.batch + 1});
      must(punica::cuda::init_kv(p, context));
    }
  });
  double best = 1e30;
  for (const int blocks : {132, 264, 528, 1056, 2112}) {
    for (const int threads : {256, 512, 1024}) {
      best = std::min(best, time_few_runs([&](cudaStream_t stream) {
                              for (int64_t i = 0; i < calls; ++i) {
                                const int64_t turns = arena.pool_bytes / bytes / 2;
                                launch_dependent(
                                    stream, blocks, threads, copy_bytes,
                                    reinterpret_cast<const uint4*>(arena.pool) + i % turns * (bytes / 8), bytes / 16,
                                    reinterpret_cast<uint4*>(arena.pool) + (i % turns * 2 + 1) * (bytes / 16));
                              }
                            }) / static_cast<double>(calls));
    }
  }
  std::printf("%-44s | %8.2f %8.2f %8.2f us | %5.2f TB/s, copy %7.2f us (%.2f), %5.1f%%", w.name.c_str(), times.early,
              times.standard, times.alone, 2.0 * static_cast<double>(bytes) / times.standard * 1e-6, best,
              2.0 * static_cast<double>(bytes) / best * 1e-6, 100 * best / times.standard);
  if (w.goal > 0) std::printf(", goal %.1f us", w.goal);
  std::printf("\n");
  std::fflush(stdout);
  must(cudaFree(k));
  must(cudaFree(v));
  must(cudaFree(indptr));
}

std::vector<int64_t> same(int64_t batch, int64_t length) { return std::vector<int64_t>(batch, length); }

}  // namespace

int main(int argc, char** argv) {
  must(cudaSetDevice(0));
  punica::cuda::Arch arch;
  must(punica::cuda::active_arch(0, &arch));
  const std::string what = argc > 1 ? argv[1] : "all";
  if (argc > 2) only = argv[2];
  std::printf("%s, bfloat16 | chain, default, alone\n", punica::cuda::arch_name(arch));
  Arena arena;
  arena.pool_bytes = int64_t{1400} << 20;
  must(cudaMalloc(&arena.pool, arena.pool_bytes));
  must(cudaMalloc(&arena.out, 4));
  fill<<<2048, 256>>>(reinterpret_cast<uint16_t*>(arena.pool), arena.pool_bytes / 2);
  must(cudaDeviceSynchronize());
  if (what == "decode" || what == "all" || what == "goals") {
    std::vector<int64_t> zipf;
    std::mt19937_64 bits(11);
    for (int64_t total = 0; total < 70000;) {  // density 1 / length up to 32k: 287 MB or more
      const double u = static_cast<double>(bits() >> 11) * 0x1p-53;
      zipf.push_back(std::min<int64_t>(32768, static_cast<int64_t>(std::exp(u * std::log(32768.0)))));
      total += zipf.back();
    }
    std::vector<Work> works = {
        {"B=1 ctx 4096, 32/8", same(1, 4096), 32, 8, 128, 16, 8},
        {"B=1 ctx 32768, 32/8", same(1, 32768), 32, 8, 128, 16, 36},
        {"B=32 ctx 1024, 32/8", same(32, 1024), 32, 8, 128, 16, 35},
        {"B=64 ctx 2048, 32/8", same(64, 2048), 32, 8, 128, 16, 0},
        {"B=128 ctx 2048, 32/8", same(128, 2048), 32, 8, 128, 16, 0},
        {"B=256 ctx 1024, 64/8", same(256, 1024), 64, 8, 128, 16, 0},
        {"Zipf, " + std::to_string(zipf.size()) + " sequences, 32/8", zipf, 32, 8, 128, 16, 0},
    };
    for (const Work& w : works) probe_decode(w, arena, true);
    if (what != "goals") {
      for (const int64_t page_size : {1, 8, 32, 64, 128}) {
        probe_decode({"B=64 ctx 2048, P=" + std::to_string(page_size), same(64, 2048), 32, 8, 128, page_size, 0}, arena,
                     false);
      }
      for (const int64_t dim : {64, 96, 256}) {
        probe_decode({"B=64 ctx 2048, D=" + std::to_string(dim), same(64, 2048), 32, 8, dim, 16, 0}, arena, false);
      }
      probe_decode({"B=64 ctx 2048, rope", same(64, 2048), 32, 8, 128, 16, 0, 5e5}, arena, false);
      probe_decode({"B=64 ctx 2048, 128/8", same(64, 2048), 128, 8, 128, 16, 0}, arena, false);
      probe_decode({"B=64 ctx 2048, 8/8", same(64, 2048), 8, 8, 128, 16, 0}, arena, false);
      probe_decode({"B=64 ctx 2048, 9/3, D=64", same(64, 2048), 9, 3, 64, 16, 0}, arena, false);
      probe_decode({"B=1 ctx 4096, 9/3, D=64", same(1, 4096), 9, 3, 64, 16, 0}, arena, false);
      probe_decode({"B=64 ctx 2048, window 511", same(64, 2048), 32, 8, 128, 16, 0, 0, 511}, arena, false);
      probe_decode({"B=256 ctx 100, 32/8", same(256, 100), 32, 8, 128, 16, 0}, arena, false);
      probe_decode({"B=1024 ctx 100, 32/8", same(1024, 100), 32, 8, 128, 16, 0}, arena, false);
      probe_decode({"B=1 ctx 100, 32/8", same(1, 100), 32, 8, 128, 16, 0}, arena, false);
    }
  }
  if (what == "write" || what == "all") {
    probe_write({"append_kv B=1, N=8", same(1, 1024), 8, 8, 128, 16, 0}, arena, true);
    probe_write({"append_kv B=256, N=8", same(256, 100), 8, 8, 128, 16, 2}, arena, true);
    probe_write({"init_kv 16 x 1024, N=8", same(16, 1024), 8, 8, 128, 16, 0}, arena, false);
    probe_write({"init_kv 16 x 4096, N=8", same(16, 4096), 8, 8, 128, 16, 0}, arena, false);
    probe_write({"init_kv 512 x 64, N=8", same(512, 64), 8, 8, 128, 16, 0}, arena, false);
    probe_write({"init_kv 16 x 2048, N=8, P=1", same(16, 2048), 8, 8, 128, 1, 0}, arena, false);
    probe_write({"init_kv 16 x 2048, N=8, D=64", same(16, 2048), 8, 8, 64, 16, 0}, arena, false);
  }
  return 0;
}
