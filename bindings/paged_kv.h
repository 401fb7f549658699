// The paged cache, which attention and kv_cache take in the same way.
#pragma once

#include "bindings/convert.h"
#include "punica/paged_kv.h"

namespace punica::bindings {

inline PagedKv to_paged_kv(const Tensor& kv_ptrs, const Tensor& kv_indptr, const Tensor& last_page_offset,
                           int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size) {
  return {
      .kv_ptrs = to_view(kv_ptrs),
      .kv_indptr = to_view(kv_indptr),
      .last_page_offset = to_view(last_page_offset),
      .num_layers = num_layers,
      .layer_idx = layer_idx,
      .num_kv_heads = num_kv_heads,
      .page_size = page_size,
  };
}

}  // namespace punica::bindings
