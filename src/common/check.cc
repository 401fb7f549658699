#include "src/common/check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace punica {
namespace {

std::string dims_string(const int64_t* dims, int rank) {
  std::string s = "[";
  for (int i = 0; i < std::min(rank, TensorView::kMaxRank); ++i) {
    if (i > 0) s += ", ";
    s += std::to_string(dims[i]);
  }
  if (rank > TensorView::kMaxRank) s += ", ...";
  return s + "]";
}

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

// "[17] (B + 1)", "[4, h_in] (B, h_in)".
std::string expected_shape(Shape shape) {
  std::string sizes, names;
  for (const Dim& dim : shape) {
    if (!sizes.empty()) sizes += ", ";
    if (!names.empty()) names += ", ";
    sizes += dim.size == Dim::kAny ? std::string(dim.name) : std::to_string(dim.size);
    names += dim.name;
  }
  return sizes == names ? "[" + sizes + "]" : "[" + sizes + "] (" + names + ")";
}

bool is_floating(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32;
}

// The bytes of a tensor: `count` runs of `length` bytes, `stride` bytes apart. Contiguous tensors are one run.
struct Runs {
  intptr_t start, count, length, stride;
  intptr_t end() const { return start + (count - 1) * stride + length; }
};

Runs runs_of(const TensorView& t) {
  const int64_t item = static_cast<int64_t>(dtype_size(t.dtype));
  const int64_t rows = t.rank > 0 ? t.shape[0] : 1;
  int64_t row = 1;
  for (int i = 1; i < t.rank; ++i) row *= t.shape[i];
  const intptr_t start = reinterpret_cast<intptr_t>(t.data);
  if (rows == 1 || t.stride[0] == row) return {start, 1, rows * row * item, 0};
  return {start, rows, row * item, t.stride[0] * item};
}

bool runs_meet(Runs a, Runs b) {
  if (a.count > b.count) std::swap(a, b);
  for (intptr_t i = 0; i < a.count; ++i) {
    const intptr_t start = a.start + i * a.stride, end = start + a.length;
    if (start >= b.end()) return false;
    if (end <= b.start) continue;
    // The first run of b that ends behind `start`: it meets [start, end) unless it begins behind it.
    const intptr_t ahead = start - b.start - b.length;
    const intptr_t j = ahead < 0 ? 0 : ahead / b.stride + 1;
    if (j < b.count && b.start + j * b.stride < end) return true;
    // Runs that lie equally far apart meet in their first pairs or never.
    if (a.stride == b.stride && j > 0) return false;
  }
  return false;
}

}  // namespace

std::string device_name(Device device) {
  switch (device.type) {
    case DeviceType::kCpu:
      return "cpu";
    case DeviceType::kCuda:
      return "cuda:" + std::to_string(device.index);
    case DeviceType::kOther:
      return "another device";
  }
  return "another device";
}

std::string shape_string(const TensorView& t) { return dims_string(t.shape, t.rank); }

std::string at(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

bool Check::fail(const std::string& message) { return fail(StatusCode::kInvalidArgument, message); }

bool Check::fail(StatusCode code, const std::string& message) {
  status_ = Status(code, std::string(op_) + ": " + message);
  return false;
}

bool Check::data(const char* name, const TensorView& t, Shape shape, Layout layout) {
  if (!t.has_value()) return fail(std::string(name) + " is missing");
  if (first_ == nullptr) {
    if (!is_floating(t.dtype)) {
      return fail(std::string(name) + " must be float16, bfloat16 or float32, got " + dtype_name(t.dtype));
    }
    if (t.device.type == DeviceType::kOther) return fail(std::string(name) + " must be on a CPU or CUDA device");
    first_ = name;
    dtype_ = t.dtype;
    device_ = t.device;
  }
  return tensor_of(name, t, dtype_, shape, layout);
}

bool Check::device_of(const char* name, const TensorView& t) {
  if (!t.has_value()) return fail(std::string(name) + " is missing");
  if (t.device.type == DeviceType::kOther) return fail(std::string(name) + " must be on a CPU or CUDA device");
  first_ = name;
  device_ = t.device;
  return true;
}

bool Check::tensor(const char* name, const TensorView& t, DType dtype, Shape shape) {
  return tensor_of(name, t, dtype, shape, Layout::kContiguous);
}

bool Check::tensor_of(const char* name, const TensorView& t, DType dtype, Shape shape, Layout layout) {
  if (!t.has_value()) return fail(std::string(name) + " is missing");
  if (t.dtype != dtype) {
    const std::string like = is_floating(dtype) && dtype == dtype_ ? std::string(" like ") + first_ : std::string();
    return fail(std::string(name) + " must be " + dtype_name(dtype) + like + ", got " + dtype_name(t.dtype));
  }
  if (t.device != device_) {
    return fail(std::string(name) + " must be on " + device_name(device_) + " like " + first_ + ", got " +
                device_name(t.device));
  }
  if (!has_shape(name, t, shape)) return false;
  if (t.numel() == 0) return true;
  if (!has_layout(name, t, layout)) return false;
  if (t.data == nullptr) {
    return fail(std::string(name) + " has a null pointer but shape " + shape_string(t) + ": it must have memory");
  }
  const size_t item = dtype_size(dtype);
  if (reinterpret_cast<uintptr_t>(t.data) % item != 0) {
    return fail(std::string(name) + " must be aligned to its element of " + std::to_string(item) +
                " bytes, got an address " + std::to_string(reinterpret_cast<uintptr_t>(t.data) % item) + " past that");
  }
  return true;
}

bool Check::has_shape(const char* name, const TensorView& t, Shape shape) {
  bool equal = t.rank == static_cast<int32_t>(shape.size());
  for (int i = 0; equal && i < t.rank; ++i) {
    const int64_t size = shape.begin()[i].size;
    equal = t.shape[i] >= 0 && (size == Dim::kAny || t.shape[i] == size);
  }
  return equal || fail(std::string(name) + " must have shape " + expected_shape(shape) + ", got " + shape_string(t));
}

bool Check::has_layout(const char* name, const TensorView& t, Layout layout) {
  int64_t dense = 1;
  bool equal = true;
  for (int i = t.rank - 1; i >= 0; --i) {
    // The stride of an extent of 1 is never used.
    if (t.shape[i] > 1 && t.stride[i] != dense) {
      equal = equal && i == 0 && layout == Layout::kRows && t.stride[i] > dense;
    }
    dense *= t.shape[i];
  }
  if (equal) return true;
  const char* expected = layout == Layout::kContiguous ? " must be contiguous"
                         : t.rank == 2 ? " must have a dense last dimension and a row stride of at least the row"
                                       : " must have contiguous rows and a row stride of at least the row";
  return fail(std::string(name) + expected + ", got strides " + dims_string(t.stride, t.rank) + " for shape " +
              shape_string(t));
}

bool Check::workspace(const char* name, const TensorView& t, int64_t bytes) {
  if (!t.has_value()) return true;
  if (!tensor(name, t, DType::kUInt8, {{Dim::kAny, "bytes"}})) return false;
  return t.shape[0] >= bytes || fail(std::string(name) + " must have at least " + std::to_string(bytes) +
                                     " bytes, got " + std::to_string(t.shape[0]));
}

bool Check::at_least(const char* name, int64_t value, int64_t low) {
  return value >= low ||
         fail(std::string(name) + " must be at least " + std::to_string(low) + ", got " + std::to_string(value));
}

bool Check::index(const char* name, int64_t value, int64_t size, const char* size_name) {
  return (value >= 0 && value < size) || fail(std::string(name) + " must be in [0, " + std::to_string(size) + ") (" +
                                              size_name + "), got " + std::to_string(value));
}

bool Check::finite(const char* name, double value) {
  return std::isfinite(value) || fail(std::string(name) + " must be finite, got " + number(value));
}

bool Check::positive(const char* name, double value) {
  return (std::isfinite(value) && value > 0) ||
         fail(std::string(name) + " must be finite and above 0, got " + number(value));
}

bool Check::not_negative(const char* name, double value) {
  return (std::isfinite(value) && value >= 0) ||
         fail(std::string(name) + " must be finite and at least 0, got " + number(value));
}

bool Check::product_fits(const char* what, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return fail(std::string(what) + " must be below 2^63 bytes");
    }
  }
  return true;
}

bool Check::disjoint(const Named* written, size_t num_written, const Named* read, size_t num_read, Span* spans) {
  const auto tensor = [&](size_t i) -> const Named& { return i < num_written ? written[i] : read[i - num_written]; };
  for (size_t i = 0; i < num_written + num_read; ++i) {
    const TensorView& view = tensor(i).view;
    spans[i] = {0, 0};
    if (!view.has_value() || view.numel() == 0) continue;
    const Runs runs = runs_of(view);
    spans[i] = {runs.start, runs.end()};
  }
  for (size_t i = 0; i < num_written; ++i) {
    for (size_t j = i + 1; j < num_written + num_read; ++j) {
      if (spans[i].start >= spans[j].end || spans[j].start >= spans[i].end) continue;  // as nearly always
      if (!runs_meet(runs_of(tensor(i).view), runs_of(tensor(j).view))) continue;
      return fail(std::string(tensor(i).name) + " and " + tensor(j).name + " must not overlap");
    }
  }
  return true;
}

}  // namespace punica
