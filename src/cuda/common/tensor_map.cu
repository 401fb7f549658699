#include <utility>

#include "src/cuda/common/tensor_map.h"

namespace punica::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that the runtime has loaded: the library links to no driver.
cudaError_t encode(void* data, int rank, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                   CUtensorMap* map) {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return std::pair(error != cudaSuccess || result == cudaDriverEntryPointSuccess ? error : cudaErrorNotSupported,
                     reinterpret_cast<EncodeTiled>(function));
  }();
  if (found.first != cudaSuccess) return found.first;
  constexpr cuuint32_t kSteps[] = {1, 1, 1, 1};
  const CUresult result = found.second(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(rank), data, sizes,
                                       strides, box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t matrix_map(const void* data, const MatrixMap& matrix, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns), static_cast<cuuint32_t>(matrix.box_rows)};
  return encode(const_cast<void*>(data), 2, sizes, strides, box, map);
}

cudaError_t matrix_map_anywhere(const MatrixMap& matrix, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows),
                              cuuint64_t{1} << kTensorAddressBits, cuuint64_t{1} << (48 - 4 - kTensorAddressBits)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2, 16, cuuint64_t{16} << kTensorAddressBits};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns), static_cast<cuuint32_t>(matrix.box_rows), 1,
                            1};
  return encode(nullptr, 4, sizes, strides, box, map);
}

}  // namespace punica::cuda
