// Copies of a call's index and pointer tables in host memory, for the checks of their contents.
#pragma once

#include <memory>
#include <span>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica::cuda {

// Owns the copies.
class HostTables {
 public:
  // Makes the contiguous views `tables`, of memory on `device`, views of copies, which hold what the tables hold once
  // the work before in the call's stream is done; waits for it. *copied is false, and nothing is done, while the stream
  // is being captured: then there is nothing to wait for.
  Status copy(const char* op, Device device, const Context& context, std::span<TensorView* const> tables, bool* copied);

 private:
  std::unique_ptr<char[]> memory_;
};

}  // namespace punica::cuda
