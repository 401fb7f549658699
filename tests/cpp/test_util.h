// What the tests share: tensors that notice stray writes, the three data types, and the tolerance.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica::testing {

inline constexpr DType kFloatTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// To T and back, rounding to nearest even. Written out, so that the kernels' own conversions are not their own judge.
uint16_t float_to_half(float value);
float half_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);
float bfloat_to_float(uint16_t bits);

// A tensor of rows. Every byte that belongs to no element (between rows, before the first) starts as 0xFF, a NaN in
// all three types, and must still be that at the end; the allocation ends with the last element, for AddressSanitizer.
class Tensor {
 public:
  // `row_padding` elements lie between rows; `offset` elements before the first row, to spoil its alignment.
  Tensor(DType dtype, std::vector<int64_t> shape, int64_t row_padding = 0, int64_t offset = 0);

  template <class T>
  static Tensor of(DType dtype, const std::vector<T>& values) {
    Tensor tensor(dtype, {static_cast<int64_t>(values.size())});
    if (!values.empty()) std::memcpy(tensor.data(), values.data(), values.size() * sizeof(T));
    return tensor;
  }
  static Tensor int32(const std::vector<int32_t>& values) { return of(DType::kInt32, values); }
  static Tensor int64(const std::vector<int64_t>& values) { return of(DType::kInt64, values); }

  // Normally distributed, rounded to the type.
  Tensor& randomize(std::mt19937& random, double scale = 1.0);
  Tensor& fill(double value);

  TensorView view() const;
  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }  // elements of a row
  void* data() const { return bytes_.get() + offset_ * item_; }
  int64_t address() const { return reinterpret_cast<int64_t>(data()); }

  // One element of a floating-point tensor.
  double get(int64_t row, int64_t column) const;
  void set(int64_t row, int64_t column, double value);
  std::vector<double> row(int64_t row) const;

  bool same_bits(int64_t row, const Tensor& other, int64_t other_row) const;
  bool same_bits(const Tensor& other) const;
  // No byte outside the elements was written.
  bool padding_intact() const;
  Tensor clone() const;

 private:
  unsigned char* element(int64_t row, int64_t column) const {
    return bytes_.get() + (offset_ + row * stride_ + column) * item_;
  }

  DType dtype_;
  std::vector<int64_t> shape_;
  int64_t item_, rows_, columns_, stride_, offset_, num_bytes_;
  std::shared_ptr<unsigned char[]> bytes_;
};

// One output row of a reference: the exact values, and what the rounding of float32 sums may be measured in.
struct ExactRow {
  std::vector<double> value;
  std::vector<double> sum_of_terms;  // sum of |terms| of each value's sum; empty: not a sum
};

// |got - exact| <= rtol |exact| + rtol / 16 * max |exact of the row| + 4 * 2^-24 * sum |terms|, with rtol 2e-6 for
// float32, 2e-3 for float16, 1.6e-2 for bfloat16. NaN must meet NaN.
::testing::AssertionResult close(const std::vector<double>& got, const ExactRow& exact, DType dtype);

inline ::testing::AssertionResult succeeded(const Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << status.message();
}

inline Context threads(int num_threads) {
  Context context;
  context.num_threads = num_threads;
  return context;
}

}  // namespace punica::testing
