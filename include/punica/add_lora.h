// The whole LoRA of a layer in one call: y += scale * B (A x), every row through its own adapter at its own rank.
#pragma once

#include <cstdint>
#include <optional>

#include "punica/context.h"
#include "punica/status.h"
#include "punica/types.h"

namespace punica {

// Which row of a batch has which adapter, sorted by adapter. update_lora_batch() fills it on the device; a step of a
// model then uses it in every layer. All tensors are int32, contiguous and of fixed size, so that a captured graph
// finds the next step's batch in them.
//
// A segment is a run of `order` whose rows have the same adapter. The segments are sorted by adapter, -1 (rows without
// one) first, and rows keep their order inside a segment. Segment s is the rows
// order[segment_start[s] : segment_start[s + 1]] and has the adapter segment_adapter[s]. Segments that are not used
// have the adapter -1 and segment_start 0, so that segment_start may decrease behind the last one in use: such a
// segment is empty. These are vLLM's tensors of the same content (see the docs: kernels/add_lora.md), which can be
// passed as they are.
//
// The segments alone say what is computed: `indices` is for the caller to read, and what `order` holds beyond the last
// segment means nothing.
struct LoraBatch {
  TensorView indices;          // [capacity], the adapter of each row, -1: none; add_lora does not take it
  TensorView order;            // [capacity], row numbers
  TensorView segment_adapter;  // [max_segments]
  TensorView segment_start;    // [max_segments + 1], positions in `order`
  TensorView counts;           // [2]: segments in use (that of -1 too), rows that have an adapter; may be absent
};

// As many segments as a batch of `capacity` rows can need.
constexpr int64_t max_lora_segments(int64_t capacity, int64_t num_adapters) {
  return capacity <= num_adapters ? capacity : num_adapters + 1;
}

// Fills `batch` from the adapters of n rows, n <= capacity. The rows behind them are in no segment: `indices` and
// `order` are -1 there. A negative index means no adapter. One that is not below num_adapters is an error where
// contents are checked, and otherwise means none too.
struct LoraBatchParams {
  TensorView indices;        // int32 or int64 [n]
  int64_t num_adapters = 0;  // at most 2^31 - 1
  LoraBatch batch;           // all tensors written; max_segments >= max_lora_segments(capacity, num_adapters)
};

// Slices of y that one call serves at most.
inline constexpr int kMaxLoraSlices = 16;
// The default of AddLoraParams::max_rank, and the largest value that the CUDA backend takes.
inline constexpr int64_t kMaxLoraRank = 512;

// For every row t of a segment with adapter i, and every slice s, which is the columns
// slice_offsets[s] .. slice_offsets[s + 1] - 1 of y (h_out_s of them):
//
//     v = A x[t]                              A [r, h_in] in float32, never rounded to T
//     y[t, slice s] += scale * (B v)          B [h_out_s, r], sums in float32, one rounding, at the store
//
// with r = ranks[s, i] and scale = scales[s, i], A at address a_ptr[s, i], layer layer_idx of it, and B likewise. A
// rank of 0 or an address of 0 (either one): nothing is done for that slice. Rows of no segment, rows without an
// adapter and columns of no slice stay as they are, bit for bit.
//
// Where the contents are not checked (CUDA), nothing is read or written out of a tensor's bounds whatever the tables
// hold: segments are clamped to `order`; a row outside [0, rows), an adapter outside [0, num_adapters) and a rank
// outside [0, max_rank] count as none. Addresses are trusted. (A row that is listed twice has no defined result.)
struct AddLoraParams {
  TensorView y;       // T [rows, width], accumulated into; rows may be strided
  TensorView x;       // T [rows, h_in], rows may be strided
  TensorView a_ptr;   // int64 [slices, num_adapters], addresses of T [L, r, h_in], aligned to their element
  TensorView b_ptr;   // int64 [slices, num_adapters], addresses of T [L, h_out_s, r], aligned to their element
  TensorView ranks;   // int32 [num_adapters] or [slices, num_adapters]
  TensorView scales;  // float32, [num_adapters] or [slices, num_adapters]
  LoraBatch batch;    // read; capacity >= rows; indices absent
  int64_t layer_idx = 0;

  // Ascending (equal ones make an empty slice), in [0, width]; slices + 1 of them, slices in 1 .. kMaxLoraSlices.
  int64_t slice_offsets[kMaxLoraSlices + 1] = {};

  // Elements, where they are not what follows from the rank of each adapter: tables of padded slots have the largest
  // rank there. They count for all adapters and slices.
  std::optional<int64_t> a_layer_stride;  // from one layer of A to the next; default r * h_in
  std::optional<int64_t> b_layer_stride;  // from one layer of B to the next; default h_out_s * b_row_stride
  std::optional<int64_t> b_row_stride;    // from one row of B to the next, at least the rank; default r

  // No rank is larger. What the host knows of the ranks, which lie on the device: it may choose memory and kernels by
  // it, but a row's bits do not depend on it.
  int64_t max_rank = kMaxLoraRank;

  int num_slices() const { return static_cast<int>(a_ptr.shape[0]); }
  int64_t num_adapters() const { return a_ptr.shape[1]; }
  int64_t max_segments() const { return batch.segment_adapter.shape[0]; }
  // Elements between the rows (slices) of ranks and scales: 0 where all slices share them.
  int64_t rank_stride() const { return ranks.rank == 2 ? num_adapters() : 0; }
  int64_t scale_stride() const { return scales.rank == 2 ? num_adapters() : 0; }
};

Status validate(const LoraBatchParams& params);
Status validate(const AddLoraParams& params);

Status update_lora_batch(const LoraBatchParams& params, const Context& context);
Status add_lora(const AddLoraParams& params, const Context& context);

}  // namespace punica
