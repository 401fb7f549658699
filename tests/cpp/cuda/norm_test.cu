// rms_norm on a CUDA device, against float64 on the CPU and against itself: the bits of a row are the same alone, in a
// batch, with strided or misaligned rows and in place. PUNICA_CUDA_ARCH chooses the code path. Exits with 1 on
// failure, with 77 where the device does not have that path or there is none.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/launches.h"
#include "tests/cpp/cuda/part.h"

namespace {

using punica::DType;
using punica::TensorView;

int g_failures = 0;
int g_checks = 0;

void expect(bool ok, const std::string& what) {
  ++g_checks;
  if (ok) return;
  if (++g_failures <= 40) std::printf("FAILED: %s\n", what.c_str());
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
struct Type;
template <>
struct Type<__half> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr double kRtol = 2e-3;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr double kRtol = 1.6e-2;
};
template <>
struct Type<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
  static constexpr double kRtol = 2e-6;
};

template <class T>
T rounded(float value) {
  return static_cast<T>(value);
}

// Rows in device memory: `offset` elements past a 16-byte boundary, `stride` apart, bytes of kGuard in between, before
// and behind.
constexpr unsigned char kGuard = 0xA5;
// Elements, a multiple of 16 bytes; none for memcheck, which sees what lies outside allocations.
int64_t g_margin = 64;

template <class T>
class Rows {
 public:
  Rows(int64_t rows, int64_t columns, int64_t stride, int64_t offset)
      : rows_(rows), columns_(columns), stride_(stride), first_(g_margin + offset) {
    bytes_ = (first_ + rows * stride + g_margin) * sizeof(T);
    check_cuda(cudaMalloc(&memory_, bytes_), "cudaMalloc");
    check_cuda(cudaMemset(memory_, kGuard, bytes_), "cudaMemset");
  }
  Rows(const std::vector<T>& values, int64_t rows, int64_t columns, int64_t stride, int64_t offset)
      : Rows(rows, columns, stride, offset) {
    check_cuda(cudaMemcpy2D(memory_ + first_, stride * sizeof(T), values.data(), columns * sizeof(T),
                            columns * sizeof(T), rows, cudaMemcpyHostToDevice),
               "copy to the device");
  }
  ~Rows() { cudaFree(memory_); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  TensorView view(int64_t row = 0, int64_t count = -1) const {
    TensorView v;
    v.data = memory_ + first_ + row * stride_;
    v.dtype = Type<T>::kDType;
    v.device = {punica::DeviceType::kCuda, 0};
    v.rank = 2;
    v.shape[0] = count < 0 ? rows_ : count;
    v.shape[1] = columns_;
    v.stride[0] = stride_;
    v.stride[1] = 1;
    return v;
  }

  // The values; every byte beside them must be as it was.
  std::vector<T> read(const std::string& what) const {
    std::vector<unsigned char> all(bytes_);
    check_cuda(cudaMemcpy(all.data(), memory_, bytes_, cudaMemcpyDeviceToHost), "copy to the host");
    std::vector<T> values(rows_ * columns_);
    bool untouched = true;
    size_t at = 0;
    for (int64_t row = 0; row <= rows_; ++row) {
      const size_t begin = row < rows_ ? (first_ + row * stride_) * sizeof(T) : bytes_;
      for (; at < begin; ++at) untouched = untouched && all[at] == kGuard;
      if (row == rows_) break;
      std::memcpy(values.data() + row * columns_, all.data() + begin, columns_ * sizeof(T));
      at = begin + columns_ * sizeof(T);
    }
    expect(untouched, what + ": wrote beside the rows");
    return values;
  }

 private:
  int64_t rows_, columns_, stride_, first_;
  size_t bytes_;
  T* memory_ = nullptr;
};

template <class T>
bool same_bits(const T* a, const T* b, int64_t count) {
  return std::memcmp(a, b, count * sizeof(T)) == 0;
}

template <class T>
TensorView vector_view(const Rows<T>& rows) {
  TensorView v = rows.view();
  v.rank = 1;
  v.shape[0] = v.shape[1];
  v.stride[0] = 1;
  return v;
}

constexpr float kEpsilon = 1e-5f;

void run(const TensorView& output, const TensorView& input, const TensorView& weight, const TensorView& residual,
         const std::string& what, bool early_reads = false, float epsilon = kEpsilon) {
  punica::RmsNormParams params;
  params.output = output;
  params.input = input;
  params.weight = weight;
  params.residual = residual;
  params.epsilon = epsilon;
  punica::Context context;
  context.early_reads = early_reads;
  const punica::Status status = punica::cuda::rms_norm(params, context);
  expect(status.ok(), what + ": " + status.message());
  const cudaError_t error = cudaDeviceSynchronize();
  expect(error == cudaSuccess, what + ": " + cudaGetErrorString(error));
  if (error != cudaSuccess) std::exit(1);
}

template <class T>
struct Case {
  int64_t rows, columns;
  std::vector<T> x, weight, old;
  std::vector<T> output, output_residual, sums;  // the results that the other runs must repeat

  Case(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), x(rows * columns), weight(columns), old(rows * columns) {
    std::mt19937_64 random(rows * 1000003 + columns);
    announce(name(""));
    std::normal_distribution<float> normal;
    for (T& value : x) value = rounded<T>(normal(random));
    for (T& value : weight) value = rounded<T>(1 + 0.5f * normal(random));
    for (T& value : old) value = rounded<T>(3 * normal(random));
  }

  std::string name(const char* what) const {
    return std::string(Type<T>::kName) + " " + std::to_string(rows) + " x " + std::to_string(columns) + " " + what;
  }

  void compare(const std::vector<T>& ours, const std::vector<T>& in, const std::string& what) const {
    for (int64_t row = 0; row < rows; ++row) {
      double squares = 0, largest = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const double value = static_cast<float>(in[row * columns + c]);
        squares += value * value;
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(columns) + static_cast<double>(kEpsilon));
      std::vector<double> exact(columns);
      for (int64_t c = 0; c < columns; ++c) {
        exact[c] = static_cast<float>(in[row * columns + c]) * scale * static_cast<float>(weight[c]);
        largest = std::max(largest, std::abs(exact[c]));
      }
      for (int64_t c = 0; c < columns; ++c) {
        const double error = std::abs(static_cast<float>(ours[row * columns + c]) - exact[c]);
        if (error <= Type<T>::kRtol * (std::abs(exact[c]) + largest / 16)) continue;
        expect(false, what + ": row " + std::to_string(row) + " column " + std::to_string(c) + " is " +
                          std::to_string(static_cast<float>(ours[row * columns + c])) + ", exact " +
                          std::to_string(exact[c]));
        return;
      }
      expect(true, what);
    }
  }

  void check_reference() {
    const Rows<T> w(weight, 1, columns, columns, 0), in(x, rows, columns, columns, 0);
    const Rows<T> out(rows, columns, columns, 0), res(old, rows, columns, columns, 0);
    run(out.view(), in.view(), vector_view(w), {}, name("plain"));
    output = out.read(name("plain"));
    compare(output, x, name("plain"));
    run(out.view(), in.view(), vector_view(w), res.view(), name("residual"));
    output_residual = out.read(name("residual"));
    sums = res.read(name("residual"));
    bool right = true;
    for (size_t i = 0; i < sums.size(); ++i) {
      const T sum = rounded<T>(static_cast<float>(x[i]) + static_cast<float>(old[i]));
      right = right && same_bits(&sum, &sums[i], 1);
    }
    expect(right, name("residual: the sum"));
    compare(output_residual, sums, name("residual"));
  }

  void expect_same(const std::vector<T>& ours, const std::vector<T>& expected, const std::string& what) const {
    expect(ours.size() == expected.size() && same_bits(ours.data(), expected.data(), ours.size()),
           what + ": other bits");
  }

  // Each tensor has its own layout: what is fast for one must not be assumed for the others.
  void check_layout(int64_t in_offset, int64_t in_pad, int64_t out_offset, int64_t out_pad, int64_t w_offset,
                    bool early_reads) const {
    const std::string what =
        name(("offsets " + std::to_string(in_offset) + " " + std::to_string(out_offset) + " " +
              std::to_string(w_offset) + ", gaps " + std::to_string(in_pad) + " " + std::to_string(out_pad))
                 .c_str());
    const Rows<T> w(weight, 1, columns, columns, w_offset), in(x, rows, columns, columns + in_pad, in_offset);
    const Rows<T> out(rows, columns, columns + out_pad, out_offset),
        in_place(x, rows, columns, columns + in_pad, in_offset);
    const Rows<T> res(old, rows, columns, columns + out_pad, in_offset), res_in_place(old, rows, columns, columns, 0);
    run(out.view(), in.view(), vector_view(w), {}, what, early_reads);
    expect_same(out.read(what), output, what);
    expect_same(in.read(what), x, what + ": input");
    run(out.view(), in.view(), vector_view(w), res.view(), what, early_reads);
    expect_same(out.read(what), output_residual, what + ", residual");
    expect_same(res.read(what), sums, what + ", residual's sum");
    run(in_place.view(), in_place.view(), vector_view(w), res_in_place.view(), what, early_reads);
    expect_same(in_place.read(what), output_residual, what + ", in place with residual");
    expect_same(res_in_place.read(what), sums, what + ", in place: the sum");
    const Rows<T> once(x, rows, columns, columns + in_pad, in_offset);
    run(once.view(), once.view(), vector_view(w), {}, what, early_reads);
    expect_same(once.read(what), output, what + ", in place");
  }

  void check_alone() const {
    const Rows<T> w(weight, 1, columns, columns, 0), in(x, rows, columns, columns, 0), out(rows, columns, columns, 0);
    for (int64_t row = 0; row < rows; row += row < 40 || row + 2 >= rows ? 1 : 37) {
      run(out.view(row, 1), in.view(row, 1), vector_view(w), {}, name("a row alone"));
    }
    const std::vector<T> ours = out.read(name("a row alone"));
    for (int64_t row = 0; row < rows; row += row < 40 || row + 2 >= rows ? 1 : 37) {
      expect(same_bits(ours.data() + row * columns, output.data() + row * columns, columns),
             name("a row alone: other bits"));
    }
  }

  // The first row of the input again and again, until it is more than the second-level cache holds.
  void check_streamed() const {
    if (columns < 64) return;
    const int64_t times = (int64_t{65} << 20) / (2 * columns * static_cast<int64_t>(sizeof(T))) + 1;
    const Rows<T> w(weight, 1, columns, columns, 0), in(x, 1, columns, columns, 0), out(times, columns, columns, 0);
    TensorView input = in.view();
    input.shape[0] = times;
    input.stride[0] = 0;
    const std::string what = name("one row for all");
    run(out.view(), input, vector_view(w), {}, what);
    for (const int64_t row : {int64_t{0}, times / 2, times - 1}) {
      std::vector<T> ours(columns);
      check_cuda(cudaMemcpy(ours.data(), out.view(row).data, columns * sizeof(T), cudaMemcpyDeviceToHost), "copy");
      expect(same_bits(ours.data(), output.data(), columns), what + ": other bits");
    }
  }

  // The same rows again and again, until they are more than the second-level cache holds.
  void check_many() const {
    const int64_t times = (int64_t{80} << 20) / (2 * rows * columns * static_cast<int64_t>(sizeof(T))) + 1;
    std::vector<T> all, all_old;
    for (int64_t i = 0; i < times; ++i) {
      all.insert(all.end(), x.begin(), x.end());
      all_old.insert(all_old.end(), old.begin(), old.end());
    }
    const Rows<T> w(weight, 1, columns, columns, 0), in(all, rows * times, columns, columns, 0);
    const Rows<T> out(rows * times, columns, columns, 0), res(all_old, rows * times, columns, columns, 0);
    const std::string what = name(("repeated " + std::to_string(times) + " times").c_str());
    run(out.view(), in.view(), vector_view(w), {}, what);
    std::vector<T> ours = out.read(what);
    for (int64_t i = 0; i < times; ++i) {
      expect(same_bits(ours.data() + i * rows * columns, output.data(), rows * columns), what + ": other bits");
    }
    run(out.view(), in.view(), vector_view(w), res.view(), what);
    ours = out.read(what);
    const std::vector<T> ours_sums = res.read(what);
    for (int64_t i = 0; i < times; ++i) {
      expect(same_bits(ours.data() + i * rows * columns, output_residual.data(), rows * columns) &&
                 same_bits(ours_sums.data() + i * rows * columns, sums.data(), rows * columns),
             what + ", residual: other bits");
    }
  }
};

// A row's NaN and infinities stay in it; zeros give zeros.
template <class T>
void check_special(int64_t columns) {
  const std::string what = std::string(Type<T>::kName) + " special values, " + std::to_string(columns) + " columns";
  std::vector<T> x(4 * columns, rounded<T>(2.0f)), weight(columns, rounded<T>(1.0f));
  for (int64_t c = 0; c < columns; ++c) x[columns + c] = rounded<T>(0.0f);
  x[2 * columns + columns / 2] = rounded<T>(std::nanf(""));
  const Rows<T> w(weight, 1, columns, columns, 0), in(x, 4, columns, columns, 0), out(4, columns, columns, 0);
  run(out.view(), in.view(), vector_view(w), {}, what);
  const std::vector<T> ours = out.read(what);
  bool right = true;
  for (int64_t c = 0; c < columns; ++c) {
    right = right && std::abs(static_cast<float>(ours[c]) - 1) < 1e-2f && static_cast<float>(ours[columns + c]) == 0 &&
            std::isnan(static_cast<float>(ours[2 * columns + c])) &&
            std::abs(static_cast<float>(ours[3 * columns + c]) - 1) < 1e-2f;
  }
  expect(right, what);
}

// Without epsilon, rows whose mean square is a denormal number.
template <class T>
void check_tiny(int64_t rows, int64_t columns) {
  const std::string what =
      std::string(Type<T>::kName) + " tiny values, " + std::to_string(rows) + " x " + std::to_string(columns);
  const float value = 6e-20f;
  std::vector<T> x(rows * columns, rounded<T>(value)), weight(columns, rounded<T>(1.0f));
  const Rows<T> w(weight, 1, columns, columns, 0), in(x, rows, columns, columns, 0), out(rows, columns, columns, 0);
  run(out.view(), in.view(), vector_view(w), {}, what, false, 0.0f);
  bool right = true;
  for (const T ours : out.read(what)) right = right && std::abs(static_cast<float>(ours) - 1) < 1e-5f;
  expect(right, what);
}

// For compute-sanitizer: rows that end at and behind every limit between kernels, in few layouts, and calls of so many
// bytes that the kernels of those run, of few rows: all rows of the input are one.
template <class T>
void check_small() {
  constexpr int64_t kChunk = 16 / sizeof(T);
  for (const int64_t columns : {int64_t{1}, int64_t{7}, 64 * kChunk, 128 * kChunk, 129 * kChunk, 256 * kChunk,
                                257 * kChunk, 512 * kChunk, 513 * kChunk, 1024 * kChunk, 1025 * kChunk, 2048 * kChunk,
                                2049 * kChunk, 4096 * kChunk, 4097 * kChunk, 4097 * kChunk + 1}) {
    if (!in_part()) continue;
    // One of the kernels for few rows and, where there are those, one for many.
    if (columns > 64 * kChunk) Case<T>(18, columns).check_reference();
    Case<T> c(columns > 64 * kChunk ? 2 : 5, columns);
    c.check_reference();
    if (!std::is_same_v<T, __half>) {  // the same code as bfloat16 but for conversions
      c.check_layout(0, 2 * kChunk, 0, kChunk, 0, true);
      c.check_layout(3, 5, 1, 3, 2, false);
    }
    c.check_streamed();
  }
  if (in_part()) announce("special values"), check_special<T>(100);
}

template <class T>
void check_type(bool small) {
  if (small) return check_small<T>();
  for (const int64_t columns : {1, 2, 3, 7, 64, 576, 1024, 3424, 4096, 4099, 8192, 16384, 29568, 100003}) {
    for (const int64_t rows : {1, 2, 3, 5, 16, 17, 300}) {
      if (rows == 300 && columns > 8192) continue;
      if (rows == 2 && columns > 100) continue;
      if ((rows == 16 || rows == 17) && columns % 1024 != 0) continue;
      if (!in_part()) continue;
      Case<T> c(rows, columns);
      c.check_reference();
      c.check_layout(0, 0, 0, 0, 0, true);
      c.check_layout(0, 64, 0, 128, 0, false);  // aligned for every type, strided
      c.check_layout(1, 0, 0, 0, 0, false);
      c.check_layout(0, 0, 1, 0, 0, false);
      c.check_layout(0, 0, 0, 0, 1, true);
      c.check_layout(0, 1, 0, 0, 0, false);
      c.check_layout(3, 5, 1, 3, 2, false);
      c.check_alone();
      if (rows == 5 && (columns == 64 || columns == 576 || columns == 4096 || columns == 8192 || columns == 29568)) {
        c.check_many();
      }
    }
    check_special<T>(columns);
    if constexpr (!std::is_same_v<T, __half>) {
      check_tiny<T>(1, columns);
      check_tiny<T>(40, columns);
    }
  }
}

}  // namespace

constexpr int kSkipped = 77;

int main(int argc, char**) {
  const bool small = argc > 1;  // any argument: few and small cases, for compute-sanitizer
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("norm_test: skipped, there is no CUDA device\n");
    return kSkipped;
  }
  check_cuda(cudaSetDevice(0), "cudaSetDevice");
  punica::cuda::Arch arch;
  const punica::Status status = punica::cuda::active_arch(0, &arch);
  if (!status.ok()) {
    std::printf("norm_test: skipped, %s\n", status.message().c_str());
    return kSkipped;
  }
  if (small) g_margin = 0;
  check_type<__nv_bfloat16>(small);
  check_type<__half>(small);
  check_type<float>(small);
  Cases::get().finish();
  if (Cases::get().idle()) return 0;
  expect(launched_only(arch), "the kernels' path");
  std::printf("norm_test (%s): %d of %d checks failed\n", punica::cuda::arch_name(arch), g_failures, g_checks);
  return g_failures == 0 ? 0 : 1;
}
