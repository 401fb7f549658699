#include <utility>

#include "src/cuda/common/driver.h"
#include "src/cuda/common/tensor_map.h"

namespace punica::cuda {

cudaError_t box_map(const void* data, int rank, const cuuint64_t* sizes, const cuuint64_t* strides,
                    const cuuint32_t* box, CUtensorMap* map) {
  using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
  static const auto found = [] {
    void* function = nullptr;
    const cudaError_t error = find_driver_function("cuTensorMapEncodeTiled", &function);
    return std::pair(error, reinterpret_cast<EncodeTiled>(function));
  }();
  if (found.first != cudaSuccess) return found.first;
  constexpr cuuint32_t kSteps[] = {1, 1, 1, 1};
  const CUresult result = found.second(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, box,
      kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

namespace {

// The last maps of a thread: the driver takes as long to make one as a kernel's launch takes beside it.
class LastMaps {
 public:
  // make() makes the map if it is not there.
  template <class Make>
  cudaError_t get(const void* data, const MatrixMap& matrix, CUtensorMap* map, Make make) {
    for (const One& one : kept_) {
      if (one.data == data && one.matrix == matrix) {
        *map = one.map;
        return cudaSuccess;
      }
    }
    if (const cudaError_t error = make(); error != cudaSuccess) return error;
    kept_[oldest_] = {data, matrix, *map};
    oldest_ = (oldest_ + 1) % kKept;
    return cudaSuccess;
  }

 private:
  static constexpr int kKept = 16;
  struct One {
    const void* data = nullptr;
    MatrixMap matrix = {};
    CUtensorMap map;
  };
  One kept_[kKept];
  int oldest_ = 0;
};

}  // namespace

cudaError_t matrix_map(const void* data, const MatrixMap& matrix, CUtensorMap* map) {
  thread_local LastMaps last;
  return last.get(data, matrix, map, [&] {
    const auto rows = static_cast<cuuint64_t>(matrix.rows);
    const auto stride = static_cast<cuuint64_t>(matrix.stride) * 2;
    const auto box_rows = static_cast<cuuint32_t>(matrix.box_rows);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), rows}, strides[] = {stride};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns), box_rows};
    return box_map(data, 2, sizes, strides, box, map);
  });
}

cudaError_t matrix_map_anywhere(const MatrixMap& matrix, CUtensorMap* map) {
  thread_local LastMaps last;
  return last.get(nullptr, matrix, map, [&] {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows),
                                cuuint64_t{1} << kTensorAddressBits, cuuint64_t{1} << (48 - 4 - kTensorAddressBits)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2, 16, cuuint64_t{16} << kTensorAddressBits};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns), static_cast<cuuint32_t>(matrix.box_rows), 1,
                              1};
    return box_map(nullptr, 4, sizes, strides, box, map);
  });
}

}  // namespace punica::cuda
