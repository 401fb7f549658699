#include "punica/kv_cache.h"

#include <tvm/ffi/tvm_ffi.h>

#include "bindings/convert.h"
#include "bindings/paged_kv.h"
#include "bindings/shortcut.h"

namespace punica::bindings {
namespace {

void init_kv(Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, Tensor k, Tensor v, Tensor seqlen_indptr,
             int64_t num_layers, int64_t layer_idx, int64_t num_kv_heads, int64_t page_size, int64_t num_threads) {
  const InitKvParams params{
      .kv = to_paged_kv(kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size),
      .k = to_view(k),
      .v = to_view(v),
      .seqlen_indptr = to_view(seqlen_indptr),
  };
  const Call call(params.k, num_threads);
  call.finish(punica::init_kv(params, call.context()));
}

void append_kv(Tensor kv_ptrs, Tensor kv_indptr, Tensor last_page_offset, Tensor k, Tensor v, int64_t num_layers,
               int64_t layer_idx, int64_t num_kv_heads, int64_t page_size, int64_t num_threads) {
  const AppendKvParams params{
      .kv = to_paged_kv(kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size),
      .k = to_view(k),
      .v = to_view(v),
  };
  const Call call(params.k, num_threads);
  call.finish(punica::append_kv(params, call.context()));
}

// kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, sizes of the cache, long_bytes
PyObject* shortcut_init_kv(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 11);
  const InitKvParams params{
      .kv = to_paged_kv(call, 0, 6),
      .k = call.data(3),
      .v = call.data(4),
      .seqlen_indptr = call.table(5),
  };
  const bool is_long = nbytes(params.k) > call.number(10);
  return call.run(params, params.k, is_long, {0});
}

// kv_ptrs, kv_indptr, last_page_offset, k, v, sizes of the cache, long_bytes
PyObject* shortcut_append_kv(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 10);
  const AppendKvParams params{
      .kv = to_paged_kv(call, 0, 5),
      .k = call.data(3),
      .v = call.data(4),
  };
  const bool is_long = nbytes(params.k) > call.number(9);
  return call.run(params, params.k, is_long, {0});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(init_kv, init_kv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append_kv, append_kv);
PUNICA_EXPORT_SHORTCUT(init_kv);
PUNICA_EXPORT_SHORTCUT(append_kv);

}  // namespace punica::bindings
