// Writes into the paged KV cache: copies of rows, whatever the instruction set.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "src/cpu/backend.h"
#include "src/cpu/parallel.h"

namespace punica::cpu {
namespace {

// Rows [begin, end) of k and v, all their heads from head_begin to head_end, become the last positions of sequence i.
// Rows that would come before position 0 are dropped.
void write_rows(const PagedKv& kv, const TensorView& k, const TensorView& v, int64_t i, int64_t begin, int64_t end,
                int64_t head_begin, int64_t head_end) {
  const SequencePages sequence = kv.sequence(i);
  const PageShape page_shape = kv.page_shape(k.shape[2]);
  const int64_t element = static_cast<int64_t>(dtype_size(k.dtype));
  const int64_t row_bytes = page_shape.head_dim * element;
  const int64_t* kv_ptrs = kv.kv_ptrs.as<const int64_t>() + sequence.first_page;
  int64_t position = sequence.kv_len - (end - begin);
  if (position < 0) {
    begin -= position;
    position = 0;
  }
  while (begin < end) {
    const TokenPlace place = token_place(position, kv.page_size);
    const int64_t count = std::min(end - begin, kv.page_size - place.slot);
    std::byte* page = reinterpret_cast<std::byte*>(kv_ptrs[place.page]);
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      const TensorView& rows = part == KvPart::kKey ? k : v;
      for (int64_t head = head_begin; head < head_end; ++head) {
        const std::byte* from = rows.as<const std::byte>() + (begin * rows.stride[0] + head * rows.stride[1]) * element;
        std::byte* to = page + page_shape.head_offset(kv.layer_idx, part, head) * element + place.slot * row_bytes;
        for (int64_t row = 0; row < count; ++row) {
          std::memcpy(to + row * row_bytes, from + row * rows.stride[0] * element, static_cast<size_t>(row_bytes));
        }
      }
    }
    begin += count;
    position += count;
  }
}

// Rows that a copy reaches in the time of the threads' wake-up differ by machine; the estimate is for cold memory.
double nanoseconds(const TensorView& k) {
  return 0.2 * 2 * static_cast<double>(k.numel()) * static_cast<double>(dtype_size(k.dtype));
}

}  // namespace

Status init_kv(const InitKvParams& params, const Context& context) {
  const int64_t num_rows = params.k.shape[0], num_heads = params.kv.num_kv_heads;
  if (params.k.numel() == 0) return {};
  const int32_t* indptr = params.seqlen_indptr.as<const int32_t>();
  // A task is one head of one sequence: a single long prompt is spread over the threads too.
  const int num_threads = choose_num_threads(context, nanoseconds(params.k));
  parallel_for(num_threads, params.kv.num_sequences() * num_heads, [&](int64_t task) {
    const int64_t i = task / num_heads, head = task % num_heads;
    const int64_t begin = std::clamp<int64_t>(indptr[i], 0, num_rows);
    const int64_t end = std::clamp<int64_t>(indptr[i + 1], 0, num_rows);
    if (begin < end) write_rows(params.kv, params.k, params.v, i, begin, end, head, head + 1);
  });
  return {};
}

Status append_kv(const AppendKvParams& params, const Context& context) {
  if (params.k.numel() == 0) return {};
  const int num_threads = choose_num_threads(context, nanoseconds(params.k));
  parallel_for(num_threads, params.kv.num_sequences(),
               [&](int64_t i) { write_rows(params.kv, params.k, params.v, i, i, i + 1, 0, params.kv.num_kv_heads); });
  return {};
}

}  // namespace punica::cpu
