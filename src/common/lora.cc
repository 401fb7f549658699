#include "punica/lora.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "src/common/backend.h"
#include "src/common/check.h"
#include "src/common/contents.h"
#include "src/common/validated.h"

namespace punica {
namespace {

const char* op_name(const SgmvParams& p) { return p.weights == SgmvWeights::kInOut ? "sgmv_cutlass" : "sgmv_shrink"; }

// Adapter addresses need the alignment of their element only.
bool check_address(Check& check, const TensorView& w_ptr, int64_t i, size_t item) {
  const int64_t address = w_ptr.as<const int64_t>()[i];
  if (address != 0 && address % static_cast<int64_t>(item) == 0) return true;
  if (address == 0) return check.fail(at("w_ptr", i) + " is a null address of weights that are used");
  return check.fail(at("w_ptr", i) + " must be aligned to its element of " + std::to_string(item) + " bytes, got " +
                    std::to_string(address));
}

auto tables_of(BgmvParams& p) { return std::array{&p.w_ptr, &p.indices}; }

auto tables_of(SgmvParams& p) { return std::array{&p.w_ptr, &p.s_start, &p.s_end}; }

bool check_contents(Check& check, const BgmvParams& p) {
  const int64_t* indices = p.indices.as<const int64_t>();
  const int64_t num_adapters = p.w_ptr.shape[0];
  const size_t item = dtype_size(p.y.dtype);
  for (int64_t b = 0; b < p.indices.shape[0]; ++b) {
    if (indices[b] < 0) continue;
    if (indices[b] >= num_adapters) {
      return check.fail(at("indices", b) + " must be below " + std::to_string(num_adapters) + " (len(w_ptr)), got " +
                        std::to_string(indices[b]));
    }
    if (!check_address(check, p.w_ptr, indices[b], item)) return false;
  }
  return true;
}

// Two segments that share a row, where the segments do not come in ascending order.
bool check_unordered_segments(Check& check, const int32_t* start, const int32_t* end, int64_t num_segments) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < num_segments; ++i) {
    if (start[i] < end[i]) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return start[a] < start[b]; });
  for (size_t k = 1; k < order.size(); ++k) {
    const int64_t a = order[k - 1], b = order[k];
    if (end[a] > start[b]) {
      return check.fail("s_start, s_end: segments " + std::to_string(std::min(a, b)) + " and " +
                        std::to_string(std::max(a, b)) + " must not overlap, got row " + std::to_string(start[b]) +
                        " in both");
    }
  }
  return true;
}

bool check_contents(Check& check, const SgmvParams& p) {
  const int32_t* start = p.s_start.as<const int32_t>();
  const int32_t* end = p.s_end.as<const int32_t>();
  const int64_t num_segments = p.w_ptr.shape[0], rows = p.y.shape[0];
  const size_t item = dtype_size(p.y.dtype);
  bool ascending = true;
  int64_t last_end = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    if (start[i] == end[i]) continue;  // wherever it lies: callers pad tables of a fixed size with -1, -1
    if (start[i] < 0 || start[i] > rows) {
      return check.fail(at("s_start", i) + " must be in [0, " + std::to_string(rows) + "] (rows of y), got " +
                        std::to_string(start[i]));
    }
    if (end[i] < start[i] || end[i] > rows) {
      return check.fail(at("s_end", i) + " must be in [" + std::to_string(start[i]) + ", " + std::to_string(rows) +
                        "] (" + at("s_start", i) + ", rows of y), got " + std::to_string(end[i]));
    }
    if (!check_address(check, p.w_ptr, i, item)) return false;
    ascending = ascending && start[i] >= last_end;
    last_end = end[i];
  }
  return ascending || check_unordered_segments(check, start, end, num_segments);
}

template <class Params>
Status check_contents(const char* op, const Params& params, const Context& context) {
  return check_tables(
      op, params.y.device, context, params, [](Params& p) { return tables_of(p); },
      [](Check& check, const Params& p) { return check_contents(check, p); });
}

bool has_work(const TensorView& y, const TensorView& x) { return y.numel() > 0 && x.numel() > 0; }

}  // namespace

Status validate(const BgmvParams& p) {
  Check check("dispatch_bgmv");
  const int64_t item = static_cast<int64_t>(dtype_size(p.y.dtype));
  static_cast<void>(check.data("y", p.y, {{Dim::kAny, "B"}, {Dim::kAny, "h_out"}}) &&
                    check.data("x", p.x, {{p.y.shape[0], "B"}, {Dim::kAny, "h_in"}}) &&
                    check.tensor("w_ptr", p.w_ptr, DType::kInt64, {{Dim::kAny, "num_adapters"}}) &&
                    check.tensor("indices", p.indices, DType::kInt64, {{p.y.shape[0], "B"}}) &&
                    check.at_least("layer_idx", p.layer_idx, 0) && check.finite("scale", p.scale) &&
                    check.product_fits("layer_idx * h_out * h_in", {p.layer_idx, p.y.shape[1], p.x.shape[1], item}) &&
                    check.disjoint({{"y", p.y}}, {{"x", p.x}, {"w_ptr", p.w_ptr}, {"indices", p.indices}}));
  return check.status();
}

Status validate(const SgmvParams& p) {
  Check check(op_name(p));
  const int64_t item = static_cast<int64_t>(dtype_size(p.y.dtype));
  static_cast<void>(
      check.data("y", p.y, {{Dim::kAny, "rows"}, {Dim::kAny, "d_out"}}) &&
      check.data("x", p.x, {{p.y.shape[0], "rows"}, {Dim::kAny, "d_in"}}) &&
      check.tensor("w_ptr", p.w_ptr, DType::kInt64, {{Dim::kAny, "num_segments"}}) &&
      check.tensor("s_start", p.s_start, DType::kInt32, {{p.w_ptr.shape[0], "num_segments"}}) &&
      check.tensor("s_end", p.s_end, DType::kInt32, {{p.w_ptr.shape[0], "num_segments"}}) &&
      check.workspace("tmp", p.tmp, p.weights == SgmvWeights::kInOut ? sgmv_cutlass_tmp_size(p.w_ptr.shape[0]) : 0) &&
      check.at_least("layer_idx", p.layer_idx, 0) &&
      check.product_fits("layer_idx * d_out * d_in", {p.layer_idx, p.y.shape[1], p.x.shape[1], item}) &&
      check.disjoint({{"y", p.y}, {"tmp", p.tmp}},
                     {{"x", p.x}, {"w_ptr", p.w_ptr}, {"s_start", p.s_start}, {"s_end", p.s_end}}));
  return check.status();
}

int64_t sgmv_cutlass_tmp_size(int64_t num_segments) {
  int64_t bytes = std::max<int64_t>(1, cpu::sgmv_cutlass_tmp_size(num_segments));
#ifdef PUNICA_WITH_CUDA
  bytes = std::max(bytes, cuda::sgmv_cutlass_tmp_size(num_segments));
#endif
  return bytes;
}

Status run_validated(const BgmvParams& p, const Context& context) {
  if (!has_work(p.y, p.x)) return {};
  PUNICA_RETURN_IF_ERROR(check_contents("dispatch_bgmv", p, context));
  return PUNICA_ON_BACKEND("dispatch_bgmv", p.y.device, dispatch_bgmv(p, context));
}

Status run_validated(const SgmvParams& p, const Context& context) {
  if (!has_work(p.y, p.x)) return {};
  PUNICA_RETURN_IF_ERROR(check_contents(op_name(p), p, context));
  return PUNICA_ON_BACKEND(op_name(p), p.y.device, sgmv(p, context));
}

Status dispatch_bgmv(const BgmvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

Status sgmv(const SgmvParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

}  // namespace punica
