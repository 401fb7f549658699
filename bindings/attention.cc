#include "punica/attention.h"

#include <tvm/ffi/tvm_ffi.h>

#include <optional>

#include "bindings/convert.h"
#include "bindings/paged_kv.h"
#include "punica/build.h"

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

// On CUDA a workspace that is absent comes from the caller's allocator. It goes back when the kernels are launched:
// the allocator gives it to later work of the same stream alone.
template <class Params>
void run(Params& params, int64_t num_threads, Status (*op)(const Params&, const Context&)) {
  const Call call(params.q, num_threads);
  std::optional<ffi::Tensor> workspace;
  if (params.q.device.type == DeviceType::kCuda && !params.tmpbuf.has_value() && has_cuda()) {
    // How much it takes is a question about valid params only.
    raise_if_error(validate(params));
    if (const int64_t bytes = workspace_bytes(params); bytes > 0) {
      workspace = allocate(params.q.device, bytes);
      params.tmpbuf = to_view(Tensor(*workspace));
    }
  }
  call.finish(op(params, call.context()));
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
  run(params, num_threads, punica::batch_prefill);
}

void batch_decode(Tensor o, Tensor q, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, OptionalTensor tmpbuf,
                  int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size,
                  ffi::Optional<double> sm_scale, ffi::Optional<double> rope_theta, double rope_scale,
                  OptionalTensor lse, int64_t window_left, double logits_soft_cap, int64_t num_threads) {
  BatchDecodeParams params;
  params.kv = to_paged_kv(kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size);
  set_common(params, o, q, tmpbuf, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap);
  run(params, num_threads, punica::batch_decode);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(batch_prefill, batch_prefill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(batch_decode, batch_decode);

}  // namespace punica::bindings
