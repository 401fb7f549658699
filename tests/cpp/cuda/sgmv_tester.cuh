// What sgmv_test.cu is made of: tensors filled on the device, a naive product in float64 beside, and what a case runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/launches.h"
#include "tests/cpp/cuda/part.h"

namespace {

using punica::Context;
using punica::Device;
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

constexpr int kAdapters = 4;
constexpr int64_t kLayers = 2, kLayer = 1;
// Elements around tensors; none for memcheck, which sees what lies outside allocations.
int64_t g_guard = 64;
bool g_small = false;

template <class T>
__device__ float as_float(T value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

template <class T>
__device__ T as_type(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// In [-1, 1), a function of the seed and the index.
__device__ float random_value(uint32_t seed, uint64_t index) {
  uint64_t h = (index + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  h ^= h >> 32;
  h *= 0xD6E8FEB86659FD93ull;
  h ^= h >> 32;
  h *= 0xD6E8FEB86659FD93ull;
  h ^= h >> 32;
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(h))) * 0x1p-31f;
}

// A [rows, columns] matrix with a row stride, rows with keep[row] == 0 and the rest of the buffer NaN (or a pattern).
template <class T>
__global__ void fill_matrix(T* base, int64_t total, int64_t offset, int64_t stride, int64_t rows, int64_t columns,
                            uint32_t seed, float scale, const int* keep, float rest) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = i - offset;
    const int64_t row = at >= 0 ? at / stride : -1, column = at >= 0 ? at % stride : 0;
    const bool inside = row >= 0 && row < rows && column < columns && (keep == nullptr || keep[row] != 0);
    base[i] = as_type<T>(inside ? scale * random_value(seed, row * columns + column) : rest);
  }
}

struct Failures {
  unsigned long long count;
  long long row, column;
  double got, want, allowed;
};

__device__ void report(Failures* failures, int64_t row, int64_t column, double got, double want, double allowed) {
  if (atomicAdd(&failures->count, 1ull) == 0) {
    failures->row = row;
    failures->column = column;
    failures->got = got;
    failures->want = want;
    failures->allowed = allowed;
  }
}

// y is what the op made, y_before what it was given; weights[row] 0: no segment has the row.
template <class T>
__global__ void compare(const T* y, const T* y_before, int64_t y_stride, const T* x, int64_t x_stride,
                        const int64_t* weights, bool in_out, int64_t rows, int64_t d_in, int64_t d_out, double unit,
                        double sum_unit, double tiny, Failures* failures) {
  for (int64_t id = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; id < rows * d_out;
       id += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = id / d_out, column = id % d_out;
    if (weights[row] == 0) continue;
    const T* w = reinterpret_cast<const T*>(weights[row]) + kLayer * d_in * d_out;
    const double old = as_float(y_before[row * y_stride + column]);
    double sum = old, magnitude = fabs(old);
    for (int64_t k = 0; k < d_in; ++k) {
      const double term = static_cast<double>(as_float(x[row * x_stride + k])) *
                          static_cast<double>(as_float(in_out ? w[k * d_out + column] : w[column * d_in + k]));
      sum += term;
      magnitude += fabs(term);
    }
    const double got = as_float(y[row * y_stride + column]);
    const double allowed = unit * fabs(sum) + sum_unit * magnitude + tiny;
    if (!(fabs(got - sum) <= allowed)) report(failures, row, column, got, sum, allowed);
  }
}

// Bits of the rows that segments have, and, for whole buffers, of everything else.
template <class T>
__global__ void same_bits(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t rows, int64_t columns,
                          const int* keep, Failures* failures) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  for (int64_t id = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; id < rows * columns;
       id += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = id / columns, column = id % columns;
    if (keep != nullptr && keep[row] == 0) continue;
    const T va = a[row * a_stride + column], vb = b[row * b_stride + column];
    if (reinterpret_cast<const Bits&>(va) != reinterpret_cast<const Bits&>(vb)) {
      report(failures, row, column, as_float(va), as_float(vb), 0);
    }
  }
}

// Everything in a buffer but the kept rows of the matrix in it must be as before.
template <class T>
__global__ void same_outside(const T* a, const T* before, int64_t total, int64_t offset, int64_t stride, int64_t rows,
                             int64_t columns, const int* keep, Failures* failures) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = i - offset;
    const int64_t row = at >= 0 ? at / stride : -1, column = at >= 0 ? at % stride : 0;
    if (row >= 0 && row < rows && column < columns && (keep == nullptr || keep[row] != 0)) continue;
    if (reinterpret_cast<const Bits&>(a[i]) != reinterpret_cast<const Bits&>(before[i])) {
      report(failures, row, column, as_float(a[i]), as_float(before[i]), -1);
    }
  }
}

template <class T>
class Buffer {
 public:
  T* reserve(int64_t count) {
    if (count > count_ || (g_small && count != count_)) {
      if (data_ != nullptr) CHECK_CUDA(cudaFree(data_));
      CHECK_CUDA(cudaMalloc(&data_, count * sizeof(T)));
      count_ = count;
    }
    return data_;
  }
  T* upload(const std::vector<T>& values) {
    reserve(static_cast<int64_t>(values.size()) + !g_small);
    CHECK_CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

struct Segment {
  int start, end, adapter;
};

constexpr int kThreads = 256;
int g_blocks = 1056;

template <class T>
class Tester {
 public:
  Tester(DType dtype, const char* name) : dtype_(dtype), name_(name) {
    CHECK_CUDA(cudaMalloc(&failures_, sizeof(Failures)));
  }

  bool run(SgmvWeights layout, int64_t d_in, int64_t d_out,
           const std::vector<int>& lengths = {1, 2, 15, 16, 17, 63, 0, 64, 65, 200, 1}) {
    if (!in_part()) return true;
    layout_ = layout, d_in_ = d_in, d_out_ = d_out;
    announce(describe("whole"));
    bool ok = true;
    std::vector<Segment> segments;
    int rows = 3;
    for (int i = 0; i < static_cast<int>(lengths.size()); ++i) {
      segments.push_back({rows, rows + lengths[i], i % kAdapters});
      rows += lengths[i] + (i % 3 == 1 ? 2 : 0);
    }
    rows += 5;
    rows_ = rows;
    std::vector<int> keep(rows, 0), adapter(rows, -1);
    for (const Segment& s : segments) {
      for (int row = s.start; row < s.end; ++row) keep[row] = 1, adapter[row] = s.adapter;
    }
    keep_.upload(keep);

    // As aligned as can be, rows dense.
    Layout base;
    base.x_stride = d_in, base.y_stride = d_out;
    place(base, y_before_);
    const T* y0 = call(segments, false, "dense");
    if (y0 == nullptr) return false;
    ok = product(y0, adapter, "product") && ok;
    ok = outside("dense") && ok;
    // Keep the result to compare bits with.
    want_.reserve(rows * d_out);
    CHECK_CUDA(cudaMemcpy(want_.data(), y0, rows * d_out * sizeof(T), cudaMemcpyDeviceToDevice));

    place(base, y_before_);
    ok = bits(call(segments, true, "early reads"), "early reads") && ok;

    // The same rows in segments of other lengths; of one row each; alone.
    for (const int length : {1, 7, 65}) {
      std::vector<Segment> cut;
      for (const Segment& s : segments) {
        for (int row = s.start; row < s.end; row += length)
          cut.push_back({row, std::min(s.end, row + length), s.adapter});
      }
      // Not in ascending order either.
      for (size_t i = 0; i + 1 < cut.size(); i += 3) std::swap(cut[i], cut[i + 1]);
      place(base, y_before_);
      const std::string what = "segments of " + std::to_string(length);
      ok = bits(call(cut, false, what.c_str()), what.c_str()) && outside(what.c_str()) && ok;
    }
    for (const int pick : {4, 9, 40}) {
      const int row = segments[1].start + pick;
      if (adapter[row] < 0) continue;
      place(base, y_before_);
      ok = alone(row, adapter[row]) && ok;
    }

    // Rows of wider tensors, and every alignment down to the element.
    for (const int shift : {1, 2, 4, 3}) {
      Layout shifted;
      shifted.x_stride = d_in + 8 * shift + (shift == 1 ? 1 : 0);
      shifted.y_stride = d_out + 8 * shift + (shift == 3 ? 1 : 0);
      shifted.shift = shifted.y_shift = shifted.w_shift = shift;
      place(shifted, y_before_);
      ok = bits(call(segments, shift % 2 == 0, "shifted"), "shifted") && outside("shifted") && ok;
    }

    // Weights alone.
    for (const int shift : {1, 4}) {
      Layout shifted = base;
      shifted.w_shift = shift;
      place(shifted, y_before_);
      ok = bits(call(segments, shift == 4, "weights shifted"), "weights shifted") && outside("weights shifted") && ok;
    }

    // Tables of garbage: nothing but rows of y may change.
    Layout spaced = base;
    spaced.x_stride += 8, spaced.y_stride += 8;
    place(spaced, y_before_);
    std::vector<Segment> garbage;
    uint32_t state = 12345;
    const auto next = [&] { return state = state * 1664525u + 1013904223u; };
    const int extremes[] = {-1, -2147483647 - 1, 2147483647, 0, rows, rows + 1, -64, 63};
    for (int i = 0; i < 90; ++i) {
      const int a = i % 3 == 0   ? static_cast<int>(next())
                    : i % 3 == 1 ? extremes[next() / 65536 % 8]
                                 : static_cast<int>(next() / 65536 % rows);
      const int b = i % 2 == 0 ? static_cast<int>(next()) : extremes[next() / 65536 % 8];
      garbage.push_back({a, b, i % kAdapters});
    }
    std::vector<int> all(rows, 1);
    keep_.upload(all);
    for (const int count : {5, 32, 90}) {
      if (call({garbage.begin(), garbage.begin() + count}, false, "garbage tables") == nullptr) return false;
      ok = outside("garbage tables") && ok;
    }
    return ok;
  }

  // A case of the small suite.
  struct Small {
    SgmvWeights layout;
    int64_t d_in, d_out;
    std::vector<int> lengths;
    int rows;   // of x and y, most of which may belong to no segment: the number decides which kernel runs
    int shift;  // elements that spoil the alignment; 4: of x and W alone, to 8 bytes
    bool early;
    bool garbage;  // in s_start and s_end
    // By what is computed, in tiles of 16 rows, and what is filled. Garbage makes segments of any rows.
    int64_t cost() const {
      int64_t work = garbage ? rows : 16;
      for (const int length : lengths) work += garbage ? 16 : (length + 15) / 16 * 16;
      return work * (d_in + 16) * (d_out + 16) + rows * (d_in + d_out);
    }
  };

  // The kernels that it would launch.
  std::vector<std::string> kernels(const Small& c) {
    const LaunchRecorder recorder;
    layout_ = c.layout, d_in_ = c.d_in, d_out_ = c.d_out;
    const int64_t count = static_cast<int64_t>(c.lengths.size());
    const Layout layout = layout_of(c);
    SgmvParams p;
    p.weights = c.layout;
    p.y = view(static_cast<T*>(nowhere()) + layout.y_shift, dtype_, {c.rows, d_out_}, layout.y_stride);
    p.x = view(static_cast<T*>(nowhere()) + layout.shift, dtype_, {c.rows, d_in_}, layout.x_stride);
    p.w_ptr = view(nowhere(), DType::kInt64, {count});
    p.s_start = p.s_end = view(nowhere(), DType::kInt32, {count});
    p.layer_idx = kLayer;
    Context context;
    context.early_reads = c.early;
    if (const punica::Status status = punica::cuda::sgmv(p, context); !status.ok()) {
      std::printf("FAIL %s\n", status.message().c_str());
      std::exit(2);
    }
    return recorder.kernels();
  }

  bool run_small(const Small& c) {
    if (!in_part()) return true;
    layout_ = c.layout, d_in_ = c.d_in, d_out_ = c.d_out, rows_ = c.rows;
    announce(describe(c.garbage ? "garbage" : "small") + " segments " + std::to_string(c.lengths.size()) + " rows " +
             std::to_string(c.rows) + " shift " + std::to_string(c.shift) + " early " + std::to_string(c.early));
    std::vector<Segment> segments;
    std::vector<int> keep(rows_, 0), adapter(rows_, -1);
    int row = std::min(3, c.rows - 1);
    for (size_t i = 0; i < c.lengths.size(); ++i) {
      const int end = std::min(row + c.lengths[i], c.rows);
      segments.push_back({row, end, static_cast<int>(i) % kAdapters});
      for (; row < end; ++row) keep[row] = 1, adapter[row] = segments.back().adapter;
      row = std::min(row + static_cast<int>(i % 3), c.rows);
    }
    keep_.upload(keep);
    const Layout layout = layout_of(c);
    place(layout, y_before_);
    if (c.garbage) {
      const int values[] = {-1, -2147483647 - 1, 2147483647, 0, c.rows, c.rows + 1, -64, c.rows - 63, 5};
      for (size_t i = 0; i < segments.size(); ++i)
        segments[i] = {values[i * 5 % 9], values[(i * 7 + 1) % 9], segments[i].adapter};
      keep_.upload(std::vector<int>(rows_, 1));
      return call(segments, c.early, "garbage") != nullptr && outside("garbage");
    }
    const T* const y = call(segments, c.early, "small");
    if (y == nullptr) return false;
    return product(y, adapter, "small") && outside("small");
  }

  int64_t calls() const { return calls_; }

 private:
  struct Layout {
    int64_t x_stride = 0, y_stride = 0;
    int shift = 0, y_shift = 0, w_shift = 0;  // elements from a multiple of 16 bytes to x, y and W
  };

  static Layout layout_of(const Small& c) {
    const bool y_too = c.shift != 4;
    return {c.d_in + (c.shift == 0 ? 0
                      : y_too      ? 8 * c.shift + 1
                                   : 4),
            c.d_out + (y_too ? c.shift : 8), c.shift, y_too ? c.shift : 0, c.shift};
  }

  // The rows of y that have an adapter against exact products.
  bool product(const T* y, const std::vector<int>& adapter, const char* what) {
    std::vector<int64_t> row_weights(adapter.size(), 0);
    for (size_t row = 0; row < adapter.size(); ++row) {
      if (adapter[row] >= 0) row_weights[row] = reinterpret_cast<int64_t>(w_[adapter[row]]);
    }
    row_weights_.upload(row_weights);
    const double unit = dtype_ == DType::kFloat32   ? 0x1p-24 * 1.01
                        : dtype_ == DType::kFloat16 ? 0x1p-11 * 1.01
                                                    : 0x1p-8 * 1.01;
    const double sum_unit = (dtype_ == DType::kFloat32 ? 4 : 16) * 0x1p-24;
    clear();
    compare<T><<<g_blocks, kThreads>>>(y, y_before_.data() + y_offset_, y_stride_, x_, x_stride_, row_weights_.data(),
                                       layout_ == SgmvWeights::kInOut, rows_, d_in_, d_out_, unit, sum_unit,
                                       dtype_ == DType::kFloat16 ? 0x1p-24 : 0.0, failures_);
    return passed(what);
  }

  // Fills x, y and the weights, all functions of logical indices.
  void place(const Layout& layout, Buffer<T>& before) {
    const int shift = layout.shift, w_shift = layout.w_shift;
    const float nan = std::nanf("");
    x_stride_ = layout.x_stride, y_stride_ = layout.y_stride;
    const int64_t x_total = rows_ * x_stride_ + 2 * g_guard + shift;
    T* x = x_buffer_.reserve(x_total);
    fill_matrix<T>
        <<<g_blocks, kThreads>>>(x, x_total, g_guard + shift, x_stride_, rows_, d_in_, 1, 1.0f, keep_.data(), nan);
    x_ = x + g_guard + shift;
    y_total_ = rows_ * y_stride_ + 2 * g_guard + layout.y_shift;
    y_offset_ = g_guard + layout.y_shift;
    T* y = y_buffer_.reserve(y_total_);
    before.reserve(y_total_);
    fill_matrix<T><<<g_blocks, kThreads>>>(y, y_total_, y_offset_, y_stride_, rows_, d_out_, 2, 4.0f, nullptr, 7.0f);
    CHECK_CUDA(cudaMemcpyAsync(before.data(), y, y_total_ * sizeof(T), cudaMemcpyDeviceToDevice));
    const int64_t size = d_in_ * d_out_;
    const int64_t w_total = kLayers * size + 2 * g_guard + w_shift;
    for (int i = 0; i < kAdapters; ++i) {
      const int64_t key = size * 8 + w_shift * 2 + 1;
      T* w = w_buffers_[i].reserve(w_total);
      w_[i] = w + g_guard + w_shift;
      if (w_key_[i] == key && !g_small) continue;  // read only, so as it was
      // Layer kLayer is one row of a matrix whose other rows are NaN.
      fill_matrix<T><<<g_blocks, kThreads>>>(w, w_total, g_guard + w_shift + kLayer * size, size, 1, size, 10 + i, 1.0f,
                                             nullptr, nan);
      w_key_[i] = key;
    }
    CHECK_CUDA(cudaGetLastError());
  }

  TensorView view(void* data, DType dtype, std::vector<int64_t> shape, int64_t stride = 0) const {
    TensorView v;
    v.data = data, v.dtype = dtype, v.device = {DeviceType::kCuda, 0}, v.rank = static_cast<int>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) v.shape[i] = shape[i], v.stride[i] = 1;
    if (shape.size() == 2) v.stride[0] = stride;
    return v;
  }

  const T* call(const std::vector<Segment>& segments, bool early, const char* what, int64_t first_row = 0,
                int64_t rows = -1) {
    if (rows < 0) rows = rows_;
    std::vector<int64_t> w_ptr;
    std::vector<int32_t> start, end;
    for (const Segment& s : segments) {
      w_ptr.push_back(reinterpret_cast<int64_t>(w_[s.adapter]));
      start.push_back(s.start), end.push_back(s.end);
    }
    const int64_t count = static_cast<int64_t>(segments.size());
    SgmvParams p;
    p.weights = layout_;
    p.y = view(y_buffer_.data() + y_offset_ + first_row * y_stride_, dtype_, {rows, d_out_}, y_stride_);
    p.x = view(x_ + first_row * x_stride_, dtype_, {rows, d_in_}, x_stride_);
    p.w_ptr = view(w_ptr_.upload(w_ptr), DType::kInt64, {count});
    p.s_start = view(start_.upload(start), DType::kInt32, {count});
    p.s_end = view(end_.upload(end), DType::kInt32, {count});
    p.layer_idx = kLayer;
    Context context;
    context.early_reads = early;
    ++calls_;
    CHECK_CUDA(cudaDeviceSynchronize());  // early reads: nothing in flight writes what they read
    const punica::Status status = punica::cuda::sgmv(p, context);
    const cudaError_t error = cudaDeviceSynchronize();
    if (!status.ok() || error != cudaSuccess) {
      std::printf("FAIL %s: %s %s\n", describe(what).c_str(), status.message().c_str(), cudaGetErrorString(error));
      if (error != cudaSuccess) std::exit(2);
      return nullptr;
    }
    return y_buffer_.data() + y_offset_;
  }

  bool alone(int row, int adapter) {
    if (call({{0, 1, adapter}}, false, "alone", row, 1) == nullptr) return false;
    clear();
    same_bits<T><<<1, kThreads>>>(y_buffer_.data() + y_offset_ + row * y_stride_, y_stride_,
                                  want_.data() + row * d_out_, d_out_, 1, d_out_, nullptr, failures_);
    return passed("one row alone");
  }

  bool bits(const T* y, const char* what) {
    if (y == nullptr) return false;
    clear();
    same_bits<T><<<g_blocks, kThreads>>>(y, y_stride_, want_.data(), d_out_, rows_, d_out_, keep_.data(), failures_);
    return passed(("bits, " + std::string(what)).c_str());
  }

  bool outside(const char* what) {
    clear();
    same_outside<T><<<g_blocks, kThreads>>>(y_buffer_.data(), y_before_.data(), y_total_, y_offset_, y_stride_, rows_,
                                            d_out_, keep_.data(), failures_);
    return passed(("what is not its own, " + std::string(what)).c_str());
  }

  void clear() { CHECK_CUDA(cudaMemset(failures_, 0, sizeof(Failures))); }

  bool passed(const char* what) {
    Failures f;
    CHECK_CUDA(cudaMemcpy(&f, failures_, sizeof(f), cudaMemcpyDeviceToHost));
    if (f.count == 0) return true;
    std::printf("FAIL %s: %llu elements, one of them row %lld column %lld: got %.9g, want %.9g, allowed %.3g\n",
                describe(what).c_str(), f.count, f.row, f.column, f.got, f.want, f.allowed);
    return false;
  }

  std::string describe(const char* what) const {
    return std::string(name_) + (layout_ == SgmvWeights::kInOut ? " sgmv_cutlass " : " sgmv_shrink ") +
           std::to_string(d_in_) + " -> " + std::to_string(d_out_) + " (" + what + ")";
  }

  DType dtype_;
  const char* name_;
  SgmvWeights layout_ = SgmvWeights::kOutIn;
  int64_t d_in_ = 0, d_out_ = 0, rows_ = 0, x_stride_ = 0, y_stride_ = 0, y_total_ = 0, y_offset_ = 0, calls_ = 0;
  Buffer<T> x_buffer_, y_buffer_, y_before_, want_, w_buffers_[kAdapters];
  Buffer<int64_t> w_ptr_, row_weights_;
  Buffer<int32_t> start_, end_, keep_;
  T* x_ = nullptr;
  T* w_[kAdapters] = {};
  int64_t w_key_[kAdapters] = {};
  Failures* failures_ = nullptr;
};

}  // namespace
