// dispatch_bgmv on a CUDA device against a float64 reference at awkward sizes; a row alone against the same row in
// every batch, bit for bit; repeats; memory around y. Runs the path that PUNICA_CUDA_ARCH names. Exits with 1 on
// failure, with 77 where there is no device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/elements.cuh"
#include "tests/cpp/cuda/launches.h"
#include "tests/cpp/cuda/part.h"

namespace {

struct DeviceMemory {
  char* data = nullptr;
  explicit DeviceMemory(size_t bytes) { must(cudaMalloc(&data, std::max<size_t>(bytes, 1))); }
  ~DeviceMemory() { cudaFree(data); }
  DeviceMemory(const DeviceMemory&) = delete;
};

struct Case {
  int64_t batch, h_in, h_out;
  int num_adapters;  // distinct; rows take them in turn or at random
  int x_pad, y_pad;  // elements between rows
  int offset;        // elements that spoil the alignment of W, x and y
  bool skipped;      // some rows have indices that name no adapter
  bool same;         // all rows take one adapter
  bool early_reads;
  bool only = false;  // the table holds no other adapter: kernels number their blocks in another way
  bool few = false;   // all but a few rows have indices that name no adapter: large batches at little cost
  int w_offset = 0;   // as offset, of W alone
  // Terms of very different size that mostly cancel each other, and y zero: where two kernels do not drop the same of
  // a sum, its bits differ. Nothing is compared with what is exact.
  bool cancelling = false;
};

std::string name(DType dtype, const Case& c) {
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "%s B=%lld %lld->%lld adapters=%d x_pad=%d y_pad=%d offset=%d skipped=%d same=%d early=%d only=%d few=%d "
      "w_offset=%d cancelling=%d",
      punica::dtype_name(dtype), static_cast<long long>(c.batch), static_cast<long long>(c.h_in),
      static_cast<long long>(c.h_out), c.num_adapters, c.x_pad, c.y_pad, c.offset, c.skipped, c.same, c.early_reads,
      c.only, c.few, c.w_offset, c.cancelling);
  return text;
}

punica::TensorView view(void* data, DType dtype, std::vector<int64_t> shape, int64_t row_stride) {
  punica::TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = {punica::DeviceType::kCuda, 0};
  v.rank = static_cast<int>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) v.shape[i] = shape[i];
  v.stride[v.rank - 1] = 1;
  if (v.rank == 2) v.stride[0] = row_stride;
  return v;
}

constexpr float kScale = -0.75f;
constexpr int64_t kLayer = 1;

// The call of rows [first, first + n) of the case; tensors begin at these addresses.
template <class T>
punica::BgmvParams params_of(const Case& c, int num_adapters, void* x, void* y, void* indices, void* w_ptr,
                             int64_t first, int64_t n) {
  const int64_t x_stride = c.h_in + c.x_pad, y_stride = c.h_out + c.y_pad;
  punica::BgmvParams p;
  p.y = view(static_cast<T*>(y) + c.offset + first * y_stride, kDType<T>, {n, c.h_out}, y_stride);
  p.x = view(static_cast<T*>(x) + c.offset + first * x_stride, kDType<T>, {n, c.h_in}, x_stride);
  p.w_ptr = view(w_ptr, DType::kInt64, {num_adapters}, 1);
  p.indices = view(static_cast<int64_t*>(indices) + first, DType::kInt64, {n}, 1);
  p.layer_idx = kLayer;
  p.scale = kScale;
  return p;
}

// Of like size or, if terms cancel: over 12 powers of two, the second of most pairs as the first, or its opposite.
template <class T>
T next_element(const Case& c, Random& random, const T* before, int64_t i, float sign) {
  if (!c.cancelling) return from<T>(random.value());
  if (i % 2 == 1 && random.next() % 8 != 0) return from<T>(sign * value(*before));
  const float size = 1 + std::fabs(random.value());
  return from<T>(std::ldexp(random.next() % 2 != 0 ? -size : size, static_cast<int>(random.next() % 13) - 9));
}

template <class T>
void run_case(const Case& c, Random& random) {
  if (!in_part()) return;
  const std::string label = g_case = name(kDType<T>, c);
  announce(label);
  constexpr int64_t kLayers = 2;
  const int64_t elements = c.h_out * c.h_in;
  // Weights: layer 0 and the elements around are NaN; one adapter that no row uses is all NaN.
  const T nan = from<T>(std::numeric_limits<float>::quiet_NaN());
  // memcheck sees what lies behind an allocation.
  const int w_offset = c.offset + c.w_offset;
  const int64_t w_elements = kLayers * elements + w_offset + (g_small ? 0 : 16);
  const int count = c.only ? 1 : c.num_adapters + 1;
  std::vector<std::vector<T>> w(count, std::vector<T>(w_elements, nan));
  std::vector<DeviceMemory*> w_device;
  std::vector<int64_t> addresses;
  for (int a = 0; a < count; ++a) {
    if (a < c.num_adapters) {
      T* const to = w[a].data() + w_offset + kLayer * elements;
      for (int64_t i = 0; i < elements; ++i) {
        to[i] = c.cancelling ? next_element<T>(c, random, to + i - 1, i % c.h_in, -1) : from<T>(random.value() * 0.25f);
      }
    }
    w_device.push_back(new DeviceMemory(w_elements * sizeof(T)));
    must(cudaMemcpy(w_device[a]->data, w[a].data(), w_elements * sizeof(T), cudaMemcpyHostToDevice));
    addresses.push_back(reinterpret_cast<int64_t>(w_device[a]->data + w_offset * sizeof(T)));
  }
  const int64_t x_stride = c.h_in + c.x_pad, y_stride = c.h_out + c.y_pad;
  std::vector<T> x(c.batch * x_stride + c.offset, nan), y(c.batch * y_stride + c.offset, nan);
  std::vector<int64_t> indices(c.batch);
  for (int64_t b = 0; b < c.batch; ++b) {
    indices[b] = c.same ? 0 : c.num_adapters >= c.batch ? (b * 7 + 3) % c.num_adapters : random.next() % c.num_adapters;
    const bool skip = (c.skipped && random.next() % 4 == 0) || (c.few && b % (c.batch / 5 + 1) != 0);
    if (skip)
      indices[b] =
          random.next() % 2 ? -1 - static_cast<int64_t>(random.next()) : count + random.next() % 2 * (int64_t{1} << 40);
    for (int64_t i = 0; i < c.h_in; ++i) {
      T* const to = &x[c.offset + b * x_stride + i];
      if (!skip) *to = next_element<T>(c, random, to - 1, i, 1);  // rows that are skipped stay NaN
    }
    for (int64_t i = 0; i < c.h_out; ++i) y[c.offset + b * y_stride + i] = from<T>(c.cancelling ? 0 : random.value());
  }
  if (c.num_adapters >= c.batch && !c.skipped && !c.same) {
    for (int64_t b = 0; b < c.batch; ++b) indices[b] = b;
  }
  DeviceMemory x_device(x.size() * sizeof(T)), y_device(y.size() * sizeof(T)), index_device(c.batch * 8),
      ptr_device((count + !g_small) * 8);
  must(cudaMemcpy(x_device.data, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
  must(cudaMemcpy(index_device.data, indices.data(), c.batch * 8, cudaMemcpyHostToDevice));
  must(cudaMemcpy(ptr_device.data, addresses.data(), count * 8, cudaMemcpyHostToDevice));

  punica::Context context;
  context.early_reads = c.early_reads;
  int table = count;  // entries of the table of adapters
  // Rows [first, first + n) of the batch, y starting from what it was.
  const auto run = [&](int64_t first, int64_t n, std::vector<T>* result) {
    must(cudaMemcpy(y_device.data, y.data(), y.size() * sizeof(T), cudaMemcpyHostToDevice));
    const auto p = params_of<T>(c, table, x_device.data, y_device.data, index_device.data, ptr_device.data, first, n);
    const punica::Status status = punica::cuda::dispatch_bgmv(p, context);
    if (!status.ok()) fail(label + ": " + status.message());
    must(cudaDeviceSynchronize());
    result->resize(y.size());
    must(cudaMemcpy(result->data(), y_device.data, y.size() * sizeof(T), cudaMemcpyDeviceToHost));
  };

  std::vector<T> got, again, alone;
  run(0, c.batch, &got);
  if (!g_small) {
    run(0, c.batch, &again);
    ++g_checks;
    if (std::memcmp(got.data(), again.data(), got.size() * sizeof(T)) != 0) fail(label + ": a repeat differs");
  }

  if (c.only && !g_small) {
    // In a table of two adapters, the same bits.
    must(cudaMemcpy(ptr_device.data + 8, addresses.data(), 8, cudaMemcpyHostToDevice));
    table = 2;
    run(0, c.batch, &again);
    table = 1;
    // An index that names no adapter may name the second one of these.
    ++g_checks;
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t at = c.offset + b * y_stride;
      if (indices[b] == 0 && std::memcmp(&got[at], &again[at], c.h_out * sizeof(T)) != 0) {
        fail(label + ": row " + std::to_string(b) + " differs where there are two adapters");
        break;
      }
    }
  }

  // What is no row of y keeps its bits, rows that are skipped too.
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) - c.offset;
    const int64_t b = at / y_stride;
    const bool inside = at >= 0 && at % y_stride < c.h_out && indices[b] >= 0 && indices[b] < count;
    if (!inside && std::memcmp(&got[i], &y[i], sizeof(T)) != 0) {
      fail(label + ": wrote element " + std::to_string(i) + " (row " + std::to_string(b) + ")");
      break;
    }
  }

  const double rtol = std::is_same_v<T, float> ? 2e-6 : std::is_same_v<T, __half> ? 2e-3 : 1.6e-2;
  const int64_t row_cost = elements;
  const int64_t max_rows = std::max<int64_t>(3, int64_t{6000000} / row_cost);
  const int64_t row_step = std::max<int64_t>(1, c.batch / max_rows);
  std::vector<double> exact(c.h_out), terms(c.h_out);
  std::vector<float> xf(c.h_in);
  for (int64_t b = 0; b < c.batch && !c.cancelling; b += row_step) {
    if (indices[b] < 0 || indices[b] >= count) continue;
    const T* weights = w[indices[b]].data() + w_offset + kLayer * elements;
    for (int64_t i = 0; i < c.h_in; ++i) xf[i] = value(x[c.offset + b * x_stride + i]);
    double largest = 0;
    for (int64_t m = 0; m < c.h_out; ++m) {
      double sum = 0, absolute = 0;
      for (int64_t i = 0; i < c.h_in; ++i) {
        const double term = static_cast<double>(value(weights[m * c.h_in + i])) * xf[i];
        sum += term;
        absolute += std::fabs(term);
      }
      const double before = value(y[c.offset + b * y_stride + m]);
      exact[m] = before + kScale * sum;
      terms[m] = std::fabs(before) + std::fabs(kScale) * absolute;
      largest = std::max(largest, std::fabs(exact[m]));
    }
    for (int64_t m = 0; m < c.h_out; ++m) {
      const double is = value(got[c.offset + b * y_stride + m]);
      double tolerance = rtol * std::fabs(exact[m]) + rtol * largest / 16;
      // The sum itself is in float32, whatever the type.
      tolerance += 4 * std::ldexp(1.0, -24) * terms[m];
      ++g_checks;
      if (!(std::fabs(is - exact[m]) <= tolerance)) {
        fail(label + ": row " + std::to_string(b) + " output " + std::to_string(m) + ": " + std::to_string(is) +
             ", exact " + std::to_string(exact[m]));
        break;
      }
    }
  }

  // Rows alone, and a part of the batch that starts elsewhere.
  std::vector<int64_t> rows = {0, 1, c.batch / 2, c.batch - 1, 63, 64, 128, c.batch / 3};
  if (g_small) rows.clear();
  for (const int64_t b : rows) {
    if (b >= c.batch || b < 0) continue;
    run(b, 1, &alone);
    ++g_checks;
    const int64_t at = c.offset + b * y_stride;
    if (std::memcmp(&alone[at], &got[at], c.h_out * sizeof(T)) != 0)
      fail(label + ": row " + std::to_string(b) + " alone differs");
  }
  if (c.batch > 2 && !g_small) {
    const int64_t first = std::min<int64_t>(c.batch - 2, 5);
    run(first, c.batch - first, &alone);
    ++g_checks;
    const int64_t at = c.offset + first * y_stride;
    if (std::memcmp(&alone[at], &got[at], ((c.batch - first - 1) * y_stride + c.h_out) * sizeof(T)) != 0) {
      fail(label + ": rows from " + std::to_string(first) + " on differ");
    }
  }
  for (DeviceMemory* memory : w_device) delete memory;
}

// The same bits whatever the alignment of W, x and y.
template <class T>
void alignment_case(int64_t h_in, int64_t h_out) {
  if (!in_part()) return;
  constexpr int64_t kBatch = 11;
  Random random{99};
  g_case = "alignment " + std::to_string(h_in) + "->" + std::to_string(h_out);
  std::vector<T> w(h_in * h_out), x(kBatch * h_in), y(kBatch * h_out), first;
  for (T& v : w) v = from<T>(random.value());
  for (T& v : x) v = from<T>(random.value());
  for (T& v : y) v = from<T>(random.value());
  for (int offset = 0; offset < 9; ++offset) {
    DeviceMemory wd((w.size() + 16) * sizeof(T)), xd((x.size() + 16) * sizeof(T)), yd((y.size() + 16) * sizeof(T)),
        pd(8), id(8 * kBatch);
    char* wp = wd.data + offset * sizeof(T);
    char* xp = xd.data + (offset == 3 ? 0 : offset) * sizeof(T);
    char* yp = yd.data + (offset == 5 ? 0 : offset) * sizeof(T);
    must(cudaMemcpy(wp, w.data(), w.size() * sizeof(T), cudaMemcpyHostToDevice));
    must(cudaMemcpy(xp, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    must(cudaMemcpy(yp, y.data(), y.size() * sizeof(T), cudaMemcpyHostToDevice));
    must(cudaMemcpy(pd.data, &wp, 8, cudaMemcpyHostToDevice));
    must(cudaMemset(id.data, 0, 8 * kBatch));
    punica::BgmvParams p;
    p.y = view(yp, kDType<T>, {kBatch, h_out}, h_out);
    p.x = view(xp, kDType<T>, {kBatch, h_in}, h_in);
    p.w_ptr = view(pd.data, DType::kInt64, {1}, 1);
    p.indices = view(id.data, DType::kInt64, {kBatch}, 1);
    const punica::Status status = punica::cuda::dispatch_bgmv(p, {});
    if (!status.ok()) fail("alignment: " + status.message());
    must(cudaDeviceSynchronize());
    std::vector<T> got(y.size());
    must(cudaMemcpy(got.data(), yp, got.size() * sizeof(T), cudaMemcpyDeviceToHost));
    ++g_checks;
    if (offset == 0) {
      first = got;
    } else if (std::memcmp(first.data(), got.data(), got.size() * sizeof(T)) != 0) {
      fail(std::string("alignment changes bits: ") + punica::dtype_name(kDType<T>) + " " + std::to_string(h_in) + "->" +
           std::to_string(h_out) + " offset " + std::to_string(offset));
    }
  }
}

KernelCover g_cover;

// Of all combinations of sizes around every limit that there is, and of alignments, popularities and early reads, as
// few and as small ones as launch every kernel that any of them does.
template <class T>
void run_small() {
  std::vector<Case> cases;
  for (const int64_t h_in : {1,   7,   8,   16,   17,   40,   64,   65,   100,  128,  129,  136,
                             512, 516, 576, 1024, 1032, 2048, 4096, 4099, 8192, 8200, 14336}) {
    for (const int64_t h_out : {1, 2, 16, 17, 40, 64, 130, 200, 520, 1030, 3584, 4096, 8192}) {
      for (const int64_t batch : {1, 2, 7, 8, 9, 33, 64, 65, 129, 200, 300, 1100}) {
        for (int kind = 0; kind < 32; ++kind) {
          Case c = {};
          c.batch = batch, c.h_in = h_in, c.h_out = h_out;
          c.num_adapters = kind & 1 ? 1 : 3;
          c.only = c.same = kind & 1;
          c.offset = kind & 2 ? 1 : 0;
          c.y_pad = kind & 4 ? 3 : 0;
          c.x_pad = kind & 4 ? 8 : 0;
          c.early_reads = kind & 8;
          if ((kind & 16) != 0 && (kind & 2) == 0) c.w_offset = 1;
          c.few = true;
          cases.push_back(c);
        }
      }
    }
  }
  for (const int w_offset : {0, 1}) {  // in order, one row a block: where most rows have an adapter of their own
    Case c = {};
    c.batch = 65, c.h_in = 16, c.h_out = 4096;
    c.num_adapters = 40, c.w_offset = w_offset;
    c.few = true;
    cases.push_back(c);
  }
  const auto cost = [](const Case& c) { return (c.h_in * 8 + c.batch) * c.h_out; };
  std::stable_sort(cases.begin(), cases.end(), [&](const Case& a, const Case& b) { return cost(a) < cost(b); });
  Random random{7};
  for (const Case& c : cases) {
    std::vector<std::string> kernels;
    {
      const LaunchRecorder recorder;
      punica::Context context;
      context.early_reads = c.early_reads;
      const auto p =
          params_of<T>(c, c.only ? 1 : c.num_adapters + 1, nowhere(), nowhere(), nowhere(), nowhere(), 0, c.batch);
      if (const punica::Status status = punica::cuda::dispatch_bgmv(p, context); !status.ok()) fail(status.message());
      kernels = recorder.kernels();
    }
    if (g_cover.needs(kernels, {c.only ? "one adapter" : "several",
                                c.offset     ? "unaligned"
                                : c.w_offset ? "unaligned weights"
                                             : "aligned",
                                c.y_pad ? "strided" : "dense", c.early_reads ? "early" : "in order",
                                c.batch > 1 ? "rows" : "a row"})) {
      run_case<T>(c, random);
    }
  }
  std::fflush(stdout);
}

template <class T>
void run_all() {
  if (g_small) return run_small<T>();
  Random random{7};
  const int64_t batches[] = {1, 2, 7, 8, 9, 17, 64, 65, 300};
  const int64_t widths[] = {1, 2, 7, 16, 64, 576, 3424, 4096, 4099, 14336};
  const int64_t ranks[] = {1, 2, 3, 8, 16, 17, 64, 100, 128, 512};
  int turn = 0;
  for (const int64_t h : widths) {
    for (const int64_t r : ranks) {
      for (int direction = 0; direction < 2; ++direction) {
        // Every batch size for small products; a few, in turn, for large ones.
        const int64_t cost = h * r;
        for (size_t i = 0; i < std::size(batches); ++i) {
          if (cost > 70000 && (i + turn) % 9 != 0) continue;
          if (cost > 10000 && (i + turn) % 3 != 0) continue;
          Case c = {};
          c.batch = batches[i];
          c.h_in = direction == 0 ? h : r;
          c.h_out = direction == 0 ? r : h;
          const int kind = (turn * 5 + static_cast<int>(i)) % 6;
          c.num_adapters = cost > 200000 ? 2
                           : kind == 0   ? static_cast<int>(std::min<int64_t>(c.batch, 65))
                           : kind < 3    ? 3
                                         : 5;
          c.x_pad = kind == 1 ? 8 : kind == 2 ? 1 : kind == 4 ? 3 : 0;
          c.y_pad = kind == 1 ? 8 : kind == 2 ? 3 : kind == 5 ? 1 : 0;
          c.offset = kind == 3 ? 1 : kind == 4 ? 4 : kind == 5 ? 7 : 0;
          c.skipped = kind % 2 == 1;
          c.same = kind == 2;
          c.early_reads = (turn + static_cast<int>(i)) % 2 == 0;
          run_case<T>(c, random);
        }
        ++turn;
      }
    }
  }
  for (const int64_t batch : {127, 128, 129, 256, 1000, 4100}) {
    for (const bool same : {false, true}) {
      run_case<T>({batch, 64, 16, same ? 1 : 4, 0, 0, 0, !same, same, same}, random);
      run_case<T>({batch, 16, 64, same ? 1 : 150, 0, 0, 0, false, same, !same}, random);
      run_case<T>({batch, 1024, 16, same ? 1 : 9, 0, 0, 0, false, same, true}, random);
    }
  }
  // A table of one adapter: groups of all sizes, kernels for few rows and for many.
  const std::pair<int64_t, int64_t> shapes[] = {
      {4096, 16}, {4096, 256}, {1000, 40}, {576, 200}, {300, 17},  {8200, 20}, {6144, 300}, {16, 520},  {20, 300},
      {64, 300},  {128, 520},  {13, 300},  {100, 264}, {200, 520}, {256, 300}, {512, 264},  {4099, 40}, {4104, 70}};
  for (const auto& [h_in, h_out] : shapes) {
    for (const int64_t batch : {1, 5, 33, 64, 127, 129, 300}) {
      const bool odd = batch % 2 != 0;
      run_case<T>({batch, h_in, h_out, 1, odd ? 8 : 0, odd ? 8 : 0, 0, odd, true, batch % 3 == 0, true}, random);
      if (batch == 129) run_case<T>({batch, h_in, h_out, 1, 3, 1, 1, false, true, true, true}, random);
    }
  }
  // So many rows and outputs of one adapter that the weights stay in shared memory while rows pass.
  const std::pair<int64_t, int64_t> wide[] = {{16, 26704}, {13, 26701}, {20, 3504},  {64, 3504},
                                              {100, 3500}, {128, 3504}, {200, 1900}, {256, 1904},
                                              {264, 1904}, {512, 1900}, {512, 10008}};
  for (const auto& [h_in, h_out] : wide) {
    const bool odd = h_in % 8 != 0;
    run_case<T>({301, h_in, h_out, 1, odd ? 4 : 8, odd ? 3 : 8, 0, h_in % 16 == 0, true, odd, true}, random);
    if (h_in > 128) run_case<T>({305, h_in, h_out, 1, 3, 1, 1, true, true, true, true}, random);
    // The bits of rows alone where what is dropped of a sum shows.
    Case c = {300, h_in, h_out, 1, 0, 0, 0, false, true, false, true};
    c.cancelling = true;
    if (sizeof(T) == 2) run_case<T>(c, random);
  }
  // Rounds of the same warps over further outputs, and more outputs than 65535 tiles.
  run_case<T>({256, 16, 4096, 64, 0, 0, 0, false, false, true}, random);
  run_case<T>({256, 64, 4096, 8, 0, 0, 0, false, false, false}, random);
  // So many blocks that each takes more: rows of an adapter of their own beside rows that share one; outputs that are
  // no whole number of blocks; unaligned weights.
  for (const bool early : {false, true}) {
    run_case<T>({260, 4096, 16, 200, 0, 0, 0, early, false, early}, random);
    run_case<T>({70, 4096, 61, 64, 8, 3, 0, !early, false, early}, random);
    run_case<T>({90, 4096, 52, 80, 0, 0, 3, false, false, early}, random);
    run_case<T>({270, 16, 4096, 230, 8, 8, 0, early, false, early}, random);
    run_case<T>({300, 12, 2600, 250, 0, 0, 0, false, false, early}, random);
    run_case<T>({70, 64, 4096, 60, 0, 0, 0, !early, false, early}, random);
    run_case<T>({140, 40, 2344, 130, 0, 8, 0, early, false, early}, random);
    run_case<T>({70, 64, 4090, 60, 0, 1, 1, false, false, early}, random);
    run_case<T>({20, 14336, 33, 18, 0, 0, 0, false, false, early}, random);
    // One row a block, where W alone may not be aligned; with the row in every batch size.
    for (const int w_offset : {0, 1, 4, 7}) {
      run_case<T>({64, 4096, 16, 60, 8, 0, 0, w_offset == 4, false, early, false, false, w_offset}, random);
      run_case<T>({45, 4096, 18, 40, 0, 0, 0, w_offset == 0, false, early, false, false, w_offset}, random);
      run_case<T>({64, 16, 4096, 60, 8, 8, 0, w_offset == 4, false, early, false, false, w_offset}, random);
      run_case<T>({86, 16, 2944, 80, 8, 8, 0, w_offset == 0, false, early, false, false, w_offset}, random);
      run_case<T>({100, 4096, 16, 90, 0, 0, 0, w_offset == 1, false, early, false, false, w_offset}, random);
      run_case<T>({100, 16, 4096, 90, 4, 3, 0, w_offset == 7, false, early, false, false, w_offset}, random);
      run_case<T>({7, 16, 4096, 5, 4, 1, 0, w_offset == 7, false, early, false, false, w_offset}, random);
      run_case<T>({40, 14336, 16, 10, 8, 0, 0, w_offset == 4, false, early, false, false, w_offset}, random);
      run_case<T>({40, 16, 14336, 30, 4, 8, 0, w_offset == 1, false, early, false, false, w_offset}, random);
      run_case<T>({64, 4096, 16, 1, 8, 1, 0, w_offset == 0, true, early, true, false, w_offset}, random);
      run_case<T>({61, 16, 4096, 1, 4, 8, 0, w_offset == 0, true, early, true, false, w_offset}, random);
      run_case<T>({140, 16, 3584, 120, 0, 0, 0, w_offset == 1, false, early, false, false, w_offset}, random);
    }
  }
  if (sizeof(T) == 2 && kDType<T> == DType::kBFloat16) {
    run_case<T>({2, 136, 65535 * 16 + 40, 1, 0, 0, 0, false, false, false}, random);
  }
  const std::pair<int64_t, int64_t> aligned[] = {{16, 64},   {8, 100},   {64, 48}, {128, 130}, {17, 33},
                                                 {4096, 16}, {4099, 17}, {576, 8}, {1, 1},     {260, 40}};
  for (const auto& [h_in, h_out] : aligned) alignment_case<T>(h_in, h_out);
}

}  // namespace

int main(int argc, char**) {
  g_small = argc > 1;  // any argument: for compute-sanitizer
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  must(cudaSetDevice(0));
  punica::cuda::Arch arch;
  if (const punica::Status status = punica::cuda::active_arch(0, &arch); !status.ok()) {
    std::printf("FAILED: %s\n", status.message().c_str());
    return 1;
  }
  const auto section = [](const char* what, auto run) {
    const int before = g_checks;
    run();
    std::printf("%s: %d checks, %d failures so far\n", what, g_checks - before, g_failures);
    std::fflush(stdout);
  };
  section("bfloat16", run_all<__nv_bfloat16>);
  section("float16", run_all<__half>);
  section("float32", run_all<float>);
  Cases::get().finish();
  if (Cases::get().idle()) return 0;
  if (!launched_only(arch)) {
    fail("the kernels that ran are not those of " + std::string(punica::cuda::arch_name(arch)));
  }
  std::printf("%s: %d checks, %d failures\n", punica::cuda::arch_name(arch), g_checks, g_failures);
  return g_failures == 0 && g_checks > 0 ? 0 : 1;
}
