#include "punica/norm.h"

#include "src/common/backend.h"
#include "src/common/check.h"

namespace punica {
namespace {

// In place: each row of the output is the same row of the input.
bool is_in_place(const RmsNormParams& p) {
  return p.output.data == p.input.data && (p.input.shape[0] <= 1 || p.output.stride[0] == p.input.stride[0]);
}

}  // namespace

Status validate(const RmsNormParams& p) {
  Check check("rms_norm");
  bool ok = check.data("output", p.output, {{Dim::kAny, "rows"}, {Dim::kAny, "columns"}}) &&
            check.data("input", p.input, {{p.output.shape[0], "rows"}, {p.output.shape[1], "columns"}}) &&
            check.data("weight", p.weight, {{p.output.shape[1], "columns"}}, Layout::kContiguous);
  if (p.residual.has_value()) {
    ok = ok && check.data("residual", p.residual, {{p.output.shape[0], "rows"}, {p.output.shape[1], "columns"}});
  }
  static_cast<void>(ok && check.not_negative("epsilon", p.epsilon) &&
                    check.disjoint("output", p.output, "weight", p.weight) &&
                    (is_in_place(p) || check.disjoint("output", p.output, "input", p.input)) &&
                    check.disjoint("residual", p.residual, "output", p.output) &&
                    check.disjoint("residual", p.residual, "input", p.input) &&
                    check.disjoint("residual", p.residual, "weight", p.weight));
  return check.status();
}

Status rms_norm(const RmsNormParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  if (p.output.numel() == 0) return {};
  return PUNICA_ON_BACKEND("rms_norm", p.output.device, rms_norm(p, context));
}

}  // namespace punica
