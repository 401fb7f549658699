#include "punica/attention.h"

#include <tvm/ffi/tvm_ffi.h>

#include <optional>

#include "bindings/convert.h"
#include "bindings/paged_kv.h"
#include "bindings/shortcut.h"
#include "punica/build.h"
#include "src/common/validated.h"

namespace punica::bindings {
namespace {

std::optional<double> to_std(const ffi::Optional<double>& value) {
  return value.has_value() ? std::optional<double>(value.value()) : std::nullopt;
}

// What both operations have beside their tables.
void set_common(AttentionParams& params, const Tensor& o, const Tensor& q, const OptionalTensor& tmpbuf,
                const ffi::Optional<double>& sm_scale, const ffi::Optional<double>& rope_theta, double rope_scale,
                const OptionalTensor& lse, int64_t window_left, double logits_soft_cap) {
  params.o = to_view(o);
  params.q = to_view(q);
  params.tmpbuf = to_view(tmpbuf);
  params.lse = to_view(lse);
  params.sm_scale = to_std(sm_scale);
  params.rope_theta = to_std(rope_theta);
  params.rope_scale = rope_scale;
  params.window_left = window_left;
  params.logits_soft_cap = logits_soft_cap;
}

// On CUDA a workspace that is absent comes from the caller's allocator, through allocate(bytes). It goes back when the
// kernels are launched: the allocator gives it to later work of the same stream alone.
template <class Params, class Allocate>
Status add_workspace(const Params& params, Allocate allocate) {
  if (params.q.device.type != DeviceType::kCuda || params.tmpbuf.has_value() || !has_cuda()) return {};
  const int64_t bytes = workspace_bytes(params);
  return bytes > 0 ? allocate(bytes) : Status();
}

template <class Params>
void run(Params& params, int64_t num_threads) {
  const Call call(params.q, num_threads);
  raise_if_error(validate(params));
  std::optional<ffi::Tensor> workspace;
  raise_if_error(add_workspace(params, [&](int64_t bytes) -> Status {
    workspace = allocate(params.q.device, bytes);
    params.tmpbuf = to_view(Tensor(*workspace));
    return {};
  }));
  call.finish(run_validated(params, call.context()));
}

void batch_prefill(Tensor o, Tensor q, Tensor qo_indptr, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset,
                   OptionalTensor tmpbuf, int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads,
                   int64_t page_size, ffi::Optional<double> sm_scale, ffi::Optional<double> rope_theta,
                   double rope_scale, OptionalTensor lse, int64_t window_left, double logits_soft_cap,
                   int64_t num_threads) {
  BatchPrefillParams params;
  params.kv = to_paged_kv(kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size);
  set_common(params, o, q, tmpbuf, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap);
  params.qo_indptr = to_view(qo_indptr);
  run(params, num_threads);
}

void batch_decode(Tensor o, Tensor q, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, OptionalTensor tmpbuf,
                  int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size,
                  ffi::Optional<double> sm_scale, ffi::Optional<double> rope_theta, double rope_scale,
                  OptionalTensor lse, int64_t window_left, double logits_soft_cap, int64_t num_threads) {
  BatchDecodeParams params;
  params.kv = to_paged_kv(kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size);
  set_common(params, o, q, tmpbuf, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap);
  run(params, num_threads);
}

double cache_tokens(const PagedKv& kv) {
  return static_cast<double>(kv.kv_ptrs.shape[0]) * static_cast<double>(kv.page_size);
}

// Fills what both have from the arguments o, q at 0, the tables from `tables` on, then tmpbuf, the sizes of the cache,
// sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap.
void set_common(ShortcutCall& call, AttentionParams& params, int tables) {
  params.o = call.data(0);
  params.q = call.data(1);
  params.kv = to_paged_kv(call, tables, tables + 4);
  params.tmpbuf = call.optional_table(tables + 3);
  params.sm_scale = call.optional_number(tables + 8);
  params.rope_theta = call.optional_number(tables + 9);
  params.rope_scale = call.number(tables + 10);
  params.lse = call.optional_data(tables + 11);
  params.window_left = call.integer(tables + 12);
  params.logits_soft_cap = call.number(tables + 13);
}

template <class Params>
PyObject* run(ShortcutCall& call, Params& params, bool is_long, int tables) {
  ShortcutWorkspace workspace;
  return call.run(params, params.q, is_long, {0, tables + 3, tables + 11}, [&] {
    return add_workspace(params, [&](int64_t bytes) -> Status {
      if (!workspace.allocate(params.q.device, bytes)) return {StatusCode::kOutOfMemory, "no memory for tmpbuf"};
      params.tmpbuf = workspace.view();
      return {};
    });
  });
}

// o, q, qo_indptr, and what set_common() says, long_work
PyObject* shortcut_batch_prefill(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 18);
  BatchPrefillParams params;
  set_common(call, params, 3);
  params.qo_indptr = call.table(2);
  // As if every query saw all tokens of the cache.
  const bool is_long = nbytes(params.q) * cache_tokens(params.kv) > call.number(17);
  return run(call, params, is_long, 3);
}

// o, q, and what set_common() says, long_bytes
PyObject* shortcut_batch_decode(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 17);
  BatchDecodeParams params;
  set_common(call, params, 2);
  // A page of one layer is at least 256 bytes a token and KV head for the usual head_dim of 64 and up.
  const bool is_long = cache_tokens(params.kv) * 256 * static_cast<double>(params.kv.num_kv_heads) > call.number(16);
  return run(call, params, is_long, 2);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(batch_prefill, batch_prefill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(batch_decode, batch_decode);
PUNICA_EXPORT_SHORTCUT(batch_prefill);
PUNICA_EXPORT_SHORTCUT(batch_decode);

}  // namespace punica::bindings
