#include "bindings/convert.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <limits>

#include "bindings/settings.h"

namespace punica::bindings {
namespace {

DType to_dtype(DLDataType dtype) {
  if (dtype.lanes != 1) return DType::kOther;
  switch (dtype.code) {
    case kDLFloat:
      return dtype.bits == 16   ? DType::kFloat16
             : dtype.bits == 32 ? DType::kFloat32
             : dtype.bits == 64 ? DType::kFloat64
                                : DType::kOther;
    case kDLBfloat:
      return dtype.bits == 16 ? DType::kBFloat16 : DType::kOther;
    case kDLInt:
      return dtype.bits == 8    ? DType::kInt8
             : dtype.bits == 16 ? DType::kInt16
             : dtype.bits == 32 ? DType::kInt32
             : dtype.bits == 64 ? DType::kInt64
                                : DType::kOther;
    case kDLUInt:
      return dtype.bits == 8 ? DType::kUInt8 : DType::kOther;
    case kDLBool:
      return dtype.bits == 8 ? DType::kBool : DType::kOther;
    default:
      return DType::kOther;
  }
}

Device to_device(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {DeviceType::kCpu, 0};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::kCuda, device.device_id};
    default:
      return {DeviceType::kOther, device.device_id};
  }
}

}  // namespace

TensorView to_view(const Tensor& tensor) {
  TensorView view;
  // An absent pointer stays absent: it is an error where there are elements.
  void* const data = tensor.data_ptr();
  view.data = data == nullptr ? nullptr : static_cast<char*>(data) + tensor.byte_offset();
  view.dtype = to_dtype(tensor.dtype());
  view.device = to_device(tensor.device());
  view.rank = tensor.ndim();
  const ffi::ShapeView shape = tensor.shape(), strides = tensor.strides();
  for (int i = 0; i < std::min(view.rank, TensorView::kMaxRank); ++i) {
    view.shape[i] = shape[i];
    view.stride[i] = strides[i];
  }
  return view;
}

TensorView to_view(const OptionalTensor& tensor) { return tensor.has_value() ? to_view(tensor.value()) : TensorView{}; }

double nbytes(const TensorView& view) {
  double bytes = static_cast<double>(dtype_size(view.dtype));
  for (int i = 0; i < std::min(view.rank, TensorView::kMaxRank); ++i) bytes *= static_cast<double>(view.shape[i]);
  return bytes;
}

Call::Call(const TensorView& on, int64_t num_threads) {
  context_.num_threads = static_cast<int>(std::clamp<int64_t>(num_threads, 0, std::numeric_limits<int>::max()));
  if (on.device.type == DeviceType::kCuda) {
    context_.stream = TVMFFIEnvGetStream(kDLCUDA, on.device.index);
    context_.check_contents = checks();
    context_.checks_skipped = &checks_skipped_;
    context_.early_reads = early_reads();
  }
}

void Call::finish(const Status& status) const {
  raise_if_error(status);
  if (checks_skipped_) [[unlikely]] {
    warn_checks_skipped();
  }
}

ffi::Tensor allocate(Device device, int64_t bytes) {
  return ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ffi::ShapeView(&bytes, 1), DLDataType{kDLUInt, 8, 1},
                                   DLDevice{kDLCUDA, device.index});
}

void raise_if_error(const Status& status) {
  if (!status.ok()) [[unlikely]] {
    raise_error("punica_kernels." + status.message());
  }
}

void raise_error(const std::string& message) { throw ffi::Error("RuntimeError", message, ""); }

}  // namespace punica::bindings
