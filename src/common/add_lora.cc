#include "punica/add_lora.h"

#include <limits>
#include <string>

#include "src/common/check.h"

namespace punica {
namespace {

constexpr const char* kUpdate = "update_lora_batch";
constexpr const char* kAdd = "add_lora";

// order, segment_adapter and segment_start; at least `rows` entries of `order` and `segments` segments.
bool check_segments(Check& check, const LoraBatch& b, int64_t rows, const char* rows_name, int64_t segments) {
  if (!check.tensor("order", b.order, DType::kInt32, {{Dim::kAny, "capacity"}}) ||
      !check.tensor("segment_adapter", b.segment_adapter, DType::kInt32, {{Dim::kAny, "max_segments"}}) ||
      !check.tensor("segment_start", b.segment_start, DType::kInt32,
                    {{b.segment_adapter.shape[0] + 1, "max_segments + 1"}}) ||
      (b.counts.has_value() && !check.tensor("counts", b.counts, DType::kInt32, {{2, "segments, rows"}}))) {
    return false;
  }
  if (b.order.shape[0] < rows) {
    return check.fail("order must have at least " + std::to_string(rows) + " entries (" + rows_name + "), got " +
                      std::to_string(b.order.shape[0]));
  }
  if (b.segment_adapter.shape[0] < segments) {
    return check.fail("segment_adapter must have at least " + std::to_string(segments) +
                      " entries (min(capacity, num_adapters + 1)), got " + std::to_string(b.segment_adapter.shape[0]));
  }
  return true;
}

// [num_adapters] or [slices, num_adapters].
bool check_by_adapter(Check& check, const char* name, const TensorView& t, DType dtype, const AddLoraParams& p) {
  if (t.rank == 2) {
    return check.tensor(name, t, dtype, {{p.a_ptr.shape[0], "slices"}, {p.a_ptr.shape[1], "num_adapters"}});
  }
  return check.tensor(name, t, dtype, {{p.a_ptr.shape[1], "num_adapters"}});
}

bool check_slices(Check& check, const AddLoraParams& p) {
  const int64_t slices = p.a_ptr.shape[0];
  if (slices < 1 || slices > kMaxLoraSlices) {
    return check.fail("a_ptr must have 1 to " + std::to_string(kMaxLoraSlices) + " rows (slices), got " +
                      std::to_string(slices) + "; split the call");
  }
  int64_t low = 0;
  for (int64_t s = 0; s <= slices; ++s) {
    if (p.slice_offsets[s] < low || p.slice_offsets[s] > p.y.shape[1]) {
      return check.fail(at("slice_offsets", s) + " must be in [" + std::to_string(low) + ", " +
                        std::to_string(p.y.shape[1]) + "] (" + (s == 0 ? "0" : at("slice_offsets", s - 1)) +
                        ", width of y), got " + std::to_string(p.slice_offsets[s]));
    }
    low = p.slice_offsets[s];
  }
  return true;
}

bool check_strides(Check& check, const AddLoraParams& p) {
  const int64_t item = static_cast<int64_t>(dtype_size(p.y.dtype));
  const int64_t row = p.b_row_stride.value_or(p.max_rank);
  return check.at_least("layer_idx", p.layer_idx, 0) && check.at_least("max_rank", p.max_rank, 1) &&
         (!p.a_layer_stride || check.at_least("a_layer_stride", *p.a_layer_stride, 0)) &&
         (!p.b_layer_stride || check.at_least("b_layer_stride", *p.b_layer_stride, 0)) &&
         (!p.b_row_stride || check.at_least("b_row_stride", *p.b_row_stride, 0)) &&
         check.product_fits("max_rank * h_in", {p.max_rank, p.x.shape[1], item}) &&
         check.product_fits("b_row_stride * width", {row, p.y.shape[1], item}) &&
         (p.a_layer_stride
              ? check.product_fits("layer_idx * a_layer_stride", {p.layer_idx, *p.a_layer_stride, item})
              : check.product_fits("layer_idx * max_rank * h_in", {p.layer_idx, p.max_rank, p.x.shape[1], item})) &&
         (p.b_layer_stride
              ? check.product_fits("layer_idx * b_layer_stride", {p.layer_idx, *p.b_layer_stride, item})
              : check.product_fits("layer_idx * width * b_row_stride", {p.layer_idx, p.y.shape[1], row, item}));
}

}  // namespace

Status validate(const LoraBatchParams& p) {
  Check check(kUpdate);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const auto in_range = [&] {
    if (p.num_adapters >= 0 && p.num_adapters <= kMax) return true;
    return check.fail("num_adapters must be in [0, " + std::to_string(kMax) + "], got " +
                      std::to_string(p.num_adapters));
  };
  const auto fits = [&] {
    return p.batch.order.shape[0] <= kMax ||
           check.fail("order must have at most " + std::to_string(kMax) + " entries (capacity), got " +
                      std::to_string(p.batch.order.shape[0]));
  };
  const TensorView& batch_indices = p.batch.indices;
  static_cast<void>(
      check.device_of("indices", p.indices) && in_range() &&
      check.tensor("indices", p.indices, p.indices.dtype == DType::kInt64 ? DType::kInt64 : DType::kInt32,
                   {{Dim::kAny, "n"}}) &&
      check_segments(check, p.batch, p.indices.shape[0], "len(indices)",
                     max_lora_segments(p.batch.order.shape[0], p.num_adapters)) &&
      fits() && check.tensor("batch_indices", batch_indices, DType::kInt32, {{p.batch.order.shape[0], "capacity"}}) &&
      check.tensor("counts", p.batch.counts, DType::kInt32, {{2, "segments, rows"}}) &&
      check.disjoint({{"batch_indices", batch_indices},
                      {"order", p.batch.order},
                      {"segment_adapter", p.batch.segment_adapter},
                      {"segment_start", p.batch.segment_start},
                      {"counts", p.batch.counts}},
                     {{"indices", p.indices}}));
  return check.status();
}

Status validate(const AddLoraParams& p) {
  Check check(kAdd);
  static_cast<void>(
      check.data("y", p.y, {{Dim::kAny, "rows"}, {Dim::kAny, "width"}}) &&
      check.data("x", p.x, {{p.y.shape[0], "rows"}, {Dim::kAny, "h_in"}}) &&
      check.tensor("a_ptr", p.a_ptr, DType::kInt64, {{Dim::kAny, "slices"}, {Dim::kAny, "num_adapters"}}) &&
      check.tensor("b_ptr", p.b_ptr, DType::kInt64,
                   {{p.a_ptr.shape[0], "slices"}, {p.a_ptr.shape[1], "num_adapters"}}) &&
      check_by_adapter(check, "ranks", p.ranks, DType::kInt32, p) &&
      check_by_adapter(check, "scales", p.scales, DType::kFloat32, p) && check_slices(check, p) &&
      check_segments(check, p.batch, p.y.shape[0], "rows of y", 0) && check_strides(check, p) &&
      check.disjoint({{"y", p.y}}, {{"x", p.x},
                                    {"a_ptr", p.a_ptr},
                                    {"b_ptr", p.b_ptr},
                                    {"ranks", p.ranks},
                                    {"scales", p.scales},
                                    {"order", p.batch.order},
                                    {"segment_adapter", p.batch.segment_adapter},
                                    {"segment_start", p.batch.segment_start},
                                    {"counts", p.batch.counts}}));
  return check.status();
}

}  // namespace punica
