// The paged cache, which attention and kv_cache take in the same way.
#pragma once

#include "bindings/convert.h"
#include "bindings/shortcut.h"
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

// From kv_ptrs, kv_indptr, last_page_offset, which are the arguments from `tables` on, and num_layers, layer_idx,
// num_kv_heads, page_size, those from `sizes` on.
inline PagedKv to_paged_kv(ShortcutCall& call, int tables, int sizes) {
  return {
      .kv_ptrs = call.table(tables),
      .kv_indptr = call.table(tables + 1),
      .last_page_offset = call.table(tables + 2),
      .num_layers = call.integer(sizes),
      .layer_idx = call.integer(sizes + 1),
      .num_kv_heads = call.integer(sizes + 2),
      .page_size = call.integer(sizes + 3),
  };
}

}  // namespace punica::bindings
