// add_lora and update_lora_batch of the CPU backend: how the work is cut into tasks and how many threads take them. The
// arithmetic is in add_lora_kernels.cc.
//
// A call is two phases: A x for all rows, kept in float32 at the rank of each adapter, then B of that. Within a phase
// all tasks are independent. Up to kLoraTokens rows of one adapter share every load of its weights.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "src/cpu/add_lora_kernels.h"
#include "src/cpu/backend.h"
#include "src/cpu/parallel.h"

namespace punica::cpu {
namespace {

// What one thread reaches, roughly: enough to tell work that is worth waking others from work that is not.
constexpr double kBytesPerNanosecond = 30;
constexpr double kFlopsPerNanosecond = 100;

// Tasks for each thread that even out what one of them loses to other processes.
constexpr int64_t kTasksPerThread = 4;

// Elements of v at a time: a batch that has more goes in parts.
constexpr int64_t kMaxIntermediate = 4 << 20;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Layer layer_idx of what lies at an address.
const void* layer_of(int64_t address, int64_t layer_idx, int64_t layer_stride, size_t item) {
  return reinterpret_cast<const char*>(address) + layer_idx * layer_stride * static_cast<int64_t>(item);
}

// The work of segment s, cut at kLoraTokens rows. v is not set yet.
void add_items(const AddLoraParams& p, int64_t segment, std::vector<LoraItem>* items) {
  const int32_t* start = p.batch.segment_start.as<const int32_t>();
  const int64_t adapter = p.batch.segment_adapter.as<const int32_t>()[segment];
  const int64_t begin = start[segment], end = start[segment + 1];
  if (adapter < 0 || begin >= end) return;
  const int64_t h_in = p.x.shape[1];
  const size_t item_size = dtype_size(p.y.dtype);
  for (int slice = 0; slice < p.num_slices(); ++slice) {
    const int64_t entry = slice * p.num_adapters() + adapter;
    const int64_t a = p.a_ptr.as<const int64_t>()[entry], b = p.b_ptr.as<const int64_t>()[entry];
    const int64_t h_out = p.slice_offsets[slice + 1] - p.slice_offsets[slice];
    const int64_t rank = p.ranks.as<const int32_t>()[slice * p.rank_stride() + adapter];
    if (a == 0 || b == 0 || rank == 0 || h_out == 0) continue;
    LoraItem item;
    item.rank = rank;
    item.b_row_stride = p.b_row_stride.value_or(rank);
    item.a = layer_of(a, p.layer_idx, p.a_layer_stride.value_or(rank * h_in), item_size);
    item.b = layer_of(b, p.layer_idx, p.b_layer_stride.value_or(h_out * item.b_row_stride), item_size);
    item.scale = p.scales.as<const float>()[slice * p.scale_stride() + adapter];
    item.column = p.slice_offsets[slice];
    item.h_out = h_out;
    item.v = nullptr;
    for (int64_t first = begin; first < end; first += kLoraTokens) {
      item.rows = p.batch.order.as<const int32_t>() + first;
      item.num_tokens = std::min(kLoraTokens, end - first);
      items->push_back(item);
    }
  }
}

// Runs one phase over items [first, last): `extent` of an item is cut into tasks of at most `largest`, fewer where
// threads would stay idle, at multiples of `multiple`.
template <class Extent>
void run_phase(const AddLoraParams& p, const LoraItem* first, const LoraItem* last, int num_threads, int64_t largest,
               int64_t multiple, std::vector<LoraTask>* tasks, Extent extent, LoraPhase run) {
  int64_t total = 0;
  for (const LoraItem* item = first; item < last; ++item) total += extent(*item);
  const int64_t wanted = num_threads == 1 ? 1 : kTasksPerThread * num_threads;
  const int64_t count = std::clamp(round_up(ceil_div(total, wanted), multiple), multiple, largest);
  tasks->clear();
  for (const LoraItem* item = first; item < last; ++item) {
    for (int64_t begin = 0; begin < extent(*item); begin += count) {
      tasks->push_back({item, begin, std::min(count, extent(*item) - begin)});
    }
  }
  run(p, tasks->data(), static_cast<int64_t>(tasks->size()), num_threads);
}

Status run(const AddLoraParams& p, const Context& context, const AddLoraKernels* kernels) {
  std::vector<LoraItem> items;
  for (int64_t segment = 0; segment < p.max_segments(); ++segment) add_items(p, segment, &items);
  if (items.empty()) return {};

  const auto element = static_cast<double>(dtype_size(p.y.dtype)), inputs = static_cast<double>(p.x.shape[1]);
  double nanoseconds = 0;
  int64_t intermediate = 0;
  for (const LoraItem& item : items) {
    const auto tokens = static_cast<double>(item.num_tokens), outputs = static_cast<double>(item.h_out);
    const double weights = static_cast<double>(item.rank) * (inputs + outputs);
    nanoseconds += element * (weights + tokens * (inputs + 2 * outputs)) / kBytesPerNanosecond +
                   2 * tokens * weights / kFlopsPerNanosecond;
    intermediate += item.num_tokens * item.rank;
  }
  const int num_threads = choose_num_threads(context, nanoseconds);

  // No item is larger than kMaxIntermediate unless its rank is beyond 65536.
  int64_t room = std::min(intermediate, kMaxIntermediate);
  for (const LoraItem& item : items) room = std::max(room, item.num_tokens * item.rank);
  const std::unique_ptr<float[]> v(new (std::nothrow) float[static_cast<size_t>(room)]);
  if (v == nullptr) {
    return {StatusCode::kOutOfMemory,
            "add_lora: cannot allocate " + std::to_string(room * int64_t{sizeof(float)}) + " bytes of workspace"};
  }
  const int type = static_cast<int>(p.y.dtype);
  std::vector<LoraTask> tasks;
  for (LoraItem *first = items.data(), *const end = first + items.size(), *last = first; first < end; first = last) {
    int64_t used = 0;
    for (; last < end && used + last->num_tokens * last->rank <= room; ++last) {
      last->v = v.get() + used;
      used += last->num_tokens * last->rank;
    }
    // Ranks are cut at multiples of what the kernels take at a time, as far as threads need it.
    run_phase(
        p, first, last, num_threads, kShrinkRanks, 4, &tasks, [](const LoraItem& item) { return item.rank; },
        kernels->shrink[type]);
    const int64_t most = num_threads == 1 ? INT64_MAX / kExpandOutputs * kExpandOutputs : 16 * kExpandOutputs;
    run_phase(
        p, first, last, num_threads, most, kExpandOutputs, &tasks, [](const LoraItem& item) { return item.h_out; },
        kernels->expand[type]);
  }
  return {};
}

}  // namespace

Status add_lora(const AddLoraParams& params, const Context& context) {
  Isa isa;
  PUNICA_RETURN_IF_ERROR(active_isa("add_lora", &isa));
  try {
    return run(params, context, add_lora_kernels(isa));
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "add_lora: cannot allocate its list of tasks"};
  }
}

Status update_lora_batch(const LoraBatchParams& params, const Context& /*context*/) {
  const LoraBatch& batch = params.batch;
  const int64_t n = params.indices.shape[0], capacity = batch.order.shape[0];
  const int64_t max_segments = batch.segment_adapter.shape[0];
  int32_t* indices = batch.indices.as<int32_t>();
  int32_t* order = batch.order.as<int32_t>();
  int32_t* adapter = batch.segment_adapter.as<int32_t>();
  int32_t* start = batch.segment_start.as<int32_t>();
  for (int64_t t = 0; t < n; ++t) {
    const int64_t index = params.indices.dtype == DType::kInt64 ? params.indices.as<const int64_t>()[t]
                                                                : params.indices.as<const int32_t>()[t];
    indices[t] = index < 0 || index >= params.num_adapters ? -1 : static_cast<int32_t>(index);
    order[t] = static_cast<int32_t>(t);
  }
  std::fill(indices + n, indices + capacity, -1);
  std::fill(order + n, order + capacity, -1);
  // Equal to a stable sort by adapter, without its memory.
  std::sort(order, order + n,
            [indices](int32_t a, int32_t b) { return indices[a] != indices[b] ? indices[a] < indices[b] : a < b; });

  int64_t segments = 0, active = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t index = indices[order[i]];
    active += index >= 0;
    if (i > 0 && index == indices[order[i - 1]]) continue;
    adapter[segments] = index;
    start[segments++] = static_cast<int32_t>(i);
  }
  start[segments] = static_cast<int32_t>(n);
  std::fill(adapter + segments, adapter + max_segments, -1);
  std::fill(start + segments + 1, start + max_segments + 1, 0);
  batch.counts.as<int32_t>()[0] = static_cast<int32_t>(segments);
  batch.counts.as<int32_t>()[1] = static_cast<int32_t>(active);
  return {};
}

}  // namespace punica::cpu
