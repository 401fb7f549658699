#include "punica/add_lora.h"

#include <array>
#include <limits>
#include <string>
#include <vector>

#include "src/common/backend.h"
#include "src/common/check.h"
#include "src/common/contents.h"
#include "src/common/validated.h"

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

// ---- Contents ------------------------------------------------------------------------------------------------------

auto tables_of(LoraBatchParams& p) { return std::array{&p.indices}; }

auto tables_of(AddLoraParams& p) {
  return std::array{
      &p.a_ptr, &p.b_ptr, &p.ranks, &p.scales, &p.batch.order, &p.batch.segment_adapter, &p.batch.segment_start};
}

bool check_contents(Check& check, const LoraBatchParams& p) {
  for (int64_t t = 0; t < p.indices.shape[0]; ++t) {
    const int64_t index =
        p.indices.dtype == DType::kInt64 ? p.indices.as<const int64_t>()[t] : p.indices.as<const int32_t>()[t];
    if (index < p.num_adapters) continue;
    return check.fail(at("indices", t) + " must be below " + std::to_string(p.num_adapters) + " (num_adapters), got " +
                      std::to_string(index));
  }
  return true;
}

bool check_address(Check& check, const char* name, int64_t entry, int64_t address, size_t item) {
  return address % static_cast<int64_t>(item) == 0 ||
         check.fail(at(name, entry) + " must be aligned to its element of " + std::to_string(item) + " bytes, got " +
                    std::to_string(address));
}

// What the call uses of one adapter's entries. Positions are those in the flattened tables.
bool check_adapter(Check& check, const AddLoraParams& p, int64_t adapter) {
  const size_t item = dtype_size(p.y.dtype);
  for (int slice = 0; slice < p.num_slices(); ++slice) {
    const int64_t entry = slice * p.num_adapters() + adapter, rank_entry = slice * p.rank_stride() + adapter;
    const int64_t a = p.a_ptr.as<const int64_t>()[entry], b = p.b_ptr.as<const int64_t>()[entry];
    const int64_t rank = p.ranks.as<const int32_t>()[rank_entry];
    const int64_t most = std::min(p.max_rank, p.b_row_stride.value_or(p.max_rank));
    if (rank < 0 || rank > most) {
      return check.fail(at("ranks", rank_entry) + " must be in [0, " + std::to_string(most) + "] (" +
                        (most == p.max_rank ? "max_rank" : "b_row_stride") + "), got " + std::to_string(rank));
    }
    if (rank == 0 || a == 0 || b == 0) continue;
    if (!check_address(check, "a_ptr", entry, a, item) || !check_address(check, "b_ptr", entry, b, item)) return false;
  }
  return true;
}

bool check_contents(Check& check, const AddLoraParams& p) {
  const int32_t* adapters = p.batch.segment_adapter.as<const int32_t>();
  const int32_t* start = p.batch.segment_start.as<const int32_t>();
  const int32_t* order = p.batch.order.as<const int32_t>();
  const int64_t rows = p.y.shape[0], capacity = p.batch.order.shape[0];
  std::vector<bool> seen;
  for (int64_t s = 0; s < p.max_segments(); ++s) {
    // Behind the last segment in use segment_start may decrease; such a segment has no adapter.
    if (adapters[s] < 0) continue;
    if (adapters[s] >= p.num_adapters()) {
      return check.fail(at("segment_adapter", s) + " must be below " + std::to_string(p.num_adapters()) +
                        " (num_adapters), got " + std::to_string(adapters[s]));
    }
    if (start[s] < 0 || start[s] > capacity) {
      return check.fail(at("segment_start", s) + " must be in [0, " + std::to_string(capacity) +
                        "] (len(order)), got " + std::to_string(start[s]));
    }
    if (start[s + 1] < start[s] || start[s + 1] > capacity) {
      return check.fail(at("segment_start", s + 1) + " must be in [" + std::to_string(start[s]) + ", " +
                        std::to_string(capacity) + "] (" + at("segment_start", s) + ", len(order)), got " +
                        std::to_string(start[s + 1]));
    }
    if (start[s] == start[s + 1]) continue;
    if (!check_adapter(check, p, adapters[s])) return false;
    if (seen.empty()) seen.resize(static_cast<size_t>(rows));
    for (int64_t i = start[s]; i < start[s + 1]; ++i) {
      if (order[i] < 0 || order[i] >= rows) {
        return check.fail(at("order", i) + " must be in [0, " + std::to_string(rows) + ") (rows of y), got " +
                          std::to_string(order[i]));
      }
      if (seen[static_cast<size_t>(order[i])]) {
        return check.fail(at("order", i) + " is row " + std::to_string(order[i]) + " a second time");
      }
      seen[static_cast<size_t>(order[i])] = true;
    }
  }
  return true;
}

template <class Params>
Status check_contents(const char* op, Device device, const Params& params, const Context& context) {
  return check_tables(
      op, device, context, params, [](Params& p) { return tables_of(p); },
      [](Check& check, const Params& p) { return check_contents(check, p); });
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
  const auto is_integer = [&] {
    if (p.indices.dtype == DType::kInt32 || p.indices.dtype == DType::kInt64) return true;
    return check.fail(std::string("indices must be int32 or int64, got ") + dtype_name(p.indices.dtype));
  };
  const auto fits = [&] {
    return p.batch.order.shape[0] <= kMax ||
           check.fail("order must have at most " + std::to_string(kMax) + " entries (capacity), got " +
                      std::to_string(p.batch.order.shape[0]));
  };
  const TensorView& batch_indices = p.batch.indices;
  static_cast<void>(
      check.device_of("indices", p.indices) && is_integer() && in_range() &&
      check.tensor("indices", p.indices, p.indices.dtype, {{Dim::kAny, "n"}}) &&
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
      check_slices(check, p) &&
      check.tensor("b_ptr", p.b_ptr, DType::kInt64,
                   {{p.a_ptr.shape[0], "slices"}, {p.a_ptr.shape[1], "num_adapters"}}) &&
      check_by_adapter(check, "ranks", p.ranks, DType::kInt32, p) &&
      check_by_adapter(check, "scales", p.scales, DType::kFloat32, p) &&
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

Status run_validated(const LoraBatchParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(check_contents(kUpdate, p.indices.device, p, context));
  return PUNICA_ON_BACKEND(kUpdate, p.indices.device, update_lora_batch(p, context));
}

Status run_validated(const AddLoraParams& p, const Context& context) {
  if (p.y.numel() == 0 || p.x.numel() == 0 || p.num_adapters() == 0 || p.max_segments() == 0) return {};
  PUNICA_RETURN_IF_ERROR(check_contents(kAdd, p.y.device, p, context));
  return PUNICA_ON_BACKEND(kAdd, p.y.device, add_lora(p, context));
}

Status update_lora_batch(const LoraBatchParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

Status add_lora(const AddLoraParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

}  // namespace punica
