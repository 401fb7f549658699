#include "punica/norm.h"

#include "src/common/backend.h"
#include "src/common/check.h"
#include "src/common/validated.h"

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
  const Named weight{"weight", p.weight}, input{"input", p.input};
  // In place, what is apart from the output is apart from the input.
  static_cast<void>(
      ok && check.not_negative("epsilon", p.epsilon) &&
      check.disjoint({{"output", p.output}, {"residual", p.residual}}, {weight, is_in_place(p) ? weight : input}));
  return check.status();
}

Status run_validated(const RmsNormParams& p, const Context& context) {
  if (p.output.numel() == 0) return {};
  return PUNICA_ON_BACKEND("rms_norm", p.output.device, rms_norm(p, context));
}

Status rms_norm(const RmsNormParams& p, const Context& context) {
  PUNICA_RETURN_IF_ERROR(validate(p));
  return run_validated(p, context);
}

}  // namespace punica
