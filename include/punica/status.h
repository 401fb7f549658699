// Errors are values: every function of the core returns a Status and neither prints, throws nor aborts.
#pragma once

#include <memory>
#include <string>
#include <utility>

namespace punica {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument,  // a tensor, scalar or index breaks the contract; nothing was written
  kUnsupported,      // valid, but this build or machine cannot run it; the message says what can
  kOutOfMemory,      // a workspace could not be allocated; nothing was written
  kInternal,         // the device or the runtime failed
};

// Costs one null pointer on success.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : error_(std::make_shared<const Error>(code, std::move(message))) {}

  static Status invalid_argument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

  bool ok() const { return error_ == nullptr; }
  StatusCode code() const { return ok() ? StatusCode::kOk : error_->first; }
  // "batch_decode: kv_indptr must have shape [17] (B + 1), got [16]"; empty on success.
  std::string message() const { return ok() ? std::string() : error_->second; }

 private:
  using Error = std::pair<StatusCode, std::string>;
  std::shared_ptr<const Error> error_;
};

}  // namespace punica

// Returns from the calling function when `expression` is an error.
#define PUNICA_RETURN_IF_ERROR(expression)                                                           \
  do {                                                                                               \
    if (::punica::Status punica_status_ = (expression); !punica_status_.ok()) return punica_status_; \
  } while (false)
