#include "punica/add_lora.h"

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/convert.h"
#include "bindings/shortcut.h"

namespace punica::bindings {
namespace {

using OptionalInt = ffi::Optional<int64_t>;

std::optional<int64_t> to_optional(const OptionalInt& value) {
  return value.has_value() ? std::optional<int64_t>(value.value()) : std::nullopt;
}

LoraBatch batch_of(const Tensor& order, const Tensor& segment_adapter, const Tensor& segment_start,
                   const OptionalTensor& counts) {
  LoraBatch batch;
  batch.order = to_view(order);
  batch.segment_adapter = to_view(segment_adapter);
  batch.segment_start = to_view(segment_start);
  batch.counts = to_view(counts);
  return batch;
}

// One slice unless offsets are given: all of y.
void set_one_slice(AddLoraParams* params) {
  params->slice_offsets[0] = 0;
  params->slice_offsets[1] = params->y.rank == 2 ? params->y.shape[1] : 0;
}

// Whether there are offsets for all slices. A table of the wrong rank, or of too many rows, is for validate() to
// refuse.
bool are_offsets_complete(const AddLoraParams& params, int64_t count) {
  return params.a_ptr.rank != 2 || params.a_ptr.shape[0] < 1 || params.a_ptr.shape[0] > kMaxLoraSlices ||
         count == params.a_ptr.shape[0] + 1;
}

void add_lora(Tensor y, Tensor x, Tensor a_ptr, Tensor b_ptr, Tensor ranks, Tensor scales, Tensor order,
              Tensor segment_adapter, Tensor segment_start, OptionalTensor counts, int64_t layer_idx,
              ffi::Optional<ffi::Array<int64_t>> slice_offsets, OptionalInt a_layer_stride, OptionalInt b_layer_stride,
              OptionalInt b_row_stride, int64_t max_rank, int64_t num_threads) {
  AddLoraParams params;
  params.y = to_view(y);
  params.x = to_view(x);
  params.a_ptr = to_view(a_ptr);
  params.b_ptr = to_view(b_ptr);
  params.ranks = to_view(ranks);
  params.scales = to_view(scales);
  params.batch = batch_of(order, segment_adapter, segment_start, counts);
  params.layer_idx = layer_idx;
  params.a_layer_stride = to_optional(a_layer_stride);
  params.b_layer_stride = to_optional(b_layer_stride);
  params.b_row_stride = to_optional(b_row_stride);
  params.max_rank = max_rank;
  set_one_slice(&params);
  int64_t count = 2;
  if (slice_offsets.has_value()) {
    count = static_cast<int64_t>(slice_offsets.value().size());
    for (int64_t i = 0; i < count && i <= kMaxLoraSlices; ++i) params.slice_offsets[i] = slice_offsets.value()[i];
  }
  if (!are_offsets_complete(params, count)) {
    raise_error("punica_kernels.add_lora: slice_offsets must have " + std::to_string(params.a_ptr.shape[0] + 1) +
                " entries (slices + 1), got " + (slice_offsets.has_value() ? std::to_string(count) : "none"));
  }
  const Call call(params.y, num_threads);
  call.finish(punica::add_lora(params, call.context()));
}

void update_lora_batch(Tensor indices, int64_t num_adapters, Tensor batch_indices, Tensor order, Tensor segment_adapter,
                       Tensor segment_start, Tensor counts, int64_t num_threads) {
  LoraBatchParams params;
  params.indices = to_view(indices);
  params.num_adapters = num_adapters;
  params.batch = batch_of(order, segment_adapter, segment_start, OptionalTensor(counts));
  params.batch.indices = to_view(batch_indices);
  const Call call(params.indices, num_threads);
  call.finish(punica::update_lora_batch(params, call.context()));
}

// y, x, a_ptr, b_ptr, ranks, scales, order, segment_adapter, segment_start, counts, layer_idx, slice_offsets,
// a_layer_stride, b_layer_stride, b_row_stride, max_rank, long_bytes
PyObject* shortcut_add_lora(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 17);
  AddLoraParams params;
  params.y = call.data(0);
  params.x = call.data(1);
  params.a_ptr = call.table(2);
  params.b_ptr = call.table(3);
  params.ranks = call.table(4);
  params.scales = call.data(5);
  params.batch.order = call.table(6);
  params.batch.segment_adapter = call.table(7);
  params.batch.segment_start = call.table(8);
  params.batch.counts = call.optional_table(9);
  params.layer_idx = call.integer(10);
  set_one_slice(&params);
  const int64_t offsets = call.optional_integers(11, params.slice_offsets, kMaxLoraSlices + 1).value_or(2);
  if (!are_offsets_complete(params, offsets)) call.refuse_arguments();
  params.a_layer_stride = call.optional_integer(12);
  params.b_layer_stride = call.optional_integer(13);
  params.b_row_stride = call.optional_integer(14);
  params.max_rank = call.integer(15);
  // What it reads if no two rows share an adapter and ranks are ordinary; the ranks themselves may be on a device.
  constexpr double kOrdinaryRank = 16;
  const bool is_long = kOrdinaryRank * (nbytes(params.y) + nbytes(params.x)) > call.number(16);
  return call.run(params, params.y, is_long, {0});
}

// indices, num_adapters, batch_indices, order, segment_adapter, segment_start, counts, long_bytes
PyObject* shortcut_update_lora_batch(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  ShortcutCall call(args, count, 8);
  LoraBatchParams params;
  params.indices = call.table(0);
  params.num_adapters = call.integer(1);
  params.batch.indices = call.table(2);
  params.batch.order = call.table(3);
  params.batch.segment_adapter = call.table(4);
  params.batch.segment_start = call.table(5);
  params.batch.counts = call.table(6);
  const bool is_long = nbytes(params.indices) > call.number(7);
  return call.run(params, params.indices, is_long, {2, 3, 4, 5, 6});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_lora, add_lora);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(update_lora_batch, update_lora_batch);
PUNICA_EXPORT_SHORTCUT(add_lora);
PUNICA_EXPORT_SHORTCUT(update_lora_batch);

}  // namespace punica::bindings
