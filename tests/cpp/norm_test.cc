// rms_norm against the plain reference.
#include "punica/norm.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

const int64_t kColumns[] = {1, 2, 7, 16, 31, 64, 100, 576, 1023, 4096};
constexpr float kEpsilon = 1e-5f;

RmsNormParams params(const Tensor& output, const Tensor& input, const Tensor& weight) {
  RmsNormParams p;
  p.output = output.view();
  p.input = input.view();
  p.weight = weight.view();
  p.epsilon = kEpsilon;
  return p;
}

TEST(RmsNorm, MatchesReference) {
  std::mt19937 random(31);
  for (const DType dtype : kFloatTypes) {
    for (const int64_t columns : kColumns) {
      for (const int64_t offset : {0, 1}) {
        SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns));
        Tensor input(dtype, {5, columns}, 7 * offset, offset);
        Tensor weight(dtype, {columns}, 0, offset);
        const Tensor output(dtype, {5, columns}, 2 * offset, offset);
        input.randomize(random, 3.0);
        weight.randomize(random);
        for (int64_t c = 0; c < columns; ++c) input.set(2, c, 0.0);
        for (int64_t c = 0; c < columns; ++c) input.set(3, c, 1e-4 * input.get(3, c));  // epsilon counts
        std::vector<double> weights(columns);
        for (int64_t c = 0; c < columns; ++c) weights[c] = weight.get(c, 0);
        ASSERT_TRUE(succeeded(rms_norm(params(output, input, weight), {})));
        EXPECT_TRUE(output.padding_intact());
        for (int64_t row = 0; row < 5; ++row) {
          EXPECT_TRUE(close(output.row(row), rms_norm_row(input.row(row), weights, kEpsilon), dtype)) << "row " << row;
        }
        // In place, and one row alone: the same bits.
        Tensor in_place = input.clone();
        ASSERT_TRUE(succeeded(rms_norm(params(in_place, in_place, weight), {})));
        EXPECT_TRUE(in_place.same_bits(output));
        Tensor one(dtype, {1, columns});
        for (int64_t c = 0; c < columns; ++c) one.set(0, c, input.get(4, c));
        ASSERT_TRUE(succeeded(rms_norm(params(one, one, weight), {})));
        EXPECT_TRUE(one.same_bits(0, output, 4));
      }
    }
  }
}

TEST(RmsNorm, AddsResidual) {
  std::mt19937 random(32);
  for (const DType dtype : kFloatTypes) {
    for (const int64_t columns : kColumns) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns));
      Tensor input(dtype, {3, columns});
      Tensor weight(dtype, {columns});
      Tensor residual(dtype, {3, columns}, 5);
      const Tensor output(dtype, {3, columns});
      input.randomize(random);
      weight.randomize(random);
      residual.randomize(random);
      Tensor sum = residual.clone();  // rounded to the type, by the test's own conversion
      for (int64_t row = 0; row < 3; ++row) {
        for (int64_t c = 0; c < columns; ++c) sum.set(row, c, residual.get(row, c) + input.get(row, c));
      }
      RmsNormParams p = params(output, input, weight);
      p.residual = residual.view();
      ASSERT_TRUE(succeeded(rms_norm(p, {})));
      EXPECT_TRUE(residual.same_bits(sum));
      EXPECT_TRUE(residual.padding_intact());
      std::vector<double> weights(columns);
      for (int64_t c = 0; c < columns; ++c) weights[c] = weight.get(c, 0);
      for (int64_t row = 0; row < 3; ++row) {
        EXPECT_TRUE(close(output.row(row), rms_norm_row(sum.row(row), weights, kEpsilon), dtype)) << "row " << row;
      }
    }
  }
}

TEST(RmsNorm, NonFiniteRowsStayAlone) {
  std::mt19937 random(33);
  for (const DType dtype : kFloatTypes) {
    Tensor input(dtype, {3, 40});
    Tensor weight(dtype, {40});
    input.randomize(random);
    weight.fill(1.0);
    input.set(1, 17, NAN);
    const Tensor output(dtype, {3, 40});
    ASSERT_TRUE(succeeded(rms_norm(params(output, input, weight), {})));
    for (const int64_t row : {0, 2}) {
      const ExactRow exact = rms_norm_row(input.row(row), std::vector<double>(40, 1.0), kEpsilon);
      EXPECT_TRUE(close(output.row(row), exact, dtype));
    }
    for (const double value : output.row(1)) EXPECT_TRUE(std::isnan(value));
  }
}

TEST(RmsNorm, NothingToDo) {
  const Tensor none(DType::kFloat16, {0, 8});
  const Tensor weight(DType::kFloat16, {8});
  EXPECT_TRUE(succeeded(rms_norm(params(none, none, weight), {})));
  const Tensor no_columns(DType::kFloat16, {3, 0});
  const Tensor no_weight(DType::kFloat16, {0});
  EXPECT_TRUE(succeeded(rms_norm(params(no_columns, no_columns, no_weight), {})));
}

}  // namespace
}  // namespace punica::testing
