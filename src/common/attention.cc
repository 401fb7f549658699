#include "punica/attention.h"

#include <algorithm>
#include <array>
#include <string>

#include "src/common/backend.h"
#include "src/common/check.h"
#include "src/common/contents.h"
#include "src/common/paged_kv.h"
#include "src/common/validated.h"

namespace punica {
namespace {

constexpr const char* kPrefill = "batch_prefill";
constexpr const char* kDecode = "batch_decode";

// Everything but the tables of sequences and the workspace.
bool check_common(Check& check, const AttentionParams& p, const char* rows) {
  return check.data("q", p.q, {{Dim::kAny, rows}, {Dim::kAny, "num_qo_heads"}, {Dim::kAny, "head_dim"}}) &&
         check_head_dim(check, "q", p.q.shape[2]) &&
         check.data("o", p.o, {{p.q.shape[0], rows}, {p.q.shape[1], "num_qo_heads"}, {p.q.shape[2], "head_dim"}}) &&
         (!p.lse.has_value() ||
          check.tensor("lse", p.lse, DType::kFloat32, {{p.q.shape[0], rows}, {p.q.shape[1], "num_qo_heads"}})) &&
         (!p.sm_scale || check.finite("sm_scale", *p.sm_scale)) &&
         (!p.rope_theta || check.positive("rope_theta", *p.rope_theta)) && check.positive("rope_scale", p.rope_scale) &&
         check.at_least("window_left", p.window_left, -1) && check.not_negative("logits_soft_cap", p.logits_soft_cap);
}

bool check_heads(Check& check, const AttentionParams& p) {
  if (p.q.shape[1] > 0 && p.q.shape[1] % p.kv.num_kv_heads == 0) return true;
  return check.fail("num_kv_heads must divide the heads of q (num_qo_heads = " + std::to_string(p.q.shape[1]) +
                    "), got " + std::to_string(p.kv.num_kv_heads));
}

bool check_overlap(Check& check, const AttentionParams& p, const TensorView& qo_indptr) {
  return check.disjoint({{"o", p.o}, {"lse", p.lse}, {"tmpbuf", p.tmpbuf}},
                        {{"q", p.q},
                         {"kv_ptrs", p.kv.kv_ptrs},
                         {"kv_indptr", p.kv.kv_indptr},
                         {"last_page_offset", p.kv.last_page_offset},
                         {"qo_indptr", qo_indptr}});
}

// The pages that the last q_len tokens of the sequence look at.
bool check_seen_pages(Check& check, const AttentionParams& p, int64_t i, int64_t q_len) {
  const SequencePages sequence = p.kv.sequence(i);
  if (q_len == 0 || sequence.num_pages == 0) return true;
  const int64_t first = sequence.kv_len - q_len;
  // A window larger than the sequence must not overflow the subtraction.
  const bool all = p.window_left < 0 || p.window_left >= first;
  return check_pages(check, p.kv, sequence, all ? 0 : first - p.window_left);
}

auto tables_of(BatchPrefillParams& p) {
  return std::array{&p.qo_indptr, &p.kv.kv_ptrs, &p.kv.kv_indptr, &p.kv.last_page_offset};
}

auto tables_of(BatchDecodeParams& p) { return std::array{&p.kv.kv_ptrs, &p.kv.kv_indptr, &p.kv.last_page_offset}; }

bool check_contents(Check& check, const BatchPrefillParams& p) {
  const int32_t* indptr = p.qo_indptr.as<const int32_t>();
  for (int64_t i = 0; i < p.kv.num_sequences(); ++i) {
    if (!check_sequence(check, p.kv, i) || !check_rows(check, "qo_indptr", p.qo_indptr, i, p.q.shape[0], "rows of q") ||
        !check_seen_pages(check, p, i, int64_t{indptr[i + 1]} - indptr[i])) {
      return false;
    }
  }
  return true;
}

bool check_contents(Check& check, const BatchDecodeParams& p) {
  for (int64_t i = 0; i < p.kv.num_sequences(); ++i) {
    if (!check_sequence(check, p.kv, i) || !check_seen_pages(check, p, i, 1)) return false;
  }
  return true;
}

template <class Params>
Status check_contents(const char* op, const Params& params, const Context& context) {
  return check_tables(
      op, params.q.device, context, params, [](Params& p) { return tables_of(p); },
      [](Check& check, const Params& p) { return check_contents(check, p); });
}

// The CPU backend allocates a workspace that is absent; the CUDA backend allocates nothing.
template <class Params>
Status check_workspace_is_there(const char* op, [[maybe_unused]] const Params& p) {
  Check check(op);
#ifdef PUNICA_WITH_CUDA
  if (p.q.device.type == DeviceType::kCuda && !p.tmpbuf.has_value()) {
    if (const int64_t bytes = workspace_bytes(p); bytes > 0) {
      static_cast<void>(check.fail("tmpbuf must have at least " + std::to_string(bytes) + " bytes on CUDA, got none"));
    }
  }
#endif
  return check.status();
}

template <class Params>
int64_t backend_workspace_bytes(const Params& p) {
#ifdef PUNICA_WITH_CUDA
  if (p.q.device.type == DeviceType::kCuda) return cuda::workspace_bytes(p);
#endif
  return cpu::workspace_bytes(p);
}

}  // namespace

Status validate(const BatchPrefillParams& p) {
  Check check(kPrefill);
  const int64_t num_sequences = p.kv.last_page_offset.shape[0];
  static_cast<void>(check_common(check, p, "rows") &&
                    check_paged_kv(check, p.kv, num_sequences, p.q.shape[2], p.q.dtype) && check_heads(check, p) &&
                    check.tensor("qo_indptr", p.qo_indptr, DType::kInt32, {{num_sequences + 1, "B + 1"}}) &&
                    check.workspace("tmpbuf", p.tmpbuf, workspace_bytes(p)) && check_overlap(check, p, p.qo_indptr));
  return check.status();
}

Status validate(const BatchDecodeParams& p) {
  Check check(kDecode);
  static_cast<void>(check_common(check, p, "B") && check_paged_kv(check, p.kv, p.q.shape[0], p.q.shape[2], p.q.dtype) &&
                    check_heads(check, p) && check.workspace("tmpbuf", p.tmpbuf, workspace_bytes(p)) &&
                    check_overlap(check, p, TensorView{}));
  return check.status();
}

int64_t workspace_bytes(const BatchPrefillParams& p) { return backend_workspace_bytes(p); }
int64_t workspace_bytes(const BatchDecodeParams& p) { return backend_workspace_bytes(p); }

Status run_validated(const BatchPrefillParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(check_contents(kPrefill, p, context));
  if (p.q.numel() == 0 || p.kv.num_sequences() == 0) return {};
  PUNICA_RETURN_IF_ERROR(check_workspace_is_there(kPrefill, p));
  return PUNICA_ON_BACKEND(kPrefill, p.q.device, batch_prefill(p, context));
}

Status run_validated(const BatchDecodeParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(check_contents(kDecode, p, context));
  if (p.q.numel() == 0) return {};
  PUNICA_RETURN_IF_ERROR(check_workspace_is_there(kDecode, p));
  return PUNICA_ON_BACKEND(kDecode, p.q.device, batch_decode(p, context));
}

Status batch_prefill(const BatchPrefillParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

Status batch_decode(const BatchDecodeParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

}  // namespace punica
