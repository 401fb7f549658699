// Times add_lora: graphs of calls over weights, x and y that rotate over more than four times the L2. Columns, us a
// call: `chain`, calls after each other with early_reads; `default`, without; `alone`, each call between kernels that
// are no programmatic dependents (their own time, measured without the calls, is taken off); `two`, alone, the same by
// shrink and expand (dispatch_bgmv up to 256 rows, sgmv_shrink otherwise), where all ranks are equal and there is one
// slice; `floor`, 1.5 us and the bytes: weights of each adapter and x once at 4.5 TB/s, y read and written at 4.13.
// With PROBE_COLD in the environment, the kernels between calls leave nothing in L2.
// Usage: add_lora_probe [beginning of a work's name]...
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "benchmarks/cuda/probe.cuh"
#include "punica/add_lora.h"
#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

__global__ void nothing() {}

// Reads 128 MiB, so that neither tables nor code are left in L2.
__global__ void sweep(const uint4* from, uint32_t* sum) {
  uint32_t s = 0;
#pragma unroll 8
  for (int i = 0; i < 64; ++i) s += from[(i * size_t{gridDim.x} + blockIdx.x) * 256 + threadIdx.x].x;
  if (s == 12345) *sum = s;
}

__global__ void fill(uint16_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    data[i] = static_cast<uint16_t>(0x3c00 + (i * 2654435761u >> 20) % 512 + (i * 40503u >> 7) % 2 * 0x8000);
  }
}

template <class E>
E* on_device(const std::vector<E>& from) {
  E* to;
  must(cudaMalloc(&to, from.size() * sizeof(E)));
  must(cudaMemcpy(to, from.data(), from.size() * sizeof(E), cudaMemcpyHostToDevice));
  return to;
}

uint16_t* numbers(size_t count) {
  uint16_t* to;
  must(cudaMalloc(&to, count * 2));
  fill<<<1024, 256>>>(to, count);
  return to;
}

struct Work {
  const char* name;
  int64_t rows, h_in;
  std::vector<int64_t> widths;  // of the slices
  int adapters;
  bool in_turn;  // rows take adapters in turn; otherwise neighbours share one
  std::vector<int> ranks;
  int used = -1;  // adapters that the batch has, where the tables and the batch have room for more
  int slot = 0;   // the rank that slots of weights have room for, as vLLM's have; 0: the adapter's own
};

void probe(const Work& work) {
  const int slices = static_cast<int>(work.widths.size()), n = work.adapters, used = work.used < 0 ? n : work.used;
  const int64_t width = std::accumulate(work.widths.begin(), work.widths.end(), int64_t{0});
  const int max_rank = *std::max_element(work.ranks.begin(), work.ranks.end());
  const auto rank_of = [&](int a) { return work.ranks[a % work.ranks.size()]; };
  const auto slot_of = [&](int a) { return work.slot > 0 ? work.slot : rank_of(a); };
  int64_t weight_bytes = 0, slot_bytes = 0, used_bytes = 0;
  for (int a = 0; a < n; ++a) {
    weight_bytes += 2 * rank_of(a) * (slices * work.h_in + width);
    if (a < used) used_bytes = weight_bytes;
    slot_bytes += 2 * slot_of(a) * (slices * work.h_in + width);
  }
  const int64_t set_bytes = weight_bytes + 2 * work.rows * (work.h_in + width);
  const int64_t sets = std::clamp<int64_t>((int64_t{300} << 20) / set_bytes, 4, 1000);
  const int64_t calls = std::max<int64_t>(sets, 60);
  std::vector<uint16_t*> memory;
  std::vector<int64_t> a_ptr(slices * n), b_ptr(slices * n);
  std::vector<int32_t> ranks(n);
  // The sets are the layers of the adapters.
  uint16_t* const weights = numbers(slot_bytes / 2 * sets);
  memory.push_back(weights);
  uint16_t* next = weights;
  for (int s = 0; s < slices; ++s) {
    for (int a = 0; a < n; ++a) {
      ranks[a] = rank_of(a);
      a_ptr[s * n + a] = reinterpret_cast<int64_t>(next);
      next += sets * slot_of(a) * work.h_in;
      b_ptr[s * n + a] = reinterpret_cast<int64_t>(next);
      next += sets * slot_of(a) * work.widths[s];
    }
  }
  uint16_t* const x = numbers(sets * work.rows * work.h_in);
  uint16_t* const y = numbers(sets * work.rows * width);
  uint16_t* const v = numbers(sets * work.rows * max_rank);
  memory.insert(memory.end(), {x, y, v});
  std::vector<int64_t> index(work.rows);
  for (int64_t t = 0; t < work.rows; ++t)
    index[t] = used == 0 ? -1 : work.in_turn ? (t * 37 + 11) % used : t * used / work.rows;
  std::vector<int32_t> order(work.rows), adapter, start, end;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return index[a] < index[b]; });
  for (int64_t p = 0; p < work.rows; ++p) {
    if (p == 0 || index[order[p]] != adapter.back()) {
      adapter.push_back(static_cast<int32_t>(index[order[p]]));
      start.push_back(static_cast<int32_t>(p));
    }
  }
  while (work.used >= 0 && static_cast<int64_t>(adapter.size()) < std::min<int64_t>(work.rows, n + 1)) {
    adapter.push_back(-1);
    start.push_back(static_cast<int32_t>(work.rows));
  }
  const int64_t segments = static_cast<int64_t>(adapter.size());
  start.push_back(static_cast<int32_t>(work.rows));
  end.assign(start.begin() + 1, start.end());
  auto* const a_device = on_device(a_ptr);
  auto* const b_device = on_device(b_ptr);
  auto* const index_device = on_device(index);
  auto* const rank_device = on_device(ranks);
  auto* const scale_device = on_device(std::vector<float>(n, 1e-3f));
  auto* const order_device = on_device(order);
  auto* const adapter_device = on_device(adapter);
  auto* const start_device = on_device(start);
  auto* const end_device = on_device(end);
  must(cudaDeviceSynchronize());

  using punica::DType;
  const auto call = [&](cudaStream_t stream, int64_t i, bool early) {
    const int64_t set = i % sets;
    punica::AddLoraParams p;
    p.y = view(y + set * work.rows * width, DType::kBFloat16, {work.rows, width});
    p.x = view(x + set * work.rows * work.h_in, DType::kBFloat16, {work.rows, work.h_in});
    p.a_ptr = view(a_device, DType::kInt64, {slices, n});
    p.b_ptr = view(b_device, DType::kInt64, {slices, n});
    p.ranks = view(rank_device, DType::kInt32, {n});
    p.scales = view(scale_device, DType::kFloat32, {n});
    p.batch.order = view(order_device, DType::kInt32, {work.rows});
    p.batch.segment_adapter = view(adapter_device, DType::kInt32, {segments});
    p.batch.segment_start = view(start_device, DType::kInt32, {segments + 1});
    for (int s = 0; s < slices; ++s) p.slice_offsets[s + 1] = p.slice_offsets[s] + work.widths[s];
    p.layer_idx = set;
    if (work.slot > 0) {
      p.b_row_stride = work.slot;
      p.a_layer_stride = work.slot * work.h_in;
    }
    p.max_rank = std::max(max_rank, work.slot);
    punica::Context context;
    context.stream = stream;
    context.early_reads = early;
    must(punica::cuda::add_lora(p, context));
  };
  const auto two_calls = [&](cudaStream_t stream, int64_t i) {
    const int64_t set = i % sets;
    punica::Context context;
    context.stream = stream;
    for (int half = 0; half < 2; ++half) {
      const auto wide = [&](uint16_t* data, int64_t h) {
        return view(data + set * work.rows * h, DType::kBFloat16, {work.rows, h});
      };
      const auto narrow = wide(v, max_rank);
      const auto w_ptr = view(half == 0 ? a_device : b_device, DType::kInt64, {n});
      if (work.rows <= 256) {
        punica::BgmvParams p;
        p.x = half == 0 ? wide(x, work.h_in) : narrow;
        p.y = half == 0 ? narrow : wide(y, width);
        p.w_ptr = w_ptr;
        p.indices = view(index_device, DType::kInt64, {work.rows});
        p.layer_idx = set;
        p.scale = 1e-3f;
        must(punica::cuda::dispatch_bgmv(p, context));
      } else {
        punica::SgmvParams p;
        p.x = half == 0 ? wide(x, work.h_in) : narrow;
        p.y = half == 0 ? narrow : wide(y, width);
        p.w_ptr = w_ptr;
        p.s_start = view(start_device, DType::kInt32, {n});
        p.s_end = view(end_device, DType::kInt32, {n});
        p.layer_idx = set;
        must(punica::cuda::sgmv(p, context));
      }
    }
  };
  static uint4* cold = std::getenv("PROBE_COLD") ? reinterpret_cast<uint4*>(numbers(size_t{64} << 20)) : nullptr;
  const auto between = [&](cudaStream_t stream) {
    if (cold)
      sweep<<<512, 256, 0, stream>>>(cold, reinterpret_cast<uint32_t*>(cold));
    else
      nothing<<<1, 32, 0, stream>>>();
  };
  const auto chain = [&](bool early) {
    return time_graph([&](cudaStream_t stream) {
             for (int64_t i = 0; i < calls; ++i) call(stream, i, early);
           }) /
           calls;
  };
  const bool only_alone = std::getenv("PROBE_ALONE") != nullptr;
  const double early = only_alone ? 0 : chain(true), standard = only_alone ? 0 : chain(false);
  const double empty = time_graph([&](cudaStream_t stream) {
    for (int64_t i = 0; i < calls; ++i) between(stream);
  });
  const auto alone = [&](auto body) {
    return (time_graph([&](cudaStream_t stream) {
              for (int64_t i = 0; i < calls; ++i) {
                body(stream, i);
                between(stream);
              }
            }) -
            empty) /
           calls;
  };
  const double ours = alone([&](cudaStream_t stream, int64_t i) { call(stream, i, false); });
  const double ours_early = only_alone ? 0 : alone([&](cudaStream_t stream, int64_t i) { call(stream, i, true); });
  const bool comparable = !only_alone && slices == 1 && work.slot == 0 && work.used < 0 && work.ranks.size() == 1 &&
                          (work.rows <= 256 || segments == n);
  const double two = comparable ? alone([&](cudaStream_t stream, int64_t i) { two_calls(stream, i); }) : 0;
  const double floor =
      1.5 + (static_cast<double>(used_bytes) + 2.0 * work.rows * work.h_in) / 4.5e6 + 4.0 * work.rows * width / 4.13e6;
  std::printf(
      "%-34s | chain %7.2f default %7.2f alone %7.2f (early %7.2f) | two %7.2f | floor %6.2f, alone/floor %.2f\n",
      work.name, early, standard, ours, ours_early, two, floor, ours / floor);
  std::fflush(stdout);
  for (uint16_t* m : memory) must(cudaFree(m));
  for (void* m :
       {static_cast<void*>(a_device), static_cast<void*>(b_device), static_cast<void*>(index_device),
        static_cast<void*>(rank_device), static_cast<void*>(scale_device), static_cast<void*>(order_device),
        static_cast<void*>(adapter_device), static_cast<void*>(start_device), static_cast<void*>(end_device)}) {
    must(cudaFree(m));
  }
}

}  // namespace

int main(int argc, char** argv) {
  must(cudaSetDevice(0));
  punica::cuda::Arch arch;
  must(punica::cuda::active_arch(0, &arch));
  std::printf("%s, bfloat16, us\n", punica::cuda::arch_name(arch));
  const Work works[] = {
      {"B=1 r=16", 1, 4096, {4096}, 1, true, {16}},
      {"B=16 distinct r=16", 16, 4096, {4096}, 16, true, {16}},
      {"B=64 distinct r=16", 64, 4096, {4096}, 64, true, {16}},
      {"B=64 distinct r=64", 64, 4096, {4096}, 64, true, {64}},
      {"B=64 one r=16", 64, 4096, {4096}, 1, true, {16}},
      {"B=64 8 adapters r=16", 64, 4096, {4096}, 8, true, {16}},
      {"B=256 distinct r=16", 256, 4096, {4096}, 256, true, {16}},
      {"QKV B=64 distinct r=16", 64, 4096, {4096, 1024, 1024}, 64, true, {16}},
      {"B=64 mixed 8/16/32/64", 64, 4096, {4096}, 64, true, {8, 16, 32, 64}},
      {"down B=64 distinct r=16", 64, 14336, {4096}, 64, true, {16}},
      {"gate_up B=64 distinct r=16", 64, 4096, {14336, 14336}, 64, true, {16}},
      {"64 slots, 64 adapters", 64, 4096, {4096}, 64, true, {16}, 64},
      {"64 slots, 8 adapters", 64, 4096, {4096}, 64, true, {16}, 8},
      {"64 slots, 1 adapter", 64, 4096, {4096}, 64, true, {16}, 1},
      {"64 slots, none", 64, 4096, {4096}, 64, true, {16}, 0},
      {"64 slots, qkv, 64 adapters", 64, 4096, {4096, 1024, 1024}, 64, true, {16}, 64},
      {"64 slots, qkv, 8 adapters", 64, 4096, {4096, 1024, 1024}, 64, true, {16}, 8},
      {"64 slots, qkv, 1 adapter", 64, 4096, {4096, 1024, 1024}, 64, true, {16}, 1},
      {"64 slots, qkv, none", 64, 4096, {4096, 1024, 1024}, 64, true, {16}, 0},
      {"64 slots, gate_up, 64 adapters", 64, 4096, {14336, 14336}, 64, true, {16}, 64},
      {"64 slots, gate_up, 8 adapters", 64, 4096, {14336, 14336}, 64, true, {16}, 8},
      {"64 slots, gate_up, 1 adapter", 64, 4096, {14336, 14336}, 64, true, {16}, 1},
      {"64 slots, gate_up, none", 64, 4096, {14336, 14336}, 64, true, {16}, 0},
      {"64 slots, down, 8 adapters", 64, 14336, {4096}, 64, true, {16}, 8},
      {"64 slots, down, 1 adapter", 64, 14336, {4096}, 64, true, {16}, 1},
      {"8x512 r=16", 4096, 4096, {4096}, 8, false, {16}},
      {"64x64 r=16", 4096, 4096, {4096}, 64, false, {16}},
      {"1x4096 r=16", 4096, 4096, {4096}, 1, false, {16}},
      {"8x512 r=64", 4096, 4096, {4096}, 8, false, {64}},
      {"slots of 64, B=64 distinct r=8", 64, 4096, {4096}, 64, true, {8}, -1, 64},
      {"slots of 64, B=64 distinct r=16", 64, 4096, {4096}, 64, true, {16}, -1, 64},
      {"slots of 64, B=16 8 adapters r=16", 16, 4096, {4096}, 8, true, {16}, -1, 64},
      {"8x512 r=32", 4096, 4096, {4096}, 8, false, {32}},
      {"QKV 8x512 r=16", 4096, 4096, {4096, 1024, 1024}, 8, false, {16}},
      {"gate_up 8x512 r=16", 4096, 4096, {14336, 14336}, 8, false, {16}},
      {"down 8x512 r=16", 4096, 14336, {4096}, 8, false, {16}},
      {"8x1024 r=16", 8192, 4096, {4096}, 8, false, {16}},
      {"16x1024 r=16", 16384, 4096, {4096}, 16, false, {16}},
      {"4x512 r=16", 2048, 4096, {4096}, 4, false, {16}},
      {"2x256 r=16", 512, 4096, {4096}, 2, false, {16}},
      {"4x256 r=16", 1024, 4096, {4096}, 4, false, {16}},
  };
  for (const Work& work : works) {
    const auto named = [&](const char* beginning) { return std::string(work.name).starts_with(beginning); };
    if (argc < 2 || std::any_of(argv + 1, argv + argc, named)) probe(work);
  }
  return 0;
}
