// Tensor maps for the copy engine of sm_90, without linking to the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace punica::cuda {

// A matrix of 16-bit elements in rows `stride` elements apart, and the box that a copy takes: up to 64 columns, up to
// 256 rows. What lies outside the matrix comes as zeros.
struct MatrixMap {
  int64_t columns;
  int64_t rows;
  int64_t stride;
  int box_columns;  // 64 or 32: the swizzle of 128 or 64 bytes
  int box_rows;

  bool operator==(const MatrixMap&) const = default;
};

// Digits of an address / 16 that are coordinate 2 of a map of all memory; the others are coordinate 3.
inline constexpr int kTensorAddressBits = 31;

// Of 16-bit elements: sizes and the box in elements, `rank` (up to 4) of them; strides of all dimensions but the first,
// in bytes. A box has 64 or 32 elements of the first, which is the swizzle of 128 or 64 bytes.
cudaError_t box_map(const void* data, int rank, const cuuint64_t* sizes, const cuuint64_t* strides,
                    const cuuint32_t* box, CUtensorMap* map);

// The map of the matrix at `data`, a multiple of 16 bytes, as `stride` is: coordinates are column and row. A thread
// keeps its last ones, as those below.
cudaError_t matrix_map(const void* data, const MatrixMap& matrix, CUtensorMap* map);

// The map of such matrices wherever they are: coordinates are column, row and the address / 16 in two digits. A map of
// all memory serves weights and pages whose addresses only the device knows.
cudaError_t matrix_map_anywhere(const MatrixMap& matrix, CUtensorMap* map);

}  // namespace punica::cuda
