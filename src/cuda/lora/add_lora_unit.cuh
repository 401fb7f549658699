// How weights and x come to the kernels of add_lora: in units of 2 KiB, by the warp that will read them; and how K is
// cut.
#pragma once

#include "src/cuda/common/device.cuh"
#include "src/cuda/lora/sgmv_tile.cuh"

namespace punica::cuda::fused_lora {

inline constexpr int kPiece = 64;  // of K
inline constexpr int kChainBits = 4;
inline constexpr int kChains = 1 << kChainBits;  // of pieces
inline constexpr int kUnitBytes = 2048;

// A unit: 16, 32 or 64 rows of 8, 4 or 2 pieces of 16 bytes. Where a piece lies, such that the lanes that read together
// meet no bank twice.
template <int kRowBits>  // log2 of the pieces of a row
__device__ __forceinline__ int place(int row, int piece) {
  if constexpr (kRowBits == 3) return row * 8 + (piece ^ ((row ^ row >> 1) & 1) << 2);
  if constexpr (kRowBits == 2) return (row * 4 + piece) ^ (row >> 2 & 1) << 2;
  return (row * 2 + piece) ^ (row >> 3 & 3) << 1;
}

// By a whole warp: starts the copy of a unit of which `rows` rows and `columns` elements of each are there, either of
// which may be more than a unit has or none; zeros elsewhere. aligned: rows start at multiples of 16 bytes. Otherwise
// the copy is done when the warp has met. `anything`: an address that may be read.
template <class T, int kRowBits>
__device__ __forceinline__ void copy_unit(uint32_t to, const T* from, int64_t stride, int rows, int columns,
                                          bool aligned, const void* anything, int lane) {
  constexpr int kRowStep = 32 >> kRowBits;
  const int row = lane >> kRowBits, piece = lane & ((1 << kRowBits) - 1);
  const int count = min(max(columns - 8 * piece, 0), 8);
  from += row * stride + 8 * piece;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool valid = i * kRowStep + row < rows && count > 0;
      copy_async_16(to + 16 * place<kRowBits>(i * kRowStep + row, piece), valid ? from : anything,
                    valid ? 2 * count : 0);
      from += kRowStep * stride;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const uint4 v = load_eight_words(reinterpret_cast<const uint16_t*>(from), i * kRowStep + row < rows ? count : 0);
      asm volatile(
          "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16 * place<kRowBits>(i * kRowStep + row, piece)),
          "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
          : "memory");
      from += kRowStep * stride;
    }
  }
}

}  // namespace punica::cuda::fused_lora
