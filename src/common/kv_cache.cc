#include "punica/kv_cache.h"

#include <array>
#include <string>

#include "src/common/backend.h"
#include "src/common/check.h"
#include "src/common/contents.h"
#include "src/common/paged_kv.h"
#include "src/common/validated.h"

namespace punica {
namespace {

auto tables_of(InitKvParams& p) {
  return std::array{&p.seqlen_indptr, &p.kv.kv_ptrs, &p.kv.kv_indptr, &p.kv.last_page_offset};
}

auto tables_of(AppendKvParams& p) { return std::array{&p.kv.kv_ptrs, &p.kv.kv_indptr, &p.kv.last_page_offset}; }

bool check_contents(Check& check, const InitKvParams& p) {
  const int32_t* indptr = p.seqlen_indptr.as<const int32_t>();
  for (int64_t i = 0; i < p.kv.num_sequences(); ++i) {
    if (!check_sequence(check, p.kv, i) ||
        !check_rows(check, "seqlen_indptr", p.seqlen_indptr, i, p.k.shape[0], "rows of k")) {
      return false;
    }
    const SequencePages sequence = p.kv.sequence(i);
    const int64_t length = int64_t{indptr[i + 1]} - indptr[i];
    if (sequence.num_pages == 0 || length == 0) continue;
    if (length > sequence.kv_len) {
      return check.fail("seqlen_indptr gives sequence " + std::to_string(i) + " " + std::to_string(length) +
                        " tokens, which must be at most " + std::to_string(sequence.kv_len) + " (its kv_len)");
    }
    if (!check_pages(check, p.kv, sequence, sequence.kv_len - length)) return false;
  }
  return true;
}

bool check_contents(Check& check, const AppendKvParams& p) {
  for (int64_t i = 0; i < p.kv.num_sequences(); ++i) {
    if (!check_sequence(check, p.kv, i)) return false;
    const SequencePages sequence = p.kv.sequence(i);
    if (sequence.num_pages > 0 && !check_pages(check, p.kv, sequence, sequence.kv_len - 1)) return false;
  }
  return true;
}

template <class Params>
Status check_contents(const char* op, const Params& params, const Context& context) {
  return check_tables(
      op, params.k.device, context, params, [](Params& p) { return tables_of(p); },
      [](Check& check, const Params& p) { return check_contents(check, p); });
}

}  // namespace

Status validate(const InitKvParams& p) {
  Check check("init_kv");
  const int64_t num_sequences = p.kv.last_page_offset.shape[0];
  static_cast<void>(
      check.data("k", p.k, {{Dim::kAny, "rows"}, {p.kv.num_kv_heads, "num_kv_heads"}, {Dim::kAny, "head_dim"}}) &&
      check_head_dim(check, "k", p.k.shape[2]) &&
      check.data("v", p.v, {{p.k.shape[0], "rows"}, {p.kv.num_kv_heads, "num_kv_heads"}, {p.k.shape[2], "head_dim"}}) &&
      check_paged_kv(check, p.kv, num_sequences, p.k.shape[2], p.k.dtype) &&
      check.tensor("seqlen_indptr", p.seqlen_indptr, DType::kInt32, {{num_sequences + 1, "B + 1"}}));
  return check.status();
}

Status validate(const AppendKvParams& p) {
  Check check("append_kv");
  static_cast<void>(
      check.data("k", p.k, {{Dim::kAny, "B"}, {p.kv.num_kv_heads, "num_kv_heads"}, {Dim::kAny, "head_dim"}}) &&
      check_head_dim(check, "k", p.k.shape[2]) &&
      check.data("v", p.v, {{p.k.shape[0], "B"}, {p.kv.num_kv_heads, "num_kv_heads"}, {p.k.shape[2], "head_dim"}}) &&
      check_paged_kv(check, p.kv, p.k.shape[0], p.k.shape[2], p.k.dtype));
  return check.status();
}

Status run_validated(const InitKvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(check_contents("init_kv", p, context));
  if (p.k.numel() == 0 || p.kv.num_sequences() == 0) return {};
  return PUNICA_ON_BACKEND("init_kv", p.k.device, init_kv(p, context));
}

Status run_validated(const AppendKvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(check_contents("append_kv", p, context));
  if (p.k.numel() == 0) return {};
  return PUNICA_ON_BACKEND("append_kv", p.k.device, append_kv(p, context));
}

Status init_kv(const InitKvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

Status append_kv(const AppendKvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

}  // namespace punica
