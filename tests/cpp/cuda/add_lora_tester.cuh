// What add_lora_test.cu is made of: weights, batches and views on the device, the reference in float64, and what a case
// runs.
#pragma once

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
#include "tests/cpp/cuda/elements.cuh"
#include "tests/cpp/cuda/launches.h"
#include "tests/cpp/cuda/part.h"

namespace {

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
  int pattern = 0;  // of the rows' adapters: 0 at random, 1 in turn, 2 all the first, 3 at random with rows without,
                    // 4 neighbours alike, the last adapter first
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
                : c.pattern == 4 ? static_cast<int>(adapters - 1 - t * adapters / c.rows)
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

}  // namespace
