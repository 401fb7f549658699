// What every params struct is made of: data types, devices and views of tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace punica {

enum class DType : uint8_t {
  kFloat16,
  kBFloat16,
  kFloat32,
  kInt32,
  kInt64,
  kUInt8,
  // No operation takes the types below; they exist so that an error can name what came.
  kFloat64,
  kInt8,
  kInt16,
  kBool,
  kOther,
};

const char* dtype_name(DType dtype);

// Bytes of one element; 0 for kOther.
constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
    case DType::kOther:
      return 0;
  }
  return 0;
}

enum class DeviceType : uint8_t { kCpu, kCuda, kOther };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
  friend bool operator==(const Device& a, const Device& b) = default;
};

// A pointer with its shape and strides beside it. Strides are in elements. Does not own anything.
struct TensorView {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int32_t rank = -1;  // -1: the optional tensor is absent
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  bool has_value() const { return rank >= 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace punica
