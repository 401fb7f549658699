#include "reference.h"

#include <utility>

namespace punica::testing {

Cache::Cache(DType type, int64_t layers, int64_t heads, int64_t tokens_a_page, int64_t dim,
             std::vector<int64_t> lengths)
    : dtype(type),
      num_layers(layers),
      num_kv_heads(heads),
      page_size(tokens_a_page),
      head_dim(dim),
      pages(lengths.size()),
      kv_len(std::move(lengths)),
      kv_indptr({0}) {
  for (size_t i = 0; i < kv_len.size(); ++i) {
    const int64_t num_pages = (kv_len[i] + page_size - 1) / page_size;
    for (int64_t page = 0; page < num_pages; ++page) {
      pages[i].emplace_back(dtype, std::vector<int64_t>{1, num_layers * 2 * num_kv_heads * page_size * head_dim});
      pages[i].back().fill(NAN);
      kv_ptrs.push_back(pages[i].back().address());
    }
    kv_indptr.push_back(static_cast<int32_t>(kv_ptrs.size()));
    // An empty sequence's entry is not looked at.
    last_page_offset.push_back(num_pages == 0 ? -7 : static_cast<int32_t>(kv_len[i] - (num_pages - 1) * page_size));
  }
}

void Cache::randomize(std::mt19937& random) {
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < kv_len.size(); ++i) {
    for (int64_t t = 0; t < kv_len[i]; ++t) {
      Tensor& page = pages[i][t / page_size];
      for (int64_t layer = 0; layer < num_layers; ++layer) {
        for (int part = 0; part < 2; ++part) {
          for (int64_t head = 0; head < num_kv_heads; ++head) {
            for (int64_t d = 0; d < head_dim; ++d) page.set(0, offset(t, layer, part, head) + d, normal(random));
          }
        }
      }
    }
  }
}

}  // namespace punica::testing
