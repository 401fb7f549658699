#include "test_util.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace punica::testing {

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_half(float value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double magnitude = std::abs(static_cast<double>(value));
  if (std::isnan(value)) return sign | 0x7E00;
  if (magnitude >= 65520.0) return sign | 0x7C00;
  if (magnitude == 0.0) return sign;
  // The unit of the last place: 2^(exponent - 10), with subnormals from 2^-14 down.
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A mantissa that rounds up to 2048 carries into the exponent by itself.
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 14) << 10) + units));
}

float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1F;
  const int mantissa = bits & 0x3FF;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return static_cast<float>((bits & 0x8000) != 0 ? -magnitude : magnitude);
}

Tensor::Tensor(DType dtype, std::vector<int64_t> shape, int64_t row_padding, int64_t offset)
    : dtype_(dtype), shape_(std::move(shape)), item_(static_cast<int64_t>(dtype_size(dtype))), offset_(offset) {
  rows_ = shape_[0];
  columns_ = 1;
  for (size_t i = 1; i < shape_.size(); ++i) columns_ *= shape_[i];
  stride_ = columns_ + row_padding;
  num_bytes_ = (offset_ + (rows_ > 0 ? (rows_ - 1) * stride_ + columns_ : 0)) * item_;
  // Allocations are aligned to 16 bytes, as pages must be.
  bytes_ = std::shared_ptr<unsigned char[]>(new unsigned char[static_cast<size_t>(num_bytes_)]);
  std::fill_n(bytes_.get(), num_bytes_, 0xFF);
  for (int64_t r = 0; r < rows_; ++r) std::fill_n(element(r, 0), columns_ * item_, 0);
}

Tensor& Tensor::randomize(std::mt19937& random, double scale) {
  std::normal_distribution<double> normal(0.0, scale);
  for (int64_t r = 0; r < rows_; ++r) {
    for (int64_t c = 0; c < columns_; ++c) set(r, c, normal(random));
  }
  return *this;
}

Tensor& Tensor::fill(double value) {
  for (int64_t r = 0; r < rows_; ++r) {
    for (int64_t c = 0; c < columns_; ++c) set(r, c, value);
  }
  return *this;
}

TensorView Tensor::view() const {
  TensorView view;
  view.data = data();
  view.dtype = dtype_;
  view.rank = static_cast<int32_t>(shape_.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape_[i];
    view.stride[i] = stride;
    stride *= shape_[i];
  }
  view.stride[0] = stride_;
  return view;
}

double Tensor::get(int64_t row, int64_t column) const {
  uint16_t bits = 0;
  float value = 0.0f;
  if (dtype_ == DType::kFloat32) {
    std::memcpy(&value, element(row, column), sizeof value);
    return value;
  }
  std::memcpy(&bits, element(row, column), sizeof bits);
  return dtype_ == DType::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

void Tensor::set(int64_t row, int64_t column, double value) {
  const auto single = static_cast<float>(value);
  if (dtype_ == DType::kFloat32) {
    std::memcpy(element(row, column), &single, sizeof single);
    return;
  }
  const uint16_t bits = dtype_ == DType::kFloat16 ? float_to_half(single) : float_to_bfloat(single);
  std::memcpy(element(row, column), &bits, sizeof bits);
}

std::vector<double> Tensor::row(int64_t row) const {
  std::vector<double> values(columns_);
  for (int64_t c = 0; c < columns_; ++c) values[c] = get(row, c);
  return values;
}

bool Tensor::same_bits(int64_t row, const Tensor& other, int64_t other_row) const {
  return std::memcmp(element(row, 0), other.element(other_row, 0), columns_ * item_) == 0;
}

bool Tensor::same_bits(const Tensor& other) const {
  for (int64_t r = 0; r < rows_; ++r) {
    if (!same_bits(r, other, r)) return false;
  }
  return true;
}

bool Tensor::padding_intact() const {
  const auto is_poison = [](unsigned char byte) { return byte == 0xFF; };
  if (!std::all_of(bytes_.get(), bytes_.get() + offset_ * item_, is_poison)) return false;
  for (int64_t r = 0; r + 1 < rows_; ++r) {
    if (!std::all_of(element(r, columns_), element(r + 1, 0), is_poison)) return false;
  }
  return true;
}

Tensor Tensor::clone() const {
  Tensor copy = *this;
  copy.bytes_ = std::shared_ptr<unsigned char[]>(new unsigned char[static_cast<size_t>(num_bytes_)]);
  std::copy_n(bytes_.get(), num_bytes_, copy.bytes_.get());
  return copy;
}

::testing::AssertionResult close(const std::vector<double>& got, const ExactRow& exact, DType dtype) {
  const double rtol = dtype == DType::kFloat32 ? 2e-6 : dtype == DType::kFloat16 ? 2e-3 : 1.6e-2;
  double largest = 0.0;
  for (const double value : exact.value) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  for (size_t i = 0; i < exact.value.size(); ++i) {
    const double want = exact.value[i];
    if (std::isnan(want) ? std::isnan(got[i]) : got[i] == want) continue;
    double tolerance = rtol * std::abs(want) + rtol / 16 * largest;
    if (!exact.sum_of_terms.empty()) tolerance += 4 * std::ldexp(exact.sum_of_terms[i], -24);
    if (!(std::abs(got[i] - want) <= tolerance)) {
      return ::testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", exact " << want
                                           << ", difference " << got[i] - want << ", tolerance " << tolerance;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace punica::testing
