// What every validate() is made of: one method a rule, true when the rule holds. The first rule that fails leaves its
// message behind, so a validate() is one chain of && and then check.status().
//
// Nothing here allocates while the rules hold: a call of an operation costs microseconds, and this is part of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// One extent of an expected shape: kAny, or the size that it must have; `name` says where that size comes from.
struct Dim {
  static constexpr int64_t kAny = -1;
  int64_t size;
  const char* name;
};

using Shape = std::initializer_list<Dim>;

enum class Layout {
  kContiguous,
  kRows,  // what belongs to one row is contiguous; the rows may lie further apart, as in a slice of a wider tensor
};

struct Named {
  const char* name;
  const TensorView& view;
};

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // A tensor of type T: the first one of a call says which of float16, bfloat16 and float32 T is, and the device.
  bool data(const char* name, const TensorView& t, Shape shape, Layout layout = Layout::kRows);
  // Any tensor: names the device of a call that has no data().
  bool device_of(const char* name, const TensorView& t);
  // A tensor of a fixed type, contiguous.
  bool tensor(const char* name, const TensorView& t, DType dtype, Shape shape);
  // uint8 [>= bytes]; may be absent.
  bool workspace(const char* name, const TensorView& t, int64_t bytes);

  bool at_least(const char* name, int64_t value, int64_t low);
  bool index(const char* name, int64_t value, int64_t size, const char* size_name);  // 0 <= value < size
  bool finite(const char* name, double value);
  bool positive(const char* name, double value);      // and finite
  bool not_negative(const char* name, double value);  // and finite
  // The product of extents must be below 2^63, so that offsets can be computed in int64_t.
  bool product_fits(const char* what, std::initializer_list<int64_t> factors);

  // No byte of a written tensor belongs to another one. Exact: two column slices of one wider tensor are disjoint.
  // Absent tensors are.
  template <size_t kWritten, size_t kRead>
  bool disjoint(const Named (&written)[kWritten], const Named (&read)[kRead]) {
    Span spans[kWritten + kRead];
    return disjoint(written, kWritten, read, kRead, spans);
  }

  // Makes the status an error, "<op>: <message>". Returns false.
  bool fail(const std::string& message);
  bool fail(StatusCode code, const std::string& message);

  const char* op() const { return op_; }
  Status status() const { return status_; }

 private:
  bool tensor_of(const char* name, const TensorView& t, DType dtype, Shape shape, Layout layout);
  bool has_shape(const char* name, const TensorView& t, Shape shape);
  bool has_layout(const char* name, const TensorView& t, Layout layout);

  struct Span {
    intptr_t start, end;  // what lies between rows included; both 0 where there is nothing
  };
  bool disjoint(const Named* written, size_t num_written, const Named* read, size_t num_read, Span* spans);

  const char* op_;
  const char* first_ = nullptr;  // name of the first data() or device_of() tensor
  DType dtype_ = DType::kOther;
  Device device_;
  Status status_;
};

// For messages.
std::string device_name(Device device);
std::string shape_string(const TensorView& t);
std::string at(const char* name, int64_t i);  // "indices[3]"

}  // namespace punica
