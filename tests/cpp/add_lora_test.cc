// add_lora and update_lora_batch against plain double precision.
#include "punica/add_lora.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

constexpr int64_t kLayers = 2;

// The tensors of a batch, NaN-like garbage until it is updated.
struct Batch {
  Tensor indices, order, segment_adapter, segment_start, counts;
  int64_t num_adapters;

  Batch(int64_t capacity, int64_t adapters)
      : indices(DType::kInt32, {capacity}),
        order(DType::kInt32, {capacity}),
        segment_adapter(DType::kInt32, {max_lora_segments(capacity, adapters)}),
        segment_start(DType::kInt32, {max_lora_segments(capacity, adapters) + 1}),
        counts(DType::kInt32, {2}),
        num_adapters(adapters) {}

  LoraBatch view() const {
    LoraBatch batch;
    batch.indices = indices.view();
    batch.order = order.view();
    batch.segment_adapter = segment_adapter.view();
    batch.segment_start = segment_start.view();
    batch.counts = counts.view();
    return batch;
  }

  Status update(const Tensor& given) const {
    LoraBatchParams p;
    p.indices = given.view();
    p.num_adapters = num_adapters;
    p.batch = view();
    return update_lora_batch(p, {});
  }
};

std::vector<int32_t> values(const Tensor& t) {
  const int32_t* data = static_cast<const int32_t*>(t.data());
  return {data, data + t.shape()[0]};
}

TEST(LoraBatch, SortsByAdapter) {
  const Batch batch(12, 5);
  ASSERT_TRUE(succeeded(batch.update(Tensor::int64({2, 0, -1, 4, 2, 2, 0, -7, 4}))));
  EXPECT_EQ(values(batch.indices), (std::vector<int32_t>{2, 0, -1, 4, 2, 2, 0, -1, 4, -1, -1, -1}));
  EXPECT_EQ(values(batch.order), (std::vector<int32_t>{2, 7, 1, 6, 0, 4, 5, 3, 8, -1, -1, -1}));
  EXPECT_EQ(values(batch.segment_adapter), (std::vector<int32_t>{-1, 0, 2, 4, -1, -1}));
  EXPECT_EQ(values(batch.segment_start), (std::vector<int32_t>{0, 2, 4, 7, 9, 0, 0}));
  EXPECT_EQ(values(batch.counts), (std::vector<int32_t>{4, 7}));
  ASSERT_TRUE(succeeded(batch.update(Tensor::int32({3}))));
  EXPECT_EQ(values(batch.order), (std::vector<int32_t>{0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(values(batch.segment_adapter), (std::vector<int32_t>{3, -1, -1, -1, -1, -1}));
  EXPECT_EQ(values(batch.segment_start), (std::vector<int32_t>{0, 1, 0, 0, 0, 0, 0}));
  EXPECT_EQ(values(batch.counts), (std::vector<int32_t>{1, 1}));
  ASSERT_TRUE(succeeded(batch.update(Tensor::int32({}))));
  EXPECT_EQ(values(batch.counts), (std::vector<int32_t>{0, 0}));
}

// Adapters of one projection: ranks of their own for each slice and adapter, layers other than 1 NaN.
struct Lora {
  DType dtype;
  int64_t h_in, padded;
  std::vector<int64_t> offsets;
  std::vector<std::vector<int64_t>> ranks;  // [slices][adapters]
  std::vector<std::vector<Tensor>> a, b;
  Tensor a_ptr, b_ptr, rank_table, scales;

  // padded: elements between rows of B and rows of a layer of A; 0: the rank of each. offset: see Tensor.
  Lora(DType type, int64_t inputs, std::vector<int64_t> columns, std::vector<std::vector<int64_t>> rank_lists,
       std::mt19937& random, int64_t padding = 0, int64_t offset = 0)
      : dtype(type),
        h_in(inputs),
        padded(padding),
        offsets(std::move(columns)),
        ranks(std::move(rank_lists)),
        a(ranks.size()),
        b(ranks.size()),
        a_ptr(table(DType::kInt64)),
        b_ptr(table(DType::kInt64)),
        rank_table(table(DType::kInt32)),
        scales(table(DType::kFloat32)) {
    std::normal_distribution<double> normal;
    for (size_t s = 0; s < ranks.size(); ++s) {
      for (size_t i = 0; i < ranks[s].size(); ++i) {
        const int64_t rank = ranks[s][i], width = std::max<int64_t>(1, padded > 0 ? padded : rank);
        const int64_t h_out = offsets[s + 1] - offsets[s];
        a[s].emplace_back(dtype, std::vector<int64_t>{kLayers * width, h_in}, 0, offset).fill(NAN);
        b[s].emplace_back(dtype, std::vector<int64_t>{kLayers * h_out, width}, 0, offset).fill(NAN);
        for (int64_t r = 0; r < rank; ++r) {
          for (int64_t j = 0; j < h_in; ++j) a[s][i].set(width + r, j, normal(random));
          for (int64_t o = 0; o < h_out; ++o) b[s][i].set(h_out + o, r, normal(random));
        }
        const int64_t entry = static_cast<int64_t>(s * ranks[s].size() + i);
        static_cast<int64_t*>(a_ptr.data())[entry] = rank > 0 ? a[s][i].address() : 12;
        static_cast<int64_t*>(b_ptr.data())[entry] = rank > 0 ? b[s][i].address() : 12;
        static_cast<int32_t*>(rank_table.data())[entry] = static_cast<int32_t>(rank);
        static_cast<float*>(scales.data())[entry] = static_cast<float>(normal(random));
      }
    }
  }

  Tensor table(DType type) const {
    return {type, {static_cast<int64_t>(ranks.size()), static_cast<int64_t>(ranks[0].size())}};
  }

  AddLoraParams params(const Tensor& y, const Tensor& x, const Batch& batch) const {
    AddLoraParams p;
    p.y = y.view();
    p.x = x.view();
    p.a_ptr = a_ptr.view();
    p.b_ptr = b_ptr.view();
    p.ranks = rank_table.view();
    p.scales = scales.view();
    p.batch = batch.view();
    p.batch.indices = TensorView{};
    p.layer_idx = 1;
    std::copy(offsets.begin(), offsets.end(), p.slice_offsets);
    if (padded > 0) {
      p.a_layer_stride = padded * h_in;
      p.b_row_stride = padded;
    }
    return p;
  }

  // Row of y for an adapter, in double; the sum of |terms| goes through the |terms| of v, as the rounding of v does.
  ExactRow exact(std::vector<double> y, const std::vector<double>& x, int64_t adapter) const {
    ExactRow row{y, y};
    for (double& term : row.sum_of_terms) term = std::abs(term);
    for (size_t s = 0; s < ranks.size() && adapter >= 0; ++s) {
      const int64_t rank = ranks[s][adapter], width = padded > 0 ? padded : rank;
      const int64_t h_out = offsets[s + 1] - offsets[s];
      const double scale = static_cast<const float*>(scales.data())[s * ranks[s].size() + adapter];
      for (int64_t r = 0; r < rank; ++r) {
        double v = 0, magnitude = 0;
        for (int64_t j = 0; j < h_in; ++j) {
          v += a[s][adapter].get(width + r, j) * x[j];
          magnitude += std::abs(a[s][adapter].get(width + r, j) * x[j]);
        }
        for (int64_t o = 0; o < h_out; ++o) {
          const double weight = b[s][adapter].get(h_out + o, r);
          row.value[offsets[s] + o] += scale * weight * v;
          row.sum_of_terms[offsets[s] + o] += std::abs(scale * weight) * magnitude;
        }
      }
    }
    return row;
  }
};

struct Case {
  int64_t h_in;
  std::vector<int64_t> offsets;
  std::vector<std::vector<int64_t>> ranks;
  int64_t padded;
};

const Case kCases[] = {
    {1, {0, 1}, {{1, 1, 1}}, 0},
    {96, {0, 64}, {{16, 8, 0}}, 0},
    {100, {2, 2, 70, 75}, {{4, 0, 9}, {16, 64, 33}, {2, 4, 8}}, 0},
    {576, {0, 130}, {{32, 5, 300}}, 0},
    {48, {0, 33, 80}, {{4, 16, 7}, {16, 0, 1}}, 16},
    {40, {0, 600}, {{64, 128, 16}}, 128},
};

TEST(AddLora, MatchesReference) {
  std::mt19937 random(1);
  const std::vector<int64_t> indices = {2, 0, -1, 1, 2, 2, 0, -3, 1, 1, 1, 1, 1, 1};
  const auto rows = static_cast<int64_t>(indices.size());
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : kCases) {
      for (const int64_t offset : {0, 1}) {
        SCOPED_TRACE(std::string(dtype_name(dtype)) + " h_in " + std::to_string(c.h_in) + " offset " +
                     std::to_string(offset));
        const Lora lora(dtype, c.h_in, c.offsets, c.ranks, random, c.padded, offset);
        Tensor y(dtype, {rows, c.offsets.back() + 3}, 2 * offset, offset);
        Tensor x(dtype, {rows, c.h_in}, 5 * offset, offset);
        y.randomize(random);
        x.randomize(random);
        for (int64_t j = 0; j < c.h_in; ++j) x.set(2, j, NAN);  // no adapter
        const Tensor before = y.clone();
        const Batch batch(rows + offset, 3);
        ASSERT_TRUE(succeeded(batch.update(Tensor::int64(indices))));
        ASSERT_TRUE(succeeded(add_lora(lora.params(y, x, batch), {})));
        EXPECT_TRUE(y.padding_intact());
        for (int64_t t = 0; t < rows; ++t) {
          if (indices[t] < 0) {
            EXPECT_TRUE(y.same_bits(t, before, t)) << "row " << t;
          } else {
            EXPECT_TRUE(close(y.row(t), lora.exact(before.row(t), x.row(t), indices[t]), dtype)) << "row " << t;
          }
        }
      }
    }
  }
}

// A row has the same bits alone and beside any number of rows of its adapter, on any number of threads.
TEST(AddLora, RowIsIndependentOfBatch) {
  std::mt19937 random(2);
  constexpr int64_t kRows = 70;
  for (const DType dtype : kFloatTypes) {
    for (const int64_t rank : {4, 16, 7, 64, 200}) {
      const Lora lora(dtype, 100, {0, 84}, {{rank, rank}}, random);
      Tensor x(dtype, {kRows, 100});
      Tensor y(dtype, {kRows, 84});
      x.randomize(random);
      y.randomize(random);
      const auto run = [&](int64_t first, int64_t last, int num_threads) {
        std::vector<int64_t> indices(kRows, -1);
        std::fill(indices.begin() + first, indices.begin() + last, 1);
        Tensor out = y.clone();
        const Batch batch(kRows, 2);
        EXPECT_TRUE(succeeded(batch.update(Tensor::int64(indices))));
        EXPECT_TRUE(succeeded(add_lora(lora.params(out, x, batch), threads(num_threads))));
        return out;
      };
      const Tensor whole = run(0, kRows, 1);
      EXPECT_TRUE(run(0, kRows, 3).same_bits(whole));
      for (const int64_t length : {1, 2, 3, 4, 5, 8, 9, 33, 63, 64, 65}) {
        for (const int64_t first : {int64_t{0}, int64_t{3}, kRows - length}) {
          if (first + length > kRows) continue;
          const Tensor part = run(first, first + length, 2);
          for (int64_t t = 0; t < kRows; ++t) {
            const bool inside = t >= first && t < first + length;
            ASSERT_TRUE(part.same_bits(t, inside ? whole : y, t))
                << dtype_name(dtype) << " rank " << rank << ", " << length << " rows from " << first << ", row " << t;
          }
        }
      }
    }
  }
}

// More than fits into the intermediate of one round.
TEST(AddLora, ManyRows) {
  std::mt19937 random(3);
  constexpr int64_t kRows = 9000, kRank = 500;
  const Lora lora(DType::kFloat32, 3, {0, 2}, {{kRank}}, random);
  Tensor x(DType::kFloat32, {kRows, 3});
  Tensor y(DType::kFloat32, {kRows, 2});
  x.randomize(random);
  y.randomize(random);
  const Tensor before = y.clone();
  const Batch batch(kRows, 1);
  ASSERT_TRUE(succeeded(batch.update(Tensor::int64(std::vector<int64_t>(kRows, 0)))));
  ASSERT_TRUE(succeeded(add_lora(lora.params(y, x, batch), {})));
  for (int64_t t = 0; t < kRows; t += 37) {
    ASSERT_TRUE(close(y.row(t), lora.exact(before.row(t), x.row(t), 0), DType::kFloat32)) << "row " << t;
  }
}

// Each broken call is refused by name and writes nothing. (tests/python/test_errors.py breaks every argument.)
TEST(AddLora, RefusesBrokenCalls) {
  std::mt19937 random(4);
  const Lora lora(DType::kBFloat16, 8, {0, 6, 16}, {{4, 0}, {2, 5}}, random);
  Tensor y(DType::kBFloat16, {3, 16});
  Tensor x(DType::kBFloat16, {3, 8});
  y.randomize(random);
  x.randomize(random);
  const Tensor before = y.clone();
  const Batch batch(5, 2);
  ASSERT_TRUE(succeeded(batch.update(Tensor::int64({1, 0, -1}))));
  const Tensor repeated = Tensor::int32({2, 1, 1, -1, -1}), beyond = Tensor::int32({2, 1, 3, -1, -1});
  const Tensor adapters = Tensor::int32({-1, 0, 2}), starts = Tensor::int32({0, 1, 6, 3});
  struct Case {
    const char* word;
    std::function<void(AddLoraParams&)> apply;
  };
  using P = AddLoraParams;
  const Case cases[] = {
      {"y", [](P& p) { p.y.rank = 1; }},
      {"x", [](P& p) { p.x.shape[0] = 2; }},
      {"x", [](P& p) { p.x.dtype = DType::kFloat16; }},
      {"a_ptr", [](P& p) { p.a_ptr.dtype = DType::kInt32; }},
      {"a_ptr", [](P& p) { p.a_ptr.shape[0] = 0; }},
      {"b_ptr", [](P& p) { p.b_ptr.shape[1] = 1; }},
      {"ranks", [](P& p) { p.ranks.rank = 3; }},
      {"scales", [](P& p) { p.scales.dtype = DType::kBFloat16; }},
      {"order", [](P& p) { p.batch.order.shape[0] = 2; }},
      {"segment_start", [](P& p) { p.batch.segment_start.shape[0] = 3; }},
      {"segment_adapter", [](P& p) { p.batch.segment_adapter.data = nullptr; }},
      {"counts", [](P& p) { p.batch.counts.shape[0] = 3; }},
      {"slice_offsets[1]", [](P& p) { p.slice_offsets[1] = 17; }},
      {"slice_offsets[2]", [](P& p) { p.slice_offsets[2] = 5; }},
      {"layer_idx", [](P& p) { p.layer_idx = -1; }},
      {"layer_idx", [](P& p) { p.layer_idx = std::numeric_limits<int64_t>::max() / 4; }},
      {"b_layer_stride", [](P& p) { p.b_layer_stride = -1; }},
      {"b_row_stride", [](P& p) { p.b_row_stride = 3; }},
      {"max_rank", [](P& p) { p.max_rank = 0; }},
      {"ranks[0]", [](P& p) { p.max_rank = 3; }},
      {"overlap", [](P& p) { p.x.data = p.y.data; }},
      {"order[2] is row 1 a second time", [&](P& p) { p.batch.order = repeated.view(); }},
      {"order[2]", [&](P& p) { p.batch.order = beyond.view(); }},
      {"segment_adapter[2]", [&](P& p) { p.batch.segment_adapter = adapters.view(); }},
      {"segment_start[2]", [&](P& p) { p.batch.segment_start = starts.view(); }},
  };
  for (const Case& c : cases) {
    AddLoraParams broken = lora.params(y, x, batch);
    c.apply(broken);
    const Status status = add_lora(broken, {});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.word;
    EXPECT_TRUE(status.message().starts_with("add_lora: ")) << status.message();
    EXPECT_NE(status.message().find(c.word), std::string::npos) << c.word << ": " << status.message();
  }
  EXPECT_TRUE(y.same_bits(before));
  EXPECT_TRUE(succeeded(add_lora(lora.params(y, x, batch), {})));
  EXPECT_FALSE(y.same_bits(before));

  LoraBatchParams update;
  const Tensor indices = Tensor::int64({1, 2, 0});
  update.indices = indices.view();
  update.num_adapters = 2;
  update.batch = batch.view();
  EXPECT_EQ(update_lora_batch(update, {}).message(),
            "update_lora_batch: indices[1] must be below 2 (num_adapters), got 2");
  update.num_adapters = 3;
  EXPECT_EQ(update_lora_batch(update, {}).message(),
            "update_lora_batch: segment_adapter must have at least 4 entries (min(capacity, num_adapters + 1)), got 3");
}

}  // namespace
}  // namespace punica::testing
