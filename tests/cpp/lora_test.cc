// dispatch_bgmv, sgmv_shrink and sgmv_cutlass against the plain reference.
#include "punica/lora.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

constexpr int64_t kLayers = 2;

// Adapters' weights, one row a layer, in memory of their own; `offset` elements spoil their alignment.
struct Weights {
  std::vector<Tensor> adapters;
  std::vector<int64_t> addresses;

  Weights(DType dtype, int64_t count, int64_t elements, std::mt19937& random, int64_t offset = 0) {
    for (int64_t i = 0; i < count; ++i) {
      adapters.emplace_back(dtype, std::vector<int64_t>{kLayers, elements}, 0, offset);
      adapters.back().randomize(random, 0.3);
      addresses.push_back(adapters.back().address());
    }
  }
};

struct Shape {
  int64_t h_in, h_out;
};

// Below and beyond every vector length, both directions, the width of a known model (576), ranks that are no power
// of 2.
const Shape kShapes[] = {{1, 1}, {3, 7}, {16, 64}, {64, 16}, {33, 130}, {130, 5}, {576, 8}, {8, 576}, {257, 512}};

std::string name(DType dtype, Shape shape) {
  return std::string(dtype_name(dtype)) + " " + std::to_string(shape.h_in) + " -> " + std::to_string(shape.h_out);
}

TEST(Bgmv, MatchesReference) {
  std::mt19937 random(1);
  const std::vector<int64_t> indices = {2, -1, 0, 2, 1, -9, 0};
  const auto batch = static_cast<int64_t>(indices.size());
  for (const DType dtype : kFloatTypes) {
    for (const Shape shape : kShapes) {
      for (const int64_t offset : {0, 1}) {
        SCOPED_TRACE(name(dtype, shape) + " offset " + std::to_string(offset));
        const Weights weights(dtype, 3, shape.h_in * shape.h_out, random, offset);
        Tensor y(dtype, {batch, shape.h_out}, 3 * offset, offset);
        Tensor x(dtype, {batch, shape.h_in}, 5 * offset, offset);
        y.randomize(random);
        x.randomize(random);
        const Tensor before = y.clone();
        const Tensor w_ptr = Tensor::int64(weights.addresses);
        const Tensor index = Tensor::int64(indices);
        BgmvParams p;
        p.y = y.view();
        p.x = x.view();
        p.w_ptr = w_ptr.view();
        p.indices = index.view();
        p.layer_idx = 1;
        p.scale = -0.75f;
        ASSERT_TRUE(succeeded(dispatch_bgmv(p, {})));
        EXPECT_TRUE(y.padding_intact());
        for (int64_t b = 0; b < batch; ++b) {
          if (indices[b] < 0) {
            EXPECT_TRUE(y.same_bits(b, before, b)) << "row " << b;
          } else {
            EXPECT_TRUE(close(y.row(b),
                              lora_row(before.row(b), x.row(b), weights.adapters[indices[b]], 1, false, -0.75), dtype))
                << "row " << b;
          }
        }
      }
    }
  }
}

TEST(Bgmv, RowsDoNotSeeEachOther) {
  std::mt19937 random(2);
  for (const DType dtype : kFloatTypes) {
    Weights weights(dtype, 2, 40 * 24, random);
    weights.adapters[1].fill(NAN);
    Tensor y(dtype, {3, 24});
    Tensor x(dtype, {3, 40});
    y.randomize(random);
    x.randomize(random);
    for (int64_t j = 0; j < 40; ++j) x.set(1, j, NAN);  // row 1 is skipped
    const Tensor before = y.clone();
    const Tensor w_ptr = Tensor::int64(weights.addresses);
    const Tensor indices = Tensor::int64({0, -1, 1});
    BgmvParams p;
    p.y = y.view();
    p.x = x.view();
    p.w_ptr = w_ptr.view();
    p.indices = indices.view();
    ASSERT_TRUE(succeeded(dispatch_bgmv(p, {})));
    EXPECT_TRUE(close(y.row(0), lora_row(before.row(0), x.row(0), weights.adapters[0], 0, false, 1.0), dtype));
    EXPECT_TRUE(y.same_bits(1, before, 1));
    for (const double value : y.row(2)) EXPECT_TRUE(std::isnan(value));
  }
}

// The same row, alone and at every place of batches of different sizes, has the same bits.
TEST(Bgmv, RowIsIndependentOfBatch) {
  std::mt19937 random(3);
  for (const DType dtype : kFloatTypes) {
    for (const Shape shape : {Shape{100, 40}, Shape{16, 70}}) {
      const Weights weights(dtype, 2, shape.h_in * shape.h_out, random);
      const Tensor w_ptr = Tensor::int64(weights.addresses);
      Tensor row_x(dtype, {1, shape.h_in});
      Tensor row_y(dtype, {1, shape.h_out});
      row_x.randomize(random);
      row_y.randomize(random);
      Tensor alone = row_y.clone();
      const auto run = [&](Tensor& y, const Tensor& x, const std::vector<int64_t>& indices) {
        const Tensor index = Tensor::int64(indices);
        BgmvParams p;
        p.y = y.view();
        p.x = x.view();
        p.w_ptr = w_ptr.view();
        p.indices = index.view();
        ASSERT_TRUE(succeeded(dispatch_bgmv(p, {})));
      };
      run(alone, row_x, {1});
      for (const int64_t batch : {2, 5, 17}) {
        for (const int64_t place : {int64_t{0}, batch / 2, batch - 1}) {
          Tensor x(dtype, {batch, shape.h_in});
          Tensor y(dtype, {batch, shape.h_out});
          x.randomize(random);
          y.randomize(random);
          for (int64_t j = 0; j < shape.h_in; ++j) x.set(place, j, row_x.get(0, j));
          for (int64_t i = 0; i < shape.h_out; ++i) y.set(place, i, row_y.get(0, i));
          std::vector<int64_t> indices(batch, place % 2);
          indices[place] = 1;
          run(y, x, indices);
          EXPECT_TRUE(y.same_bits(place, alone, 0)) << name(dtype, shape) << " batch " << batch << " row " << place;
        }
      }
    }
  }
}

TEST(Bgmv, NothingToDo) {
  std::mt19937 random(4);
  const Weights weights(DType::kFloat16, 1, 8 * 8, random);
  for (const auto& [batch, h_in, h_out] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{0, 8, 8}, {2, 0, 8}, {2, 8, 0}}) {
    Tensor y(DType::kFloat16, {batch, h_out});
    Tensor x(DType::kFloat16, {batch, h_in});
    y.randomize(random);
    const Tensor before = y.clone();
    const Tensor w_ptr = Tensor::int64(weights.addresses);
    const Tensor indices = Tensor::int64(std::vector<int64_t>(batch, 0));
    BgmvParams p;
    p.y = y.view();
    p.x = x.view();
    p.w_ptr = w_ptr.view();
    p.indices = indices.view();
    EXPECT_TRUE(succeeded(dispatch_bgmv(p, {})));
    EXPECT_TRUE(y.same_bits(before));
  }
}

struct Segments {
  std::vector<int32_t> start, end;
  std::vector<int64_t> adapter;
};

// Row 0 and rows 4, 5 belong to nobody; segments are empty, share an adapter, and do not come in order of their rows.
const Segments kSegments = {{6, 1, 3, 3, 30}, {30, 3, 3, 4, 67}, {0, 2, 1, 2, 1}};
constexpr int64_t kRows = 70;

int64_t segment_of(const Segments& segments, int64_t row) {
  for (size_t i = 0; i < segments.start.size(); ++i) {
    if (row >= segments.start[i] && row < segments.end[i]) return static_cast<int64_t>(i);
  }
  return -1;
}

class Sgmv : public ::testing::TestWithParam<SgmvWeights> {};

SgmvParams sgmv_params(SgmvWeights order, const Tensor& y, const Tensor& x, const Tensor& w_ptr, const Tensor& start,
                       const Tensor& end, int64_t layer) {
  SgmvParams p;
  p.weights = order;
  p.y = y.view();
  p.x = x.view();
  p.w_ptr = w_ptr.view();
  p.s_start = start.view();
  p.s_end = end.view();
  p.layer_idx = layer;
  return p;
}

TEST_P(Sgmv, MatchesReference) {
  std::mt19937 random(5);
  const bool transposed = GetParam() == SgmvWeights::kInOut;
  const Tensor start = Tensor::int32(kSegments.start);
  const Tensor end = Tensor::int32(kSegments.end);
  for (const DType dtype : kFloatTypes) {
    for (const Shape shape : kShapes) {
      for (const int64_t offset : {0, 1}) {
        SCOPED_TRACE(name(dtype, shape) + " offset " + std::to_string(offset));
        const Weights weights(dtype, 3, shape.h_in * shape.h_out, random, offset);
        std::vector<int64_t> addresses;
        for (const int64_t adapter : kSegments.adapter) addresses.push_back(weights.addresses[adapter]);
        addresses[2] = 0;  // of an empty segment: not looked at
        const Tensor w_ptr = Tensor::int64(addresses);
        Tensor y(dtype, {kRows, shape.h_out}, 3 * offset, offset);
        Tensor x(dtype, {kRows, shape.h_in}, 5 * offset, offset);
        y.randomize(random);
        x.randomize(random);
        for (int64_t j = 0; j < shape.h_in; ++j) x.set(4, j, NAN);  // belongs to no segment
        const Tensor before = y.clone();
        SgmvParams p = sgmv_params(GetParam(), y, x, w_ptr, start, end, 1);
        const Tensor tmp(DType::kUInt8, {sgmv_cutlass_tmp_size(static_cast<int64_t>(addresses.size()))}, 0, 1);
        if (offset == 1) p.tmp = tmp.view();
        ASSERT_TRUE(succeeded(sgmv(p, {})));
        EXPECT_TRUE(y.padding_intact());
        for (int64_t row = 0; row < kRows; ++row) {
          const int64_t segment = segment_of(kSegments, row);
          if (segment < 0) {
            EXPECT_TRUE(y.same_bits(row, before, row)) << "row " << row;
          } else {
            const Tensor& w = weights.adapters[kSegments.adapter[segment]];
            ASSERT_TRUE(close(y.row(row), lora_row(before.row(row), x.row(row), w, 1, transposed, 1.0), dtype))
                << "row " << row;
          }
        }
      }
    }
  }
}

// A row has the same bits alone, in a segment of any length, and at any place of it.
TEST_P(Sgmv, RowIsIndependentOfSegment) {
  std::mt19937 random(6);
  for (const DType dtype : kFloatTypes) {
    for (const Shape shape : {Shape{100, 24}, Shape{24, 100}, Shape{64, 16}, Shape{16, 64}}) {
      const Weights weights(dtype, 1, shape.h_in * shape.h_out, random);
      const Tensor w_ptr = Tensor::int64(weights.addresses);
      Tensor x(dtype, {kRows, shape.h_in});
      Tensor y(dtype, {kRows, shape.h_out});
      x.randomize(random);
      y.randomize(random);
      const auto run = [&](int32_t first, int32_t last) {
        Tensor out = y.clone();
        const Tensor start = Tensor::int32({first});
        const Tensor end = Tensor::int32({last});
        EXPECT_TRUE(succeeded(sgmv(sgmv_params(GetParam(), out, x, w_ptr, start, end, 0), {})));
        return out;
      };
      const Tensor whole = run(0, kRows);
      for (int32_t length : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65}) {
        for (int32_t first : {0, 1, 3, static_cast<int32_t>(kRows) - length}) {
          if (first + length > kRows) continue;
          const Tensor part = run(first, first + length);
          for (int64_t row = 0; row < kRows; ++row) {
            const bool inside = row >= first && row < first + length;
            ASSERT_TRUE(part.same_bits(row, inside ? whole : y, row))
                << name(dtype, shape) << " segment [" << first << ", " << first + length << ") row " << row;
          }
        }
      }
    }
  }
}

TEST_P(Sgmv, NothingToDo) {
  Tensor y(DType::kBFloat16, {4, 8});
  Tensor x(DType::kBFloat16, {4, 8});
  const Tensor none64 = Tensor::int64({});
  const Tensor none32 = Tensor::int32({});
  EXPECT_TRUE(succeeded(sgmv(sgmv_params(GetParam(), y, x, none64, none32, none32, 0), {})));
  const Tensor no_rows(DType::kBFloat16, {0, 8});
  const Tensor null = Tensor::int64({0});
  const Tensor zero = Tensor::int32({0});
  EXPECT_TRUE(succeeded(sgmv(sgmv_params(GetParam(), no_rows, no_rows, null, zero, zero, 0), {})));
}

INSTANTIATE_TEST_SUITE_P(Weights, Sgmv, ::testing::Values(SgmvWeights::kOutIn, SgmvWeights::kInOut),
                         [](const auto& info) { return info.param == SgmvWeights::kOutIn ? "Shrink" : "Cutlass"; });

}  // namespace
}  // namespace punica::testing
