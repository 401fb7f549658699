// add_lora on a CUDA device against a float64 reference: slices, mixed ranks, padded slots, layers, alignments, rows
// and slices without work, what one rounding of v to the data type would lose; a row alone against the same row in
// every batch, bit for bit; tables of garbage; what may be read before the kernel ahead has ended. Runs the path that
// PUNICA_CUDA_ARCH names. Exits with 1 on failure, with 77 where there is no device. Over 600 lines, in one file:
// its parts share the making of weights, batches and views.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "punica/add_lora.h"
#include "punica/cuda.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/launches.h"
#include "tests/cpp/cuda/part.h"

namespace {

using punica::DType;

int g_checks = 0, g_failures = 0;
bool g_small = false;  // few and small cases, for compute-sanitizer
std::string g_case;

void fail(const std::string& what) {
  if (++g_failures <= 60) std::printf("FAILED %s\n", what.c_str());
}

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: CUDA: %s\n", g_case.c_str(), cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
  }
  float value() { return (static_cast<float>(next() >> 8) / 8388608.0f - 1.0f) * 1.5f; }
};

template <class T>
T from(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

float value(float v) { return v; }
float value(__half v) { return __half2float(v); }
float value(__nv_bfloat16 v) { return __bfloat162float(v); }

// Device memory with a copy of a vector.
template <class E>
struct OnDevice {
  E* data = nullptr;
  size_t count;
  explicit OnDevice(const std::vector<E>& from) : count(from.size()) {
    must(cudaMalloc(&data, std::max<size_t>(count * sizeof(E), 16)));
    set(from);
  }
  ~OnDevice() { cudaFree(data); }
  OnDevice(const OnDevice&) = delete;
  void set(const std::vector<E>& from) {
    must(cudaMemcpy(data, from.data(), from.size() * sizeof(E), cudaMemcpyHostToDevice));
  }
  std::vector<E> get() const {
    std::vector<E> r(count);
    must(cudaMemcpy(r.data(), data, count * sizeof(E), cudaMemcpyDeviceToHost));
    return r;
  }
};

punica::TensorView view(void* data, DType dtype, std::vector<int64_t> shape, int64_t row_stride = -1) {
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
  if (row_stride >= 0) v.stride[0] = row_stride;
  return v;
}

// Segments of a batch: rows sorted by adapter, -1 first.
struct Batch {
  std::vector<int32_t> order, adapter, start;
  explicit Batch(const std::vector<int>& of_row, int spare = 0) {
    order.resize(of_row.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return of_row[a] < of_row[b]; });
    for (size_t p = 0; p < order.size(); ++p) {
      const int a = of_row[order[p]];
      if (p == 0 || a != adapter.back()) {
        adapter.push_back(a);
        start.push_back(static_cast<int32_t>(p));
      }
    }
    start.push_back(static_cast<int32_t>(order.size()));
    for (int i = 0; i < spare; ++i) {
      adapter.push_back(-1);
      start.push_back(0);
      order.push_back(-1);
    }
  }
};

struct Case {
  int64_t rows, h_in;
  std::vector<int64_t> offsets;  // of the slices, into y
  std::vector<int> ranks;        // of the adapters; of slice s: that of adapter (a + s * rank_turn) % count
  int rank_turn = 0;
  int max_rank = 0;                      // 0: the largest there is
  int padded = 0;                        // b_row_stride, and layer strides for slots of that rank; 0: none
  int x_pad = 0, y_pad = 0, offset = 0;  // elements; offset: spoils the alignment of everything
  int pattern = 0;  // of the rows' adapters: 0 at random, 1 in turn, 2 all the first, 3 at random with rows without
  int spare = 0;    // segments that are not used
  bool early_reads = false;
  bool null_address = false;  // adapter 1 has none in slice 0
  int values = 0;             // 1: ranks cancel each other; 2: v beyond 65504
  bool few = false;           // all but some 20 rows are without an adapter: many rows at little cost
  int rank_of(int slice, int adapter) const { return ranks[(adapter + slice * rank_turn) % ranks.size()]; }
  int slices() const { return static_cast<int>(offsets.size()) - 1; }
  bool by_slice() const { return slices() > 1 && rank_turn != 0; }
  int64_t width() const { return offsets.back() + 3; }  // columns behind the last slice stay as they are
  int largest_rank() const { return std::max({1, max_rank, *std::max_element(ranks.begin(), ranks.end())}); }
};

std::string name(DType dtype, const Case& c) {
  char text[256];
  std::snprintf(text, sizeof(text),
                "%s rows=%lld h_in=%lld slices=%zu to %lld adapters=%zu rank[0]=%d turn=%d max=%d padded=%d x_pad=%d "
                "y_pad=%d offset=%d pattern=%d spare=%d early=%d values=%d few=%d",
                punica::dtype_name(dtype), static_cast<long long>(c.rows), static_cast<long long>(c.h_in),
                c.offsets.size() - 1, static_cast<long long>(c.offsets.back()), c.ranks.size(), c.ranks[0], c.rank_turn,
                c.max_rank, c.padded, c.x_pad, c.y_pad, c.offset, c.pattern, c.spare, c.early_reads, c.values, c.few);
  return text;
}

// What the case's calls have in common; x and y of `rows` rows from these addresses on, tables where they are needed.
template <class T>
punica::AddLoraParams params_of(const Case& c, T* x, T* y, int64_t rows, void* a_ptr, void* b_ptr, void* ranks,
                                void* scales) {
  constexpr int64_t kLayer = 1;
  const int64_t adapters = static_cast<int64_t>(c.ranks.size()) + 1;
  punica::AddLoraParams p;
  p.y = view(y, kDType<T>, {rows, c.width()}, c.width() + c.y_pad);
  p.x = view(x, kDType<T>, {rows, c.h_in}, c.h_in + c.x_pad);
  p.a_ptr = view(a_ptr, DType::kInt64, {c.slices(), adapters});
  p.b_ptr = view(b_ptr, DType::kInt64, {c.slices(), adapters});
  const std::vector<int64_t> of_adapters =
      c.by_slice() ? std::vector<int64_t>{c.slices(), adapters} : std::vector<int64_t>{adapters};
  p.ranks = view(ranks, DType::kInt32, of_adapters);
  p.scales = view(scales, DType::kFloat32, of_adapters);
  p.layer_idx = kLayer;
  for (int s = 0; s <= c.slices(); ++s) p.slice_offsets[s] = c.offsets[s];
  if (c.padded > 0) {
    p.b_row_stride = c.padded;
    p.a_layer_stride = c.padded * c.h_in;
  }
  p.max_rank = c.largest_rank();
  return p;
}

template <class T>
void run_case(const Case& c, Random& random) {
  if (!in_part()) return;
  const std::string label = g_case = name(kDType<T>, c);
  announce(label);
  constexpr int64_t kLayers = 2, kLayer = 1;
  const T nan = from<T>(std::numeric_limits<float>::quiet_NaN());
  const int slices = c.slices(), adapters = static_cast<int>(c.ranks.size()), max_rank = c.largest_rank();
  const auto rank_of = [&](int s, int a) { return c.rank_of(s, a); };
  const int64_t width = c.width();
  const int behind = g_small ? 0 : 8;  // memcheck sees what lies behind an allocation

  // Weights: all layers but one, gaps and an adapter that no row has are NaN.
  struct Weights {
    std::vector<T> a, b;
    int64_t a_at, b_at, b_stride;
    std::unique_ptr<OnDevice<T>> a_device, b_device;
  };
  std::vector<Weights> weights(slices * (adapters + 1));
  std::vector<int64_t> a_ptr, b_ptr;
  std::vector<int32_t> ranks;
  std::vector<float> scales;
  for (int s = 0; s < slices; ++s) {
    const int64_t h_out = c.offsets[s + 1] - c.offsets[s];
    for (int a = 0; a <= adapters; ++a) {
      Weights& w = weights[s * (adapters + 1) + a];
      const int r = a < adapters ? rank_of(s, a) : 1;
      const int slot = c.padded > 0 ? c.padded : r;
      w.b_stride = slot;
      w.a.assign(c.offset + kLayers * slot * c.h_in + behind, nan);
      w.b.assign(c.offset + kLayers * slot * h_out + behind, nan);
      w.a_at = c.offset + kLayer * slot * c.h_in;
      w.b_at = c.offset + kLayer * slot * h_out;
      if (a < adapters) {
        for (int64_t i = 0; i < r * c.h_in; ++i) w.a[w.a_at + i] = from<T>(random.value() * 0.25f);
        for (int64_t m = 0; m < h_out; ++m) {
          for (int j = 0; j < r; ++j) w.b[w.b_at + m * slot + j] = from<T>(random.value() * 0.25f);
        }
        if (c.values == 1) {
          // Neighbouring ranks all but cancel: v[1] is v[0] and a little, the outputs their difference.
          for (int64_t k = 0; k < c.h_in; ++k) {
            const float v = 2.0f + std::fabs(random.value());
            for (int j = 0; j + 1 < r; j += 2) {
              w.a[w.a_at + j * c.h_in + k] = from<T>(v);
              w.a[w.a_at + (j + 1) * c.h_in + k] = from<T>(k % 97 == 0 ? v + 0.0625f : v);
            }
          }
          for (int64_t m = 0; m < h_out; ++m) {
            for (int j = 0; j + 1 < r; j += 2) {
              w.b[w.b_at + m * slot + j] = from<T>(1.0f);
              w.b[w.b_at + m * slot + j + 1] = from<T>(-1.0f);
            }
          }
        }
        if (c.values == 2) {
          for (int64_t k = 0; k < c.h_in; ++k) w.a[w.a_at + k] = from<T>(400.0f + random.value());
          for (int64_t m = 0; m < h_out; ++m) w.b[w.b_at + m * slot] = from<T>(random.value() * 1e-2f);
        }
      }
      w.a_device = std::make_unique<OnDevice<T>>(w.a);
      w.b_device = std::make_unique<OnDevice<T>>(w.b);
      const bool null = c.null_address && s == 0 && a == 1;
      a_ptr.push_back(null && adapters % 2 ? 0 : reinterpret_cast<int64_t>(w.a_device->data + c.offset));
      b_ptr.push_back(null && adapters % 2 == 0 ? 0 : reinterpret_cast<int64_t>(w.b_device->data + c.offset));
      ranks.push_back(r);
      scales.push_back(a % 3 == 0 ? -0.75f : 1.0f + 0.125f * static_cast<float>((a + s) % 7));
    }
  }
  const int64_t x_stride = c.h_in + c.x_pad, y_stride = width + c.y_pad;
  std::vector<T> x(c.offset + c.rows * x_stride, nan), y(c.offset + c.rows * y_stride);
  std::vector<int> of_row(c.rows);
  for (int64_t t = 0; t < c.rows; ++t) {
    of_row[t] = c.pattern == 2   ? 0
                : c.pattern == 1 ? static_cast<int>(t % adapters)
                                 : static_cast<int>(random.next() % adapters);
    if (c.pattern == 3 && random.next() % 4 == 0) of_row[t] = -1;
    if (c.few && t % (c.rows / 20 + 1) != 0) of_row[t] = -1;
    for (int64_t i = 0; i < c.h_in; ++i) {
      const float v = c.values != 0 ? std::fabs(random.value()) + 1.0f : random.value();
      if (of_row[t] >= 0) x[c.offset + t * x_stride + i] = from<T>(v);  // rows without adapter stay NaN
    }
  }
  for (T& v : y) v = from<T>(random.value());
  OnDevice<T> x_device(x), y_device(y);
  OnDevice<int64_t> a_device(a_ptr), b_device(b_ptr);
  OnDevice<int32_t> rank_device(ranks);
  OnDevice<float> scale_device(scales);
  punica::Context context;
  context.early_reads = c.early_reads;
  const bool by_slice = c.by_slice();

  // The rows `keep` of the batch, with y starting from what it was.
  const auto run = [&](const std::vector<int>& adapters_of_rows, int64_t first, int64_t count) {
    y_device.set(y);
    const Batch batch(adapters_of_rows, c.spare);
    const OnDevice<int32_t> order(batch.order), adapter(batch.adapter), start(batch.start);
    auto p = params_of<T>(c, x_device.data + c.offset + first * x_stride, y_device.data + c.offset + first * y_stride,
                          count, a_device.data, b_device.data, rank_device.data, scale_device.data);
    p.batch.order = view(order.data, DType::kInt32, {static_cast<int64_t>(batch.order.size())});
    p.batch.segment_adapter = view(adapter.data, DType::kInt32, {static_cast<int64_t>(batch.adapter.size())});
    p.batch.segment_start = view(start.data, DType::kInt32, {static_cast<int64_t>(batch.start.size())});
    const punica::Status status = punica::cuda::add_lora(p, context);
    if (!status.ok()) fail(label + ": " + status.message());
    must(cudaDeviceSynchronize());
    return y_device.get();
  };

  const std::vector<T> got = run(of_row, 0, c.rows);
  if (!g_small) {
    const std::vector<T> again = run(of_row, 0, c.rows);
    ++g_checks;
    if (std::memcmp(got.data(), again.data(), got.size() * sizeof(T)) != 0) fail(label + ": a repeat differs");
  }

  // What is no part of a slice keeps its bits, rows and slices without work too.
  const auto works = [&](int64_t t, int s) {
    return of_row[t] >= 0 && rank_of(s, of_row[t]) > 0 && !(c.null_address && s == 0 && of_row[t] == 1);
  };
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) - c.offset, t = at / y_stride, column = at % y_stride;
    bool inside = false;
    for (int s = 0; s < slices && at >= 0; ++s) {
      inside = inside || (column >= c.offsets[s] && column < c.offsets[s + 1] && works(t, s));
    }
    if (!inside && std::memcmp(&got[i], &y[i], sizeof(T)) != 0) {
      fail(label + ": wrote element " + std::to_string(i) + " (row " + std::to_string(t) + ")");
      break;
    }
  }

  const double unit = std::is_same_v<T, float> ? 2e-6 : std::is_same_v<T, __half> ? 2e-3 : 1.6e-2;
  // What the pair that stands for v leaves of it, relative and (float16) of the largest.
  const double pair = std::is_same_v<T, float>    ? 0
                      : std::is_same_v<T, __half> ? std::ldexp(1, -22)
                                                  : std::ldexp(1, -16);
  int64_t cost = 0;
  for (int s = 0; s < slices; ++s) cost += int64_t{max_rank} * (c.h_in + c.offsets[s + 1] - c.offsets[s]);
  const int64_t step = std::max<int64_t>(1, c.rows / std::max<int64_t>(3, 3000000 / std::max<int64_t>(cost, 1)));
  bool rounding_shows = false;
  for (int64_t t = 0; t < c.rows; t += step) {
    if (of_row[t] < 0) continue;
    std::vector<double> exact(width, 0), slack(width, 0), rounded(width, 0);
    double largest = 0;
    for (int s = 0; s < slices; ++s) {
      if (!works(t, s)) continue;
      const int r = rank_of(s, of_row[t]);
      const Weights& w = weights[s * (adapters + 1) + of_row[t]];
      const double scale = scales[(by_slice ? s * (adapters + 1) : 0) + of_row[t]];
      std::vector<double> v(r), terms(r);
      double largest_v = 0;
      for (int j = 0; j < r; ++j) {
        for (int64_t k = 0; k < c.h_in; ++k) {
          const double term =
              static_cast<double>(value(w.a[w.a_at + j * c.h_in + k])) * value(x[c.offset + t * x_stride + k]);
          v[j] += term;
          terms[j] += std::fabs(term);
        }
        largest_v = std::max(largest_v, std::fabs(v[j]));
      }
      for (int64_t m = c.offsets[s]; m < c.offsets[s + 1]; ++m) {
        const double before = value(y[c.offset + t * y_stride + m]);
        double sum = 0, once = 0, absolute = std::fabs(before), lost = 0;
        for (int j = 0; j < r; ++j) {
          const double b = value(w.b[w.b_at + (m - c.offsets[s]) * w.b_stride + j]);
          sum += b * v[j];
          once += b * value(from<T>(static_cast<float>(v[j])));
          absolute += std::fabs(scale * b) * terms[j];
          lost += std::fabs(scale * b) * (pair * std::fabs(v[j]) + std::ldexp(largest_v, -40));
        }
        exact[m] = before + scale * sum;
        rounded[m] = before + scale * once;
        slack[m] = 4 * std::ldexp(1, -24) * absolute + lost;
        largest = std::max(largest, std::fabs(exact[m]));
      }
    }
    for (int s = 0; s < slices; ++s) {
      for (int64_t m = c.offsets[s]; works(t, s) && m < c.offsets[s + 1]; ++m) {
        const double is = value(got[c.offset + t * y_stride + m]);
        const double tolerance = unit * std::fabs(exact[m]) + unit * largest / 16 + slack[m];
        rounding_shows = rounding_shows || !(std::fabs(rounded[m] - exact[m]) <= tolerance);
        ++g_checks;
        // What is beyond the range of the type is infinite in both.
        const bool both_infinite = std::isinf(value(from<T>(static_cast<float>(exact[m])))) && std::isinf(is);
        if (!both_infinite && !(std::fabs(is - exact[m]) <= tolerance)) {
          fail(label + ": row " + std::to_string(t) + " slice " + std::to_string(s) + " column " + std::to_string(m) +
               ": " + std::to_string(is) + ", exact " + std::to_string(exact[m]));
          t = c.rows;
          break;
        }
      }
      if (t >= c.rows) break;
    }
  }
  if (c.values == 1 || (c.values == 2 && std::is_same_v<T, __half>)) {
    ++g_checks;
    if (!std::is_same_v<T, float> && !rounding_shows) fail(label + ": rounding v once would pass");
  }

  if (g_small) return;
  // Rows alone; the batch without some of its rows; a part of it that starts elsewhere.
  const auto same_row = [&](const std::vector<T>& other, int64_t t) {
    const int64_t at = c.offset + t * y_stride;
    return std::memcmp(&other[at], &got[at], width * sizeof(T)) == 0;
  };
  for (const int64_t t : {int64_t{0}, c.rows / 3, c.rows / 2, c.rows - 1}) {
    ++g_checks;
    if (!same_row(run({of_row[t]}, t, 1), t)) fail(label + ": row " + std::to_string(t) + " alone differs");
  }
  for (const int64_t count : {int64_t{9}, int64_t{17}, int64_t{40}, int64_t{130}, c.rows - 1}) {
    if (count < 1 || count >= c.rows) continue;
    const int64_t first = std::min<int64_t>(c.rows - count, 3);
    const std::vector<T> part =
        run(std::vector<int>(of_row.begin() + first, of_row.begin() + first + count), first, count);
    ++g_checks;
    for (int64_t t = first; t < first + count; ++t) {
      if (!same_row(part, t)) {
        fail(label + ": row " + std::to_string(t) + " differs among " + std::to_string(count));
        break;
      }
    }
  }
}

// The same bits whatever the alignment.
template <class T>
void alignment_case(int64_t h_in, int64_t h_out, int rank) {
  if (!in_part()) return;
  constexpr int64_t kRows = 11;
  g_case = "alignment " + std::to_string(h_in) + " " + std::to_string(h_out) + " " + std::to_string(rank);
  announce(g_case);
  Random random{99};
  std::vector<T> a(rank * h_in), b(h_out * rank), x(kRows * h_in), y(kRows * h_out), first;
  for (std::vector<T>* all : {&a, &b, &x, &y}) {
    for (T& v : *all) v = from<T>(random.value());
  }
  for (int offset = 0; offset < 9; ++offset) {
    const auto shifted = [&](const std::vector<T>& v, int by) {
      std::vector<T> r(by);
      r.insert(r.end(), v.begin(), v.end());
      r.resize(r.size() + 8);
      return r;
    };
    const int of_a = offset, of_b = offset == 2 ? 0 : offset, of_x = offset == 3 ? 0 : offset,
              of_y = offset == 5 ? 0 : offset;
    OnDevice<T> ad(shifted(a, of_a)), bd(shifted(b, of_b)), xd(shifted(x, of_x)), yd(shifted(y, of_y));
    OnDevice<int64_t> a_ptr({reinterpret_cast<int64_t>(ad.data + of_a)}),
        b_ptr({reinterpret_cast<int64_t>(bd.data + of_b)});
    OnDevice<int32_t> ranks({rank});
    OnDevice<float> scales({0.5f});
    const Batch batch(std::vector<int>(kRows, 0));
    const OnDevice<int32_t> order(batch.order), adapter(batch.adapter), start(batch.start);
    punica::AddLoraParams p;
    p.y = view(yd.data + of_y, kDType<T>, {kRows, h_out});
    p.x = view(xd.data + of_x, kDType<T>, {kRows, h_in});
    p.a_ptr = view(a_ptr.data, DType::kInt64, {1, 1});
    p.b_ptr = view(b_ptr.data, DType::kInt64, {1, 1});
    p.ranks = view(ranks.data, DType::kInt32, {1});
    p.scales = view(scales.data, DType::kFloat32, {1});
    p.batch.order = view(order.data, DType::kInt32, {kRows});
    p.batch.segment_adapter = view(adapter.data, DType::kInt32, {1});
    p.batch.segment_start = view(start.data, DType::kInt32, {2});
    p.slice_offsets[1] = h_out;
    const punica::Status status = punica::cuda::add_lora(p, {});
    if (!status.ok()) fail("alignment: " + status.message());
    must(cudaDeviceSynchronize());
    std::vector<T> got = yd.get();
    got = std::vector<T>(got.begin() + of_y, got.begin() + of_y + y.size());
    ++g_checks;
    if (offset == 0) {
      first = got;
    } else if (std::memcmp(first.data(), got.data(), got.size() * sizeof(T)) != 0) {
      fail(std::string("alignment changes bits: ") + punica::dtype_name(kDType<T>) + " " + g_case + " offset " +
           std::to_string(offset));
    }
  }
}

// Tables that hold anything: nothing outside of y's rows may change (and, under compute-sanitizer, be read).
template <class T>
void garbage_case(int turn) {
  if (!in_part()) return;
  g_case = "garbage " + std::to_string(turn);
  announce(g_case);
  Random random{static_cast<uint64_t>(turn) * 77 + 5};
  const int64_t rows = 1 + random.next() % (turn % 4 == 3 ? 200 : 40), capacity = rows + random.next() % 9, h_in = 96,
                width = 80;
  const int64_t segments = turn % 3 == 0 ? 200 : 1 + random.next() % 40, adapters = 3;
  const auto any = [&] {
    const uint32_t kind = random.next() % 8;
    return kind < 5    ? static_cast<int32_t>(random.next() % 12)
           : kind == 5 ? -static_cast<int32_t>(random.next() % 5)
                       : static_cast<int32_t>(random.next());
  };
  std::vector<int32_t> order(capacity), adapter(segments), start(segments + 1), ranks(adapters);
  for (std::vector<int32_t>* all : {&order, &adapter, &start, &ranks}) {
    for (int32_t& v : *all) v = any();
  }
  OnDevice<int32_t> od(order), ad(adapter), sd(start), rd(ranks);
  OnDevice<float> scales(std::vector<float>(adapters, 1.0f));
  const OnDevice<T> weights(std::vector<T>(16 * 96, from<T>(1.0f)));
  OnDevice<int64_t> ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(weights.data)));
  const int64_t guard = 64;
  const std::vector<T> before((rows + 2) * width + 2 * guard, from<T>(1.0f));
  OnDevice<T> xd(std::vector<T>(rows * h_in, from<T>(1.0f))), yd(before);
  punica::AddLoraParams p;
  p.y = view(yd.data + guard, kDType<T>, {rows, width});
  p.x = view(xd.data, kDType<T>, {rows, h_in});
  p.a_ptr = p.b_ptr = view(ptr.data, DType::kInt64, {1, adapters});
  p.ranks = view(rd.data, DType::kInt32, {adapters});
  p.scales = view(scales.data, DType::kFloat32, {adapters});
  p.batch.order = view(od.data, DType::kInt32, {capacity});
  p.batch.segment_adapter = view(ad.data, DType::kInt32, {segments});
  p.batch.segment_start = view(sd.data, DType::kInt32, {segments + 1});
  p.slice_offsets[1] = width;
  p.max_rank = 12;
  p.a_layer_stride = p.b_layer_stride = 0;
  const punica::Status status = punica::cuda::add_lora(p, {});
  if (!status.ok()) fail("garbage: " + status.message());
  must(cudaDeviceSynchronize());
  const std::vector<T> after = yd.get();
  ++g_checks;
  for (size_t i = 0; i < after.size(); ++i) {
    const bool inside = static_cast<int64_t>(i) >= guard && static_cast<int64_t>(i) < guard + rows * width;
    if (!inside && std::memcmp(&after[i], &before[i], sizeof(T)) != 0) {
      fail(g_case + ": wrote behind y");
      break;
    }
  }
}

// ---- What may be read before the kernel ahead has ended -------------------------------------------------------------

// Lets its dependents start at once and writes late.
__global__ void late_writer(float* to, float to_value, uint16_t* bits, size_t count, uint16_t word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const long long begin = clock64();
  while (clock64() - begin < 60000) {
  }
  for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
    if (to != nullptr) to[i] = to_value;
    if (bits != nullptr) bits[i] = word;
  }
}

// Everything is one; `what` is written by the kernel ahead.
// `adapters`, all with the same weights, take turns.
void ordering_case(const char* what, bool early_reads, int64_t rows, int adapters) {
  if (!in_part()) return;
  using T = __nv_bfloat16;
  g_case = std::string("order ") + what;
  announce(g_case);
  const int64_t h_in = 256, width = 128;
  const int rank = 16;
  const auto ones = [](size_t count, float v) { return std::vector<T>(count, from<T>(v)); };
  OnDevice<T> a(ones(rank * h_in, 1)), b(ones(width * rank, 1)), x(ones(rows * h_in, 1)), y(ones(rows * width, 1));
  OnDevice<int64_t> a_ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(a.data)));
  OnDevice<int64_t> b_ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(b.data)));
  OnDevice<int32_t> ranks(std::vector<int32_t>(adapters, rank));
  OnDevice<float> scales(std::vector<float>(adapters, 1.0f));
  std::vector<int> of_row(rows);
  for (int64_t t = 0; t < rows; ++t) of_row[t] = static_cast<int>(t % adapters);
  const Batch batch(of_row);
  const auto segments = static_cast<int64_t>(batch.adapter.size());
  const OnDevice<int32_t> order(batch.order), adapter(batch.adapter), start(batch.start);
  punica::AddLoraParams p;
  p.y = view(y.data, kDType<T>, {rows, width});
  p.x = view(x.data, kDType<T>, {rows, h_in});
  p.a_ptr = view(a_ptr.data, DType::kInt64, {1, adapters});
  p.b_ptr = view(b_ptr.data, DType::kInt64, {1, adapters});
  p.ranks = view(ranks.data, DType::kInt32, {adapters});
  p.scales = view(scales.data, DType::kFloat32, {adapters});
  p.batch.order = view(order.data, DType::kInt32, {rows});
  p.batch.segment_adapter = view(adapter.data, DType::kInt32, {segments});
  p.batch.segment_start = view(start.data, DType::kInt32, {segments + 1});
  p.slice_offsets[1] = width;
  p.max_rank = rank;
  punica::Context context;
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  context.stream = stream;
  context.early_reads = early_reads;
  const std::string which = what;
  const auto written = [&](OnDevice<T>& t) {
    late_writer<<<1, 256, 0, stream>>>(nullptr, 0, reinterpret_cast<uint16_t*>(t.data), t.count, 0x4000);  // 2.0
  };
  if (which == "x") written(x);
  if (which == "y") written(y);
  if (which == "A") written(a);
  if (which == "B") written(b);
  if (which == "scale") late_writer<<<1, 256, 0, stream>>>(scales.data, 2.0f, nullptr, scales.count, 0);
  const punica::Status status = punica::cuda::add_lora(p, context);
  if (!status.ok()) fail(g_case + ": " + status.message());
  must(cudaStreamSynchronize(stream));
  must(cudaStreamDestroy(stream));
  const float product = 256.0f * 16.0f;
  const float fresh = which == "y" ? product + 2 : 2 * product + 1, stale = product + 1;
  const bool late = early_reads && (which == "A" || which == "B" || which == "scale");
  // Only code made for sm_90 lets dependents start before its end.
  cudaFuncAttributes writer;
  must(cudaFuncGetAttributes(&writer, late_writer));
  const bool sm90 = punica::cuda::last_arch() != nullptr && std::string(punica::cuda::last_arch()) == "sm_90" &&
                    writer.ptxVersion >= 90;
  const float expected = value(from<T>(late && sm90 ? stale : fresh));
  // Early reads allow B to be read early; how much of it is asked for by then depends on the team.
  const float also = late && which == "B" && adapters > 1 ? value(from<T>(fresh)) : expected;
  ++g_checks;
  for (const T& got : y.get()) {
    if (value(got) != expected && value(got) != also) {
      fail(g_case + (early_reads ? " with" : " without") + " early reads: " + std::to_string(value(got)) +
           ", expected " + std::to_string(expected));
      break;
    }
  }
}

// Few and many segments of many rows.
template <class T>
void many_rows(const std::vector<int>& y_pads, Random& random) {
  for (const int64_t many : {600, 1500, 4100}) {
    Case c = {};
    c.rows = many;
    c.h_in = 512;
    c.offsets = {0, 640};
    for (const int count : {1, 5, 200, 900}) {
      c.ranks.assign(count, count == 5 ? 64 : 16);
      c.pattern = count == 200 ? 3 : 0;
      for (const int pad : y_pads) {
        c.y_pad = pad;
        run_case<T>(c, random);
      }
    }
  }
}

KernelCover g_cover;

// For compute-sanitizer: of all combinations of sizes around the limits between kernels, ranks, slices, alignments and
// early reads, as few and as small ones as launch every kernel that any of them does.
template <class T>
void run_small() {
  const std::vector<int> some_ranks[] = {{16, 8, 1}, {16, 16}, {8}, {17, 40, 0}, {32, 32}, {24, 64, 16}, {100, 8}};
  std::vector<Case> cases;
  for (const int64_t rows : {1, 9, 40, 130, 450, 2100}) {
    for (const int64_t h_in : {7, 64, 136, 520, 4104, 4160}) {
      for (const std::vector<int>& ranks : some_ranks) {
        // Long sums take long under a tool: only for the kernels that have their own.
        if (h_in > 4096 && ranks[0] != 8 && !(rows == 2100 && ranks[0] == 24)) continue;
        for (int kind = 0; kind < 32; ++kind) {
          Case c = {};
          c.rows = rows, c.h_in = h_in, c.ranks = ranks;
          c.offsets = kind & 1 ? std::vector<int64_t>{0, 40, 104, 112} : std::vector<int64_t>{8, 80};
          c.y_pad = static_cast<int>((8 - c.width() % 8) % 8);
          c.early_reads = kind & 2;
          if (kind & 4) c.offset = 1, c.x_pad = 3, c.y_pad += 1;
          if (kind & 8) c.padded = 104, c.x_pad += 8, c.y_pad += 8, c.spare = 3;
          if (kind & 16) c.rank_turn = 1, c.pattern = 3, c.null_address = ranks.size() > 2;
          c.few = rows > 40;
          cases.push_back(c);
        }
      }
    }
  }
  const auto cost = [](const Case& c) {
    const int64_t all = c.h_in + c.width() + c.y_pad, done = std::min<int64_t>(c.rows, 20);
    return done * c.largest_rank() * all + (c.rows + int64_t{c.slices()} * c.largest_rank() * 2) * all;
  };
  std::stable_sort(cases.begin(), cases.end(), [&](const Case& a, const Case& b) { return cost(a) < cost(b); });
  Random random{7};
  for (const Case& c : cases) {
    std::vector<std::string> kernels;
    {
      const LaunchRecorder recorder;
      auto p = params_of<T>(c, static_cast<T*>(nowhere()) + c.offset, static_cast<T*>(nowhere()) + c.offset, c.rows,
                            nowhere(), nowhere(), nowhere(), nowhere());
      const int64_t segments = std::min<int64_t>(c.rows, static_cast<int64_t>(c.ranks.size()) + c.few) + c.spare;
      p.batch.order = view(nowhere(), DType::kInt32, {c.rows + c.spare});
      p.batch.segment_adapter = view(nowhere(), DType::kInt32, {segments});
      p.batch.segment_start = view(nowhere(), DType::kInt32, {segments + 1});
      punica::Context context;
      context.early_reads = c.early_reads;
      if (const punica::Status status = punica::cuda::add_lora(p, context); !status.ok()) fail(status.message());
      kernels = recorder.kernels();
    }
    if (g_cover.needs(kernels, {c.early_reads ? "early" : "in order", c.offset ? "unaligned" : "aligned",
                                c.padded ? "padded" : "dense", c.rank_turn ? "turned" : "straight",
                                c.slices() > 1 ? "slices" : "a slice", "rank " + std::to_string(c.ranks[0]),
                                c.rows > 1 ? "rows" : "a row"})) {
      run_case<T>(c, random);
    }
  }
  for (int i = 0; with_garbage() && i < 10; ++i) garbage_case<T>(i);
}

template <class T>
void run_all() {
  if (g_small) return run_small<T>();
  Random random{11};
  const std::vector<int> mixed = {8, 16, 32, 64, 1, 17, 40, 0}, even = {16, 16, 16, 16, 16};
  const int64_t rows[] = {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 300};
  int turn = 0;
  for (const int64_t h_in : {1, 7, 64, 100, 1024, 4096, 4099, 14336}) {
    for (const int rank : {1, 8, 16, 17, 32, 33, 64, 100, 128, 512}) {
      if (h_in * rank > 1100000) continue;
      const int64_t width = turn % 4 == 0 ? 4096 : turn % 4 == 1 ? 72 : turn % 4 == 2 ? 1000 : 333;
      for (size_t i = 0; i < std::size(rows); ++i) {
        if ((i + turn) % (h_in * rank > 70000 ? 13 : 5) != 0) continue;
        const int kind = (turn + static_cast<int>(i)) % 6;
        Case c = {};
        c.rows = rows[i];
        c.h_in = h_in;
        c.offsets = {kind == 2 ? 8 : kind == 4 ? 3 : 0};
        c.offsets.push_back(c.offsets[0] + width);
        c.ranks = {rank, rank, rank};
        c.x_pad = kind == 1 ? 8 : kind == 3 ? 1 : 0;
        c.y_pad = kind == 1 ? static_cast<int>(8 - (width + 3) % 8) : kind == 3 ? 2 : 0;
        c.offset = kind == 5 ? 1 : kind == 4 ? 4 : 0;
        c.pattern = kind % 4;
        c.spare = kind == 2 ? 3 : 0;
        c.early_reads = turn % 2 == 0;
        c.max_rank = kind == 0 ? 512 : 0;
        run_case<T>(c, random);
      }
      ++turn;
    }
  }
  // Mixed ranks, slices, padded slots, ranks by slice, addresses of none.
  for (size_t i = 0; i < std::size(rows); ++i) {
    const bool odd = i % 2 != 0;
    Case c = {};
    c.rows = rows[i];
    c.h_in = odd ? 1024 : 4096;
    c.offsets = {0, 512, 640, 768};
    c.ranks = mixed;
    c.rank_turn = odd ? 1 : 0;
    c.pattern = odd ? 0 : 3;
    c.spare = odd ? 9 : 0;
    c.early_reads = odd;
    c.null_address = true;
    run_case<T>(c, random);
    c.padded = 64;
    c.pattern = 1;
    run_case<T>(c, random);
    c.padded = 68;
    c.offsets = {5, 5, 105, 400};
    c.y_pad = 5;
    run_case<T>(c, random);
    // An adapter a row, and one for all.
    c = {};
    c.rows = rows[i];
    c.h_in = 320;
    c.offsets = {0, 256};
    c.ranks.assign(rows[i], odd ? 16 : 24);
    c.pattern = 1;
    run_case<T>(c, random);
    c.pattern = 2;
    c.ranks.resize(1);
    run_case<T>(c, random);
  }
  // Ranks that are whole pieces of 16 bytes but no whole tiles, in slots of 64; more than one piece of K a leaf with an
  // adapter a row, on both sides of what chooses how many blocks share a tile.
  for (const int rank : {8, 16, 24, 40, 48, 56}) {
    Case c = {};
    c.rows = 11;
    c.h_in = 1032;
    c.offsets = {0, 200, 264};
    c.ranks = {rank, 16, rank};
    c.padded = 64;
    c.max_rank = 64;
    c.early_reads = rank % 16 == 0;
    run_case<T>(c, random);
  }
  for (const int64_t distinct : {33, 130}) {
    Case c = {};
    c.rows = distinct;
    c.h_in = 4160;
    c.offsets = {0, 32};
    if (distinct > 128) c.offsets = {0, 32, 40};
    c.ranks.assign(distinct, 16);
    c.pattern = 1;
    run_case<T>(c, random);
  }
  many_rows<T>({0}, random);
  for (const int v : {1, 2}) {
    for (const int64_t h_in : {512, 4096}) {
      Case c = {};
      c.rows = 9;
      c.h_in = h_in;
      c.offsets = {0, 100};
      c.ranks = {16, 8, 64};
      c.values = v;
      run_case<T>(c, random);
    }
  }
  const int shapes[][3] = {{64, 64, 16}, {4096, 128, 16}, {512, 100, 8}, {136, 72, 40}, {100, 33, 17}, {256, 130, 128}};
  for (const auto& s : shapes) alignment_case<T>(s[0], s[1], s[2]);
  for (int i = 0; i < 40; ++i) garbage_case<T>(i);
}

// Slices that turn with the case, in rows of y that start at multiples of 16 bytes.
void set_aligned_columns(Case* c, int turn) {
  c->offsets = turn % 3 == 0   ? std::vector<int64_t>{0, 1024}
               : turn % 3 == 1 ? std::vector<int64_t>{8, 520, 648, 712}
                               : std::vector<int64_t>{0, 72, 1000};
  c->y_pad = static_cast<int>((8 - (c->offsets.back() + 3) % 8) % 8);
}

// Many rows, everything aligned to 16 bytes or not.
template <class T>
void run_many() {
  Random random{13};
  if (g_small) return;
  many_rows<T>({0, 5}, random);
  // Rows of y are aligned from here on: a width of 3 modulo 8.
  int turn = 0;
  for (const int64_t h_in : {64, 1032, 4096, 6152}) {
    for (const std::vector<int>& ranks :
         {std::vector<int>{16, 16, 16}, {8}, {32, 32}, {64, 64, 64, 64, 64}, {8, 16, 32, 64, 1, 17, 40, 0}}) {
      Case c = {};
      c.rows = turn % 2 == 0 ? 2100 : 1100;
      c.h_in = h_in;
      set_aligned_columns(&c, turn);
      c.ranks = ranks;
      c.rank_turn = turn % 2;
      c.pattern = turn % 4;
      c.padded = turn % 4 == 1 ? 64 : turn % 7 == 6 ? 68 : 0;
      c.early_reads = turn % 2 == 1;
      c.null_address = ranks.size() > 2 && turn % 5 == 4;
      c.spare = turn % 3;
      run_case<T>(c, random);
      ++turn;
    }
  }
  for (const int v : {1, 2}) {
    Case c = {};
    c.rows = 2100;
    c.h_in = v == 1 ? 512 : 4096;
    c.offsets = {0, 64};
    c.y_pad = 5;
    c.ranks = {16, 8, 64};
    c.values = v;
    run_case<T>(c, random);
  }
}

// Few rows an adapter, x and y aligned to 16 bytes: the plain way, with weights that are aligned or not.
template <class T>
void run_few() {
  Random random{17};
  int turn = 0;
  for (const int64_t h_in : {8, 64, 1032, 4096, 6152}) {
    for (const std::vector<int>& ranks :
         {std::vector<int>{16, 16, 16}, {8}, {32, 32}, {64, 64, 64, 64, 64}, {8, 16, 32, 64, 1, 17, 40, 0}, {}}) {
      if (g_small && h_in > 100) continue;
      const int64_t rows[] = {1, 5, 16, 37, 64, 130};
      for (int i = turn % 3; i < 6; i += 3) {
        if (g_small && rows[i] > 40) continue;
        Case c = {};
        c.rows = rows[i];
        c.h_in = h_in;
        set_aligned_columns(&c, turn);
        c.ranks = ranks;
        if (ranks.empty()) c.ranks.assign(rows[i], turn % 2 == 0 ? 16 : 24);  // an adapter a row
        c.rank_turn = turn / 2 % 2;
        c.pattern = ranks.empty() ? 1 : (turn + i) % 4;
        c.padded = turn % 4 == 1 ? 64 : turn % 7 == 6 ? 68 : 0;
        c.early_reads = (turn + i) % 2 == 1;
        c.null_address = ranks.size() > 2 && turn % 5 == 4;
        c.spare = turn % 3;
        c.max_rank = turn % 5 == 0 ? 64 : 0;
        run_case<T>(c, random);
        ++turn;
      }
    }
  }
}

}  // namespace

int main(int argc, char**) {
  g_small = argc > 1;  // any argument
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
  section("bfloat16, few rows an adapter", run_few<__nv_bfloat16>);
  section("float16, few rows an adapter", run_few<__half>);
  section("bfloat16, many rows", run_many<__nv_bfloat16>);
  section("float16, many rows", run_many<__half>);
  section("bfloat16", run_all<__nv_bfloat16>);
  section("float16", run_all<__half>);
  section("float32", run_all<float>);
  section("order", [] {
    if (g_small) return;  // a tool lets no kernel start before the one ahead has ended
    for (const char* what : {"x", "y", "A", "B", "scale"}) {
      for (const bool early : {false, true}) {
        ordering_case(what, early, 5, 1);
        ordering_case(what, early, 130, 65);
      }
    }
  });
  Cases::get().finish();
  if (Cases::get().idle()) return 0;
  if (!launched_only(arch)) {
    fail("the kernels that ran are not those of " + std::string(punica::cuda::arch_name(arch)));
  }
  std::printf("%s: %d checks, %d failures\n", punica::cuda::arch_name(arch), g_checks, g_failures);
  return g_failures == 0 && g_checks > 0 ? 0 : 1;
}
