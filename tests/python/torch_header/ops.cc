// Gives Python the functions of punica_kernels/torch.h as torch.ops.punica_torch_header.*, for test_torch_header.py.
#include <torch/library.h>

#include "punica_kernels/torch.h"

// The types are those of the document that they implement.
static_assert(std::is_same_v<decltype(&punica_kernels::dispatch_bgmv),
                             void (*)(torch::Tensor, torch::Tensor, torch::Tensor, torch::Tensor, int64_t, float)>);
static_assert(std::is_same_v<decltype(&punica_kernels::dispatch_sgmv_shrink),
                             void (*)(torch::Tensor, torch::Tensor, torch::Tensor, torch::Tensor, torch::Tensor,
                                      torch::Tensor, int)>);
static_assert(
    std::is_same_v<decltype(&punica_kernels::dispatch_sgmv_cutlass), decltype(&punica_kernels::dispatch_sgmv_shrink)>);
static_assert(std::is_same_v<decltype(&punica_kernels::init_kv),
                             void (*)(torch::Tensor, torch::Tensor, torch::Tensor, torch::Tensor, torch::Tensor,
                                      torch::Tensor, int, int, int, int)>);
static_assert(
    std::is_same_v<decltype(&punica_kernels::append_kv), void (*)(torch::Tensor, torch::Tensor, torch::Tensor,
                                                                  torch::Tensor, torch::Tensor, int, int, int, int)>);

namespace {

using torch::Tensor;
using Optional = std::optional<Tensor>;

Tensor or_undefined(const Optional& tensor) { return tensor.has_value() ? *tensor : Tensor(); }

punica_kernels::AttentionOptions options(std::optional<double> rope_theta, const Optional& lse) {
  punica_kernels::AttentionOptions made;
  made.rope_theta = rope_theta;
  made.lse = or_undefined(lse);
  return made;
}

int to_int(int64_t value) { return static_cast<int>(value); }

void batch_prefill(Tensor o, Tensor q, Tensor qo_indptr, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset,
                   Optional tmpbuf, int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size,
                   std::optional<double> rope_theta, Optional lse) {
  punica_kernels::batch_prefill(o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, or_undefined(tmpbuf),
                                to_int(num_layers), to_int(layer_idx), to_int(num_kv_heads), to_int(page_size),
                                options(rope_theta, lse));
}

void batch_decode(Tensor o, Tensor q, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, Optional tmpbuf,
                  int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size,
                  std::optional<double> rope_theta, Optional lse) {
  punica_kernels::batch_decode(o, q, kv_ptrs, kv_indptr, last_page_offset, or_undefined(tmpbuf), to_int(num_layers),
                               to_int(layer_idx), to_int(num_kv_heads), to_int(page_size), options(rope_theta, lse));
}

void batch_decode_as_documented(Tensor o, Tensor q, Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset,
                                Tensor tmpbuf, int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads,
                                int64_t page_size) {
  punica_kernels::batch_decode(o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, to_int(num_layers),
                               to_int(layer_idx), to_int(num_kv_heads), to_int(page_size));
}

void init_kv(Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, Tensor k, Tensor v, Tensor seqlen_indptr,
             int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size) {
  punica_kernels::init_kv(kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, to_int(num_layers),
                          to_int(layer_idx), to_int(num_kv_heads), to_int(page_size));
}

void append_kv(Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, Tensor k, Tensor v, int64_t num_layers,
               int64_t layer_idx, int64_t num_kv_heads, int64_t page_size) {
  punica_kernels::append_kv(kv_ptrs, kv_indptr, last_page_offset, k, v, to_int(num_layers), to_int(layer_idx),
                            to_int(num_kv_heads), to_int(page_size));
}

void dispatch_bgmv(Tensor y, Tensor x, Tensor w_ptr, Tensor indices, int64_t layer_idx, double scale) {
  punica_kernels::dispatch_bgmv(y, x, w_ptr, indices, layer_idx, static_cast<float>(scale));
}

void dispatch_sgmv_cutlass(Tensor y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, Optional tmp,
                           int64_t layer_idx) {
  punica_kernels::dispatch_sgmv_cutlass(y, x, w_ptr, s_start, s_end, or_undefined(tmp), to_int(layer_idx));
}

void dispatch_sgmv_shrink(Tensor y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, Optional tmp,
                          int64_t layer_idx) {
  punica_kernels::dispatch_sgmv_shrink(y, x, w_ptr, s_start, s_end, or_undefined(tmp), to_int(layer_idx));
}

int64_t sgmv_tmp_size(int64_t num_problems) {
  return static_cast<int64_t>(punica_kernels::sgmv_tmp_size(to_int(num_problems)));
}

void dispatch_rms_norm(Tensor output, Tensor input, Tensor weight, double epsilon, Optional residual) {
  punica_kernels::dispatch_rms_norm(output, input, weight, static_cast<float>(epsilon), or_undefined(residual));
}

// Without a default: what punica says of a tensor that is not there.
void rms_norm_of_nothing(Tensor output, Tensor input) {
  punica_kernels::dispatch_rms_norm(output, input, Tensor(), 1e-5F);
}

TORCH_LIBRARY(punica_torch_header, library) {
  library.def("batch_prefill", &batch_prefill);
  library.def("batch_decode", &batch_decode);
  library.def("batch_decode_as_documented", &batch_decode_as_documented);
  library.def("init_kv", &init_kv);
  library.def("append_kv", &append_kv);
  library.def("dispatch_bgmv", &dispatch_bgmv);
  library.def("dispatch_sgmv_cutlass", &dispatch_sgmv_cutlass);
  library.def("dispatch_sgmv_shrink", &dispatch_sgmv_shrink);
  library.def("sgmv_tmp_size", &sgmv_tmp_size);
  library.def("dispatch_rms_norm", &dispatch_rms_norm);
  library.def("rms_norm_of_nothing", &rms_norm_of_nothing);
}

}  // namespace
