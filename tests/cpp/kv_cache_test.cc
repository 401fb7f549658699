// init_kv and append_kv: every token where it belongs, and not one byte elsewhere.
#include "punica/kv_cache.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

struct Case {
  int64_t num_layers, layer, num_kv_heads, page_size, head_dim;
};

const Case kCases[] = {{1, 0, 1, 1, 2}, {3, 1, 3, 16, 64}, {2, 1, 2, 5, 80}, {2, 0, 1, 64, 30}, {1, 0, 8, 16, 128}};

PagedKv paged_kv(const Cache& cache, int64_t layer, const Tensor& ptrs, const Tensor& indptr, const Tensor& offsets) {
  PagedKv kv;
  kv.kv_ptrs = ptrs.view();
  kv.kv_indptr = indptr.view();
  kv.last_page_offset = offsets.view();
  kv.num_layers = cache.num_layers;
  kv.layer_idx = layer;
  kv.num_kv_heads = cache.num_kv_heads;
  kv.page_size = cache.page_size;
  return kv;
}

// Copies token row `row` of k, v to its place, as the operations should.
void write(Cache& cache, int64_t i, int64_t position, int64_t layer, const Tensor& k, const Tensor& v, int64_t row) {
  Tensor& page = cache.pages[i][position / cache.page_size];
  for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
    for (int64_t d = 0; d < cache.head_dim; ++d) {
      const int64_t column = head * cache.head_dim + d;
      page.set(0, cache.offset(position, layer, 0, head) + d, k.get(row, column));
      page.set(0, cache.offset(position, layer, 1, head) + d, v.get(row, column));
    }
  }
}

// The cache's pages, copied; the copy's pointers are not those of the original.
Cache copy_of(const Cache& cache) {
  Cache copy = cache;
  for (auto& pages : copy.pages) {
    for (Tensor& page : pages) page = page.clone();
  }
  return copy;
}

void expect_same_pages(const Cache& got, const Cache& want) {
  for (size_t i = 0; i < got.pages.size(); ++i) {
    for (size_t page = 0; page < got.pages[i].size(); ++page) {
      EXPECT_TRUE(got.pages[i][page].same_bits(want.pages[i][page])) << "sequence " << i << " page " << page;
    }
  }
}

TEST(InitKv, WritesTheLastTokens) {
  std::mt19937 random(21);
  const std::vector<int64_t> kv_len = {7, 0, 70, 16, 5, 1};
  // All of sequence 0, none for the empty one, the last 33 of 70, none of the fourth, ...
  const std::vector<int32_t> indptr = {0, 7, 9, 42, 42, 44, 45};
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : kCases) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " dim " + std::to_string(c.head_dim));
      Cache cache(dtype, c.num_layers, c.num_kv_heads, c.page_size, c.head_dim, kv_len);
      cache.randomize(random);
      Cache want = copy_of(cache);
      Tensor k(dtype, {46, c.num_kv_heads, c.head_dim}, 3);  // one row more than the table covers
      Tensor v(dtype, {46, c.num_kv_heads, c.head_dim}, 10);
      k.randomize(random);
      v.randomize(random);
      v.set(0, 0, NAN);  // moved like any other value
      for (size_t i = 0; i < kv_len.size(); ++i) {
        if (kv_len[i] == 0) continue;
        for (int64_t row = indptr[i]; row < indptr[i + 1]; ++row) {
          write(want, static_cast<int64_t>(i), kv_len[i] - indptr[i + 1] + row, c.layer, k, v, row);
        }
      }
      const Tensor ptrs = Tensor::int64(cache.kv_ptrs);
      const Tensor kv_indptr = Tensor::int32(cache.kv_indptr);
      const Tensor offsets = Tensor::int32(cache.last_page_offset);
      const Tensor seqlen_indptr = Tensor::int32(indptr);
      InitKvParams p;
      p.kv = paged_kv(cache, c.layer, ptrs, kv_indptr, offsets);
      p.k = k.view();
      p.v = v.view();
      p.seqlen_indptr = seqlen_indptr.view();
      ASSERT_TRUE(succeeded(init_kv(p, {})));
      expect_same_pages(cache, want);
    }
  }
}

TEST(AppendKv, WritesTheLastToken) {
  std::mt19937 random(22);
  const std::vector<int64_t> kv_len = {7, 0, 70, 16, 1};
  for (const DType dtype : kFloatTypes) {
    for (const Case& c : kCases) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " dim " + std::to_string(c.head_dim));
      Cache cache(dtype, c.num_layers, c.num_kv_heads, c.page_size, c.head_dim, kv_len);
      cache.randomize(random);
      Cache want = copy_of(cache);
      const auto batch = static_cast<int64_t>(kv_len.size());
      Tensor k(dtype, {batch, c.num_kv_heads, c.head_dim}, 3);
      Tensor v(dtype, {batch, c.num_kv_heads, c.head_dim});
      k.randomize(random);
      v.randomize(random);
      for (int64_t i = 0; i < batch; ++i) {
        if (kv_len[i] > 0) write(want, i, kv_len[i] - 1, c.layer, k, v, i);
      }
      const Tensor ptrs = Tensor::int64(cache.kv_ptrs);
      const Tensor kv_indptr = Tensor::int32(cache.kv_indptr);
      const Tensor offsets = Tensor::int32(cache.last_page_offset);
      AppendKvParams p;
      p.kv = paged_kv(cache, c.layer, ptrs, kv_indptr, offsets);
      p.k = k.view();
      p.v = v.view();
      ASSERT_TRUE(succeeded(append_kv(p, {})));
      expect_same_pages(cache, want);
    }
  }
}

TEST(KvCache, NothingToDo) {
  const Cache cache(DType::kFloat32, 1, 2, 4, 8, {});
  const Tensor ptrs = Tensor::int64({});
  const Tensor indptr = Tensor::int32({0});
  const Tensor offsets = Tensor::int32({});
  const Tensor none(DType::kFloat32, {0, 2, 8});
  InitKvParams init;
  init.kv = paged_kv(cache, 0, ptrs, indptr, offsets);
  init.k = init.v = none.view();
  init.seqlen_indptr = indptr.view();
  EXPECT_TRUE(succeeded(init_kv(init, {})));
  AppendKvParams append;
  append.kv = init.kv;
  append.k = append.v = none.view();
  EXPECT_TRUE(succeeded(append_kv(append, {})));
}

}  // namespace
}  // namespace punica::testing
