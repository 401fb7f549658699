// batch_prefill and batch_decode against the plain reference.
#include "punica/attention.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

struct Case {
  int64_t num_qo_heads, num_kv_heads, head_dim, page_size;
  AttentionOptions options;
};

AttentionOptions rope(double theta, double scale) {
  AttentionOptions options;
  options.rope_theta = theta;
  options.rope_scale = scale;
  return options;
}

AttentionOptions window(int64_t left) {
  AttentionOptions options;
  options.window_left = left;
  return options;
}

AttentionOptions cap_and_scale(double cap, double sm_scale) {
  AttentionOptions options;
  options.logits_soft_cap = cap;
  options.sm_scale = sm_scale;
  return options;
}

AttentionOptions everything() {
  AttentionOptions options = rope(5e5, 2.0);
  options.window_left = 9;
  options.logits_soft_cap = 20.0;
  options.sm_scale = 0.2;
  return options;
}

// Group sizes 1, 3, 4, 8; head dims below, at and between vector lengths; pages of 1 token and of more than there are.
const Case kCases[] = {
    {1, 1, 2, 1, {}},
    {9, 3, 64, 16, {}},
    {8, 2, 128, 16, {}},
    {4, 4, 80, 5, {}},
    {8, 1, 96, 3, {}},
    {2, 2, 256, 7, {}},
    {3, 1, 66, 100, {}},
    {2, 1, 14, 4, {}},
    {9, 3, 64, 16, rope(1e4, 1.0)},
    {2, 1, 30, 4, rope(1e4, 4.0)},
    {4, 2, 32, 4, window(0)},
    {4, 2, 32, 4, window(11)},
    {4, 2, 32, 4, cap_and_scale(5.0, 0.5)},
    {4, 2, 18, 6, everything()},
};

std::string name(DType dtype, const Case& c) {
  return std::string(dtype_name(dtype)) + " heads " + std::to_string(c.num_qo_heads) + "/" +
         std::to_string(c.num_kv_heads) + " dim " + std::to_string(c.head_dim) + " page " +
         std::to_string(c.page_size) + (c.options.rope_theta ? " rope" : "") + " window " +
         std::to_string(c.options.window_left);
}

// A cache with its tables as tensors.
struct Tables {
  Tensor kv_ptrs, kv_indptr, last_page_offset;

  explicit Tables(const Cache& cache)
      : kv_ptrs(Tensor::int64(cache.kv_ptrs)),
        kv_indptr(Tensor::int32(cache.kv_indptr)),
        last_page_offset(Tensor::int32(cache.last_page_offset)) {}
};

void set_common(AttentionParams& p, const Cache& cache, const Tables& tables, int64_t layer, const Tensor& o,
                const Tensor& q, const AttentionOptions& options) {
  p.kv.kv_ptrs = tables.kv_ptrs.view();
  p.kv.kv_indptr = tables.kv_indptr.view();
  p.kv.last_page_offset = tables.last_page_offset.view();
  p.kv.num_layers = cache.num_layers;
  p.kv.layer_idx = layer;
  p.kv.num_kv_heads = cache.num_kv_heads;
  p.kv.page_size = cache.page_size;
  p.o = o.view();
  p.q = q.view();
  p.sm_scale = options.sm_scale;
  p.rope_theta = options.rope_theta;
  p.rope_scale = options.rope_scale;
  p.window_left = options.window_left;
  p.logits_soft_cap = options.logits_soft_cap;
}

::testing::AssertionResult lse_close(const Tensor& lse, int64_t row, const std::vector<double>& exact, DType dtype) {
  // Scores are sums of float32 products: an absolute error. It does not shrink where the log-sum-exp is near zero.
  const double tolerance = dtype == DType::kFloat32 ? 2e-5 : 1e-4;
  for (size_t head = 0; head < exact.size(); ++head) {
    const double got = lse.get(row, static_cast<int64_t>(head));
    if (got == exact[head] || std::abs(got - exact[head]) <= tolerance * std::max(1.0, std::abs(exact[head]))) continue;
    return ::testing::AssertionFailure() << "lse of head " << head << ": got " << got << ", exact " << exact[head];
  }
  return ::testing::AssertionSuccess();
}

TEST(BatchDecode, MatchesReference) {
  std::mt19937 random(11);
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : kCases) {
      SCOPED_TRACE(name(dtype, c));
      Cache cache(dtype, 2, c.num_kv_heads, c.page_size, c.head_dim, {1, 37, 0, 20, c.page_size});
      cache.randomize(random);
      const Tables tables(cache);
      const auto batch = static_cast<int64_t>(cache.kv_len.size());
      Tensor q(dtype, {batch, c.num_qo_heads, c.head_dim}, 8);
      q.randomize(random);
      Tensor o(dtype, {batch, c.num_qo_heads, c.head_dim}, 3);
      o.fill(NAN);
      const Tensor lse(DType::kFloat32, {batch, c.num_qo_heads});
      BatchDecodeParams p;
      set_common(p, cache, tables, 1, o, q, c.options);
      p.lse = lse.view();
      ASSERT_TRUE(succeeded(batch_decode(p, {})));
      EXPECT_TRUE(o.padding_intact());
      for (int64_t i = 0; i < batch; ++i) {
        const ExactAttention exact = attention_row(cache, i, 1, cache.kv_len[i] - 1, q.row(i), c.options);
        EXPECT_TRUE(close(o.row(i), exact.o, dtype)) << "sequence " << i;
        EXPECT_TRUE(lse_close(lse, i, exact.lse, dtype)) << "sequence " << i;
      }
      // The same with a workspace of exactly the size that is asked for, at an odd address, and without lse.
      const Tensor tmpbuf(DType::kUInt8, {workspace_bytes(p)}, 0, 1);
      const Tensor again = o.clone();
      p.o = again.view();
      p.tmpbuf = tmpbuf.view();
      p.lse = {};
      ASSERT_TRUE(succeeded(batch_decode(p, {})));
      EXPECT_TRUE(again.same_bits(o));
    }
  }
}

TEST(BatchPrefill, MatchesReference) {
  std::mt19937 random(12);
  // Whole prompts, a chunk behind a past, nothing, one query, and more queries than keys.
  const std::vector<int64_t> kv_len = {19, 33, 5, 0, 40, 3};
  const std::vector<int32_t> qo_indptr = {0, 19, 27, 27, 29, 30, 36};
  const int64_t uncovered = 36;  // rows that belong to no sequence stay as they are
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : kCases) {
      SCOPED_TRACE(name(dtype, c));
      Cache cache(dtype, 2, c.num_kv_heads, c.page_size, c.head_dim, kv_len);
      cache.randomize(random);
      const Tables tables(cache);
      const Tensor indptr = Tensor::int32(qo_indptr);
      Tensor q(dtype, {uncovered + 1, c.num_qo_heads, c.head_dim}, 8);
      q.randomize(random);
      Tensor o(dtype, {uncovered + 1, c.num_qo_heads, c.head_dim}, 3);
      o.fill(NAN);
      Tensor lse(DType::kFloat32, {uncovered + 1, c.num_qo_heads});
      lse.fill(NAN);
      const Tensor before = o.clone();
      const Tensor lse_before = lse.clone();
      BatchPrefillParams p;
      set_common(p, cache, tables, 0, o, q, c.options);
      p.qo_indptr = indptr.view();
      p.lse = lse.view();
      ASSERT_TRUE(succeeded(batch_prefill(p, {})));
      EXPECT_TRUE(o.padding_intact());
      EXPECT_TRUE(o.same_bits(uncovered, before, uncovered));
      EXPECT_TRUE(lse.same_bits(uncovered, lse_before, uncovered));
      for (size_t i = 0; i < kv_len.size(); ++i) {
        for (int64_t row = qo_indptr[i]; row < qo_indptr[i + 1]; ++row) {
          const int64_t position = kv_len[i] - qo_indptr[i + 1] + row;
          const ExactAttention exact =
              attention_row(cache, static_cast<int64_t>(i), 0, position, q.row(row), c.options);
          ASSERT_TRUE(close(o.row(row), exact.o, dtype)) << "sequence " << i << " position " << position;
          ASSERT_TRUE(lse_close(lse, row, exact.lse, dtype)) << "sequence " << i << " position " << position;
        }
      }
      const Tensor tmpbuf(DType::kUInt8, {workspace_bytes(p)}, 0, 1);
      const Tensor again = before.clone();
      p.o = again.view();
      p.tmpbuf = tmpbuf.view();
      ASSERT_TRUE(succeeded(batch_prefill(p, {})));
      EXPECT_TRUE(again.same_bits(o));
    }
  }
}

// A query has the same bits whatever chunk it comes in and whatever the other sequences of the batch are.
TEST(BatchPrefill, QueryIsIndependentOfChunk) {
  std::mt19937 random(13);
  const int64_t length = 45;
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : {Case{9, 3, 64, 16, {}}, Case{4, 2, 30, 4, rope(1e4, 1.0)}, Case{2, 2, 32, 5, window(7)}}) {
      SCOPED_TRACE(name(dtype, c));
      // One token may see later ones in its page, never past its own position: so each chunk gets tables of its own.
      Cache cache(dtype, 1, c.num_kv_heads, c.page_size, c.head_dim, {length, 23});
      cache.randomize(random);
      Tensor q(dtype, {length, c.num_qo_heads, c.head_dim});
      q.randomize(random);
      const auto run = [&](int64_t first, int64_t last, bool with_other) {
        const int64_t pages = (last + c.page_size - 1) / c.page_size;
        std::vector<int32_t> kv_indptr = {0, static_cast<int32_t>(pages)};
        std::vector<int32_t> offsets = {static_cast<int32_t>(last - (pages - 1) * c.page_size)};
        std::vector<int32_t> qo_indptr = {0, static_cast<int32_t>(last - first)};
        std::vector<int64_t> pointers(cache.kv_ptrs.begin(), cache.kv_ptrs.begin() + pages);
        int64_t rows = last - first;
        if (with_other) {
          const int32_t other_first = cache.kv_indptr[1];
          pointers.insert(pointers.end(), cache.kv_ptrs.begin() + other_first, cache.kv_ptrs.end());
          kv_indptr.push_back(static_cast<int32_t>(pointers.size()));
          offsets.push_back(cache.last_page_offset[1]);
          rows += 23;
          qo_indptr.push_back(static_cast<int32_t>(rows));
        }
        Cache part = cache;
        part.kv_ptrs = pointers;
        part.kv_indptr = kv_indptr;
        part.last_page_offset = offsets;
        const Tables tables(part);
        const Tensor indptr = Tensor::int32(qo_indptr);
        Tensor chunk(dtype, {rows, c.num_qo_heads, c.head_dim});
        chunk.randomize(random);
        for (int64_t row = first; row < last; ++row) {
          for (int64_t i = 0; i < chunk.columns(); ++i) chunk.set(row - first, i, q.get(row, i));
        }
        Tensor o(dtype, {rows, c.num_qo_heads, c.head_dim});
        BatchPrefillParams p;
        set_common(p, part, tables, 0, o, chunk, c.options);
        p.qo_indptr = indptr.view();
        EXPECT_TRUE(succeeded(batch_prefill(p, {})));
        return o;
      };
      const Tensor whole = run(0, length, false);
      for (const int64_t size : {1, 2, 7, 16, 17, 33}) {
        for (int64_t first = 0; first < length; first += size) {
          const int64_t last = std::min(first + size, length);
          const Tensor part = run(first, last, first % 2 == 1);
          for (int64_t row = first; row < last; ++row) {
            ASSERT_TRUE(part.same_bits(row - first, whole, row))
                << "chunk [" << first << ", " << last << ") row " << row;
          }
        }
      }
    }
  }
}

TEST(BatchDecode, RowIsIndependentOfBatch) {
  std::mt19937 random(14);
  for (const DType dtype : kFloatTypes) {
    Cache cache(dtype, 1, 2, 8, 64, {70, 300, 3, 129});
    cache.randomize(random);
    const Tables tables(cache);
    Tensor q(dtype, {4, 6, 64});
    q.randomize(random);
    Tensor o(dtype, {4, 6, 64});
    BatchDecodeParams p;
    set_common(p, cache, tables, 0, o, q, {});
    ASSERT_TRUE(succeeded(batch_decode(p, {})));
    for (int64_t i = 0; i < 4; ++i) {
      const Tensor kv_indptr = Tensor::int32({cache.kv_indptr[i], cache.kv_indptr[i + 1]});
      const Tensor offset = Tensor::int32({cache.last_page_offset[i]});
      Tensor one_q(dtype, {1, 6, 64});
      for (int64_t j = 0; j < one_q.columns(); ++j) one_q.set(0, j, q.get(i, j));
      const Tensor one_o(dtype, {1, 6, 64});
      BatchDecodeParams one = p;
      one.kv.kv_indptr = kv_indptr.view();
      one.kv.last_page_offset = offset.view();
      one.q = one_q.view();
      one.o = one_o.view();
      ASSERT_TRUE(succeeded(batch_decode(one, {})));
      EXPECT_TRUE(one_o.same_bits(0, o, i)) << dtype_name(dtype) << " sequence " << i;
    }
  }
}

// The number of threads decides how many KV heads a task takes, here 5, 3 and 2, 2 and 2 and 1, or 1, and whether
// splits are tasks.
TEST(BatchDecode, RowIsIndependentOfThreads) {
  std::mt19937 random(16);
  for (const DType dtype : kFloatTypes) {
    Cache cache(dtype, 2, 5, 16, 64, {1501, 40, 700});
    cache.randomize(random);
    const Tables tables(cache);
    Tensor q(dtype, {3, 15, 64});
    q.randomize(random, 2.0);
    const Tensor expected(dtype, {3, 15, 64}), o(dtype, {3, 15, 64});
    BatchDecodeParams p;
    set_common(p, cache, tables, 1, expected, q, {});
    Context context;
    context.num_threads = 1;
    ASSERT_TRUE(succeeded(batch_decode(p, context)));
    for (int64_t i = 0; i < 3; ++i) {
      const ExactAttention exact = attention_row(cache, i, 1, cache.kv_len[i] - 1, q.row(i), {});
      EXPECT_TRUE(close(expected.row(i), exact.o, dtype)) << dtype_name(dtype) << " sequence " << i;
    }
    p.o = o.view();
    for (const int threads : {2, 3, 5, 16}) {
      context.num_threads = threads;
      ASSERT_TRUE(succeeded(batch_decode(p, context)));
      for (int64_t i = 0; i < 3; ++i) {
        EXPECT_TRUE(o.same_bits(i, expected, i)) << dtype_name(dtype) << " sequence " << i << " threads " << threads;
      }
    }
  }
}

TEST(BatchDecode, LongSequence) {
  std::mt19937 random(15);
  for (const DType dtype : kFloatTypes) {
    Cache cache(dtype, 1, 1, 16, 64, {3001});
    cache.randomize(random);
    const Tables tables(cache);
    Tensor q(dtype, {1, 2, 64});
    q.randomize(random, 2.0);
    const Tensor o(dtype, {1, 2, 64});
    BatchDecodeParams p;
    set_common(p, cache, tables, 0, o, q, {});
    ASSERT_TRUE(succeeded(batch_decode(p, {})));
    EXPECT_TRUE(close(o.row(0), attention_row(cache, 0, 0, 3000, q.row(0), {}).o, dtype)) << dtype_name(dtype);
  }
}

TEST(Attention, NothingToDo) {
  const Cache cache(DType::kFloat16, 1, 1, 4, 8, {});
  const Tables tables(cache);
  const Tensor q(DType::kFloat16, {0, 2, 8});
  const Tensor o(DType::kFloat16, {0, 2, 8});
  BatchDecodeParams decode;
  set_common(decode, cache, tables, 0, o, q, {});
  EXPECT_TRUE(succeeded(batch_decode(decode, {})));
  const Tensor qo_indptr = Tensor::int32({0});
  BatchPrefillParams prefill;
  set_common(prefill, cache, tables, 0, o, q, {});
  prefill.qo_indptr = qo_indptr.view();
  EXPECT_TRUE(succeeded(batch_prefill(prefill, {})));
}

}  // namespace
}  // namespace punica::testing
