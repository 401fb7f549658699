// When and where the contents of index and pointer tables are checked.
#pragma once

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"
#include "src/common/check.h"
#ifdef PUNICA_WITH_CUDA
#include "src/cuda/common/host_tables.h"
#endif

namespace punica {

// Runs check(Check&, params), which reads the tables: on the CPU always, on CUDA where the context asks for it and on
// copies, with tables(params) the pointers to the views that must be copied.
template <class Params, class Tables, class Body>
Status check_tables(const char* op, Device device, const Context& context, const Params& params,
                    [[maybe_unused]] Tables tables, Body check) {
  const auto status_of = [&](const Params& on_host) {
    Check rules(op);
    static_cast<void>(check(rules, on_host));
    return rules.status();
  };
  if (device.type == DeviceType::kCpu) return status_of(params);
  if (!context.check_contents) [[likely]] {
    return {};
  }
#ifdef PUNICA_WITH_CUDA
  Params on_host = params;
  cuda::HostTables copies;
  bool copied = false;
  PUNICA_RETURN_IF_ERROR(copies.copy(op, device, context, tables(on_host), &copied));
  if (copied) return status_of(on_host);
  if (context.checks_skipped != nullptr) *context.checks_skipped = true;
#endif
  return {};
}

}  // namespace punica
