// The operations as C++ functions of torch::Tensor, with the names and arguments of LoRAX's punica_kernels. Optional:
// for C++ code that has tensors of torch already. It needs torch's headers and the installed core, nothing else:
//
//   #include "punica_kernels/torch.h"        // find_package(punica), find_package(Torch); punica::core,
//   ${TORCH_LIBRARIES} punica_kernels::dispatch_bgmv(y, x, w_ptr, indices, layer_idx, 1.0f);
//
// The contract is that of the core (punica/lora.h and its neighbours). What breaks it is a c10::Error whose message
// names operation, argument, what was expected and what came. Tensors are on the CPU or on CUDA; there the work goes to
// torch's current stream of their device, workspaces come from torch's allocator, and every call can be captured in a
// CUDA graph. A workspace may be an undefined tensor: the function then takes what it needs. PUNICA_CHECK=1 has the
// contents of tables on CUDA checked. No backward: see the error about tensors that require grad.
//
// Nothing here includes CUDA's headers: torch is asked for its stream through c10's interface of all devices.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string_view>

#include "punica/attention.h"
#include "punica/build.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"

namespace punica_kernels {

// What batch_prefill and batch_decode can do beside the original. Its kernels always rotated q and k, with rope_theta =
// 1e4: callers with caches of unrotated keys set that.
struct AttentionOptions {
  std::optional<double> sm_scale;    // default 1 / sqrt(head dim)
  std::optional<double> rope_theta;  // rotate q and k inside; default: no rotation
  double rope_scale = 1.0;
  torch::Tensor lse;             // float32 [rows, heads], receives the log-sum-exp in base 2; undefined: not wanted
  int64_t window_left = -1;      // keys before a query's own position that it sees; -1: all
  double logits_soft_cap = 0.0;  // score = cap * tanh(score / cap) when > 0
};

namespace detail {

inline punica::DType to_dtype(torch::ScalarType type) {
  switch (type) {
    case torch::kHalf:
      return punica::DType::kFloat16;
    case torch::kBFloat16:
      return punica::DType::kBFloat16;
    case torch::kFloat:
      return punica::DType::kFloat32;
    case torch::kDouble:
      return punica::DType::kFloat64;
    case torch::kInt:
      return punica::DType::kInt32;
    case torch::kLong:
      return punica::DType::kInt64;
    case torch::kByte:
      return punica::DType::kUInt8;
    case torch::kChar:
      return punica::DType::kInt8;
    case torch::kShort:
      return punica::DType::kInt16;
    case torch::kBool:
      return punica::DType::kBool;
    default:
      return punica::DType::kOther;
  }
}

inline punica::Device to_device(torch::Device device) {
  if (device.is_cpu()) return {punica::DeviceType::kCpu, 0};
  return {device.is_cuda() ? punica::DeviceType::kCuda : punica::DeviceType::kOther, device.index()};
}

enum class Access { kRead, kWrite };

// A view of a tensor; one that is not defined gives an absent view, which the core refuses where it is required.
inline punica::TensorView to_view(const char* op, const torch::Tensor& tensor, Access access = Access::kRead) {
  punica::TensorView view;
  if (!tensor.defined()) return view;
  TORCH_CHECK(tensor.layout() == torch::kStrided && !tensor.is_neg() && !tensor.is_conj(), "punica_kernels.", op,
              ": tensors must be strided and no lazy views, got ", tensor.toString());
  TORCH_CHECK(!torch::GradMode::is_enabled() || !tensor.requires_grad(), "punica_kernels.", op,
              ": a tensor requires grad, but there is no backward; use torch::NoGradGuard");
  view.data = access == Access::kWrite ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  view.dtype = to_dtype(tensor.scalar_type());
  view.device = to_device(tensor.device());
  view.rank = static_cast<int32_t>(tensor.dim());
  for (int i = 0; i < std::min(view.rank, punica::TensorView::kMaxRank); ++i) {
    view.shape[i] = tensor.size(i);
    view.stride[i] = tensor.stride(i);
  }
  return view;
}

inline bool checks_contents() {
  static const bool value = [] {
    const char* text = std::getenv("PUNICA_CHECK");
    return text != nullptr && std::string_view(text) == "1";
  }();
  return value;
}

// How a call runs that has this tensor.
inline punica::Context context_of(const torch::Tensor& tensor) {
  punica::Context context;
  context.num_threads = at::get_num_threads();
  if (tensor.defined() && tensor.is_cuda()) {
    const c10::impl::VirtualGuardImpl guard(tensor.device().type());
    context.stream = guard.getStream(tensor.device()).native_handle();
    context.check_contents = checks_contents();
  }
  return context;
}

inline void raise_if_error(const punica::Status& status) {
  TORCH_CHECK(status.ok(), "punica_kernels.", status.message());
}

// After a call that went well: autograd's count of changes, of all that was written.
inline void written(std::initializer_list<const torch::Tensor*> tensors) {
  for (const torch::Tensor* tensor : tensors) {
    if (tensor->defined() && !tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  }
}

inline punica::PagedKv to_paged_kv(const char* op, const torch::Tensor& kv_ptrs, const torch::Tensor& kv_indptr,
                                   const torch::Tensor& last_page_offset, int num_layers, int layer_idx,
                                   int num_kv_heads, int page_size) {
  return {
      .kv_ptrs = to_view(op, kv_ptrs),
      .kv_indptr = to_view(op, kv_indptr),
      .last_page_offset = to_view(op, last_page_offset),
      .num_layers = num_layers,
      .layer_idx = layer_idx,
      .num_kv_heads = num_kv_heads,
      .page_size = page_size,
  };
}

template <class Params, class Operation>
void attention(const char* op, Operation operation, Params& params, const torch::Tensor& o, const torch::Tensor& q,
               torch::Tensor tmpbuf, const AttentionOptions& options) {
  params.o = to_view(op, o, Access::kWrite);
  params.q = to_view(op, q);
  params.lse = to_view(op, options.lse, Access::kWrite);
  params.tmpbuf = to_view(op, tmpbuf, Access::kWrite);
  params.sm_scale = options.sm_scale;
  params.rope_theta = options.rope_theta;
  params.rope_scale = options.rope_scale;
  params.window_left = options.window_left;
  params.logits_soft_cap = options.logits_soft_cap;
  if (q.defined() && q.is_cuda() && !tmpbuf.defined() && punica::has_cuda()) {
    raise_if_error(punica::validate(params));
    const int64_t bytes = punica::workspace_bytes(params);
    if (bytes > 0) {
      tmpbuf = torch::empty({bytes}, torch::TensorOptions().dtype(torch::kByte).device(q.device()));
      params.tmpbuf = to_view(op, tmpbuf, Access::kWrite);
    }
  }
  raise_if_error(operation(params, context_of(q)));
  written({&o, &options.lse, &tmpbuf});
}

inline void sgmv(const char* op, punica::SgmvWeights weights, const torch::Tensor& y, const torch::Tensor& x,
                 const torch::Tensor& w_ptr, const torch::Tensor& s_start, const torch::Tensor& s_end,
                 const torch::Tensor& tmp, int layer_idx) {
  const punica::SgmvParams params{
      .weights = weights,
      .y = to_view(op, y, Access::kWrite),
      .x = to_view(op, x),
      .w_ptr = to_view(op, w_ptr),
      .s_start = to_view(op, s_start),
      .s_end = to_view(op, s_end),
      .tmp = to_view(op, tmp, Access::kWrite),
      .layer_idx = layer_idx,
  };
  raise_if_error(punica::sgmv(params, context_of(y)));
  written({&y, &tmp});
}

}  // namespace detail

// ---- Attention over paged keys and values -------------------------------------------------------------------------

inline void batch_prefill(torch::Tensor o, torch::Tensor q, torch::Tensor qo_indptr, torch::Tensor kv_ptrs,
                          torch::Tensor kv_indptr, torch::Tensor last_page_offset, torch::Tensor tmpbuf, int num_layers,
                          int layer_idx, int num_kv_heads, int page_size, const AttentionOptions& options = {}) {
  constexpr const char* kOp = "batch_prefill";
  punica::BatchPrefillParams params;
  params.kv =
      detail::to_paged_kv(kOp, kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size);
  params.qo_indptr = detail::to_view(kOp, qo_indptr);
  detail::attention(kOp, punica::batch_prefill, params, o, q, tmpbuf, options);
}

inline void batch_decode(torch::Tensor o, torch::Tensor q, torch::Tensor kv_ptrs, torch::Tensor kv_indptr,
                         torch::Tensor last_page_offset, torch::Tensor tmpbuf, int num_layers, int layer_idx,
                         int num_kv_heads, int page_size, const AttentionOptions& options = {}) {
  constexpr const char* kOp = "batch_decode";
  punica::BatchDecodeParams params;
  params.kv =
      detail::to_paged_kv(kOp, kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size);
  detail::attention(kOp, punica::batch_decode, params, o, q, tmpbuf, options);
}

inline void init_kv(torch::Tensor kv_ptrs, torch::Tensor kv_indptr, torch::Tensor last_page_offset, torch::Tensor k,
                    torch::Tensor v, torch::Tensor seqlen_indptr, int num_layers, int layer_idx, int num_kv_heads,
                    int page_size) {
  constexpr const char* kOp = "init_kv";
  const punica::InitKvParams params{
      .kv = detail::to_paged_kv(kOp, kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads,
                                page_size),
      .k = detail::to_view(kOp, k),
      .v = detail::to_view(kOp, v),
      .seqlen_indptr = detail::to_view(kOp, seqlen_indptr),
  };
  detail::raise_if_error(punica::init_kv(params, detail::context_of(k)));
  detail::written({&kv_ptrs});  // for what lies behind it
}

inline void append_kv(torch::Tensor kv_ptrs, torch::Tensor kv_indptr, torch::Tensor last_page_offset, torch::Tensor k,
                      torch::Tensor v, int num_layers, int layer_idx, int num_kv_heads, int page_size) {
  constexpr const char* kOp = "append_kv";
  const punica::AppendKvParams params{
      .kv = detail::to_paged_kv(kOp, kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads,
                                page_size),
      .k = detail::to_view(kOp, k),
      .v = detail::to_view(kOp, v),
  };
  detail::raise_if_error(punica::append_kv(params, detail::context_of(k)));
  detail::written({&kv_ptrs});
}

// ---- LoRA ----------------------------------------------------------------------------------------------------------

inline void dispatch_bgmv(torch::Tensor y, torch::Tensor x, torch::Tensor w_ptr, torch::Tensor indices,
                          int64_t layer_idx, float scale) {
  constexpr const char* kOp = "dispatch_bgmv";
  const punica::BgmvParams params{
      .y = detail::to_view(kOp, y, detail::Access::kWrite),
      .x = detail::to_view(kOp, x),
      .w_ptr = detail::to_view(kOp, w_ptr),
      .indices = detail::to_view(kOp, indices),
      .layer_idx = layer_idx,
      .scale = scale,
  };
  detail::raise_if_error(punica::dispatch_bgmv(params, detail::context_of(y)));
  detail::written({&y});
}

inline void dispatch_sgmv_cutlass(torch::Tensor y, torch::Tensor x, torch::Tensor w_ptr, torch::Tensor s_start,
                                  torch::Tensor s_end, torch::Tensor tmp, int layer_idx) {
  detail::sgmv("sgmv_cutlass", punica::SgmvWeights::kInOut, y, x, w_ptr, s_start, s_end, tmp, layer_idx);
}

inline void dispatch_sgmv_shrink(torch::Tensor y, torch::Tensor x, torch::Tensor w_ptr, torch::Tensor s_start,
                                 torch::Tensor s_end, torch::Tensor tmp, int layer_idx) {
  detail::sgmv("sgmv_shrink", punica::SgmvWeights::kOutIn, y, x, w_ptr, s_start, s_end, tmp, layer_idx);
}

// Bytes of dispatch_sgmv_cutlass's tmp, or more.
inline size_t sgmv_tmp_size(int num_problems) {
  TORCH_CHECK(num_problems >= 0, "punica_kernels.sgmv_tmp_size: num_problems must be at least 0, got ", num_problems);
  return static_cast<size_t>(punica::sgmv_cutlass_tmp_size(num_problems));
}

// ---- RMS norm ------------------------------------------------------------------------------------------------------

// With a residual: residual += input first, and that sum is normalised.
inline void dispatch_rms_norm(torch::Tensor output, torch::Tensor input, torch::Tensor weight, float epsilon,
                              torch::Tensor residual = {}) {
  constexpr const char* kOp = "rms_norm";
  const punica::RmsNormParams params{
      .output = detail::to_view(kOp, output, detail::Access::kWrite),
      .input = detail::to_view(kOp, input),
      .weight = detail::to_view(kOp, weight),
      .residual = detail::to_view(kOp, residual, detail::Access::kWrite),
      .epsilon = epsilon,
  };
  detail::raise_if_error(punica::rms_norm(params, detail::context_of(output)));
  detail::written({&output, &residual});
}

}  // namespace punica_kernels
