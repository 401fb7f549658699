#include "src/common/paged_kv.h"

#include <string>

namespace punica {
namespace {

// indptr[i] <= indptr[i + 1], both in [0, limit].
bool check_range(Check& check, const char* name, const int32_t* indptr, int64_t i, int64_t limit,
                 const char* limit_name) {
  if (indptr[i] >= 0 && indptr[i] <= indptr[i + 1] && indptr[i + 1] <= limit) return true;
  if (indptr[i] < 0) return check.fail(at(name, i) + " must be at least 0, got " + std::to_string(indptr[i]));
  return check.fail(at(name, i + 1) + " must be in [" + std::to_string(indptr[i]) + ", " + std::to_string(limit) +
                    "] (" + at(name, i) + ", " + limit_name + "), got " + std::to_string(indptr[i + 1]));
}

}  // namespace

bool check_head_dim(Check& check, const char* name, int64_t head_dim) {
  return (head_dim >= 2 && head_dim <= 256 && head_dim % 2 == 0) ||
         check.fail(std::string(name) + " must have an even head_dim (last extent) in [2, 256], got " +
                    std::to_string(head_dim));
}

bool check_paged_kv(Check& check, const PagedKv& kv, int64_t num_sequences, int64_t head_dim, DType dtype) {
  return check.tensor("kv_ptrs", kv.kv_ptrs, DType::kInt64, {{Dim::kAny, "num_pages"}}) &&
         check.tensor("last_page_offset", kv.last_page_offset, DType::kInt32, {{num_sequences, "B"}}) &&
         check.tensor("kv_indptr", kv.kv_indptr, DType::kInt32, {{num_sequences + 1, "B + 1"}}) &&
         check.at_least("num_layers", kv.num_layers, 1) &&
         check.index("layer_idx", kv.layer_idx, kv.num_layers, "num_layers") &&
         check.at_least("num_kv_heads", kv.num_kv_heads, 1) && check.at_least("page_size", kv.page_size, 1) &&
         check.product_fits(
             "a page of num_layers * 2 * num_kv_heads * page_size * head_dim",
             {kv.num_layers, 2, kv.num_kv_heads, kv.page_size, head_dim, static_cast<int64_t>(dtype_size(dtype))});
}

bool check_sequence(Check& check, const PagedKv& kv, int64_t i) {
  const int32_t* indptr = kv.kv_indptr.as<const int32_t>();
  if (!check_range(check, "kv_indptr", indptr, i, kv.kv_ptrs.shape[0], "len(kv_ptrs)")) return false;
  const int32_t offset = kv.last_page_offset.as<const int32_t>()[i];
  if (indptr[i] == indptr[i + 1] || (offset >= 1 && offset <= kv.page_size)) return true;
  return check.fail(at("last_page_offset", i) + " must be in [1, " + std::to_string(kv.page_size) +
                    "] (page_size), got " + std::to_string(offset));
}

bool check_rows(Check& check, const char* name, const TensorView& indptr, int64_t i, int64_t rows,
                const char* rows_name) {
  return check_range(check, name, indptr.as<const int32_t>(), i, rows, rows_name);
}

bool check_pages(Check& check, const PagedKv& kv, const SequencePages& sequence, int64_t first) {
  const int64_t* addresses = kv.kv_ptrs.as<const int64_t>() + sequence.first_page;
  for (int64_t page = token_place(first, kv.page_size).page; page < sequence.num_pages; ++page) {
    if (addresses[page] != 0 && addresses[page] % kPageAlignment == 0) continue;
    const std::string name = at("kv_ptrs", sequence.first_page + page);
    if (addresses[page] == 0) return check.fail(name + " is a null address of a page that is used");
    return check.fail(name + " must be aligned to " + std::to_string(kPageAlignment) + " bytes, got " +
                      std::to_string(addresses[page]));
  }
  return true;
}

}  // namespace punica
