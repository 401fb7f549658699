// batch_prefill and batch_decode: what is a task, where partial results go, how many threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "src/cpu/attention_kernels.h"
#include "src/cpu/parallel.h"

namespace punica::cpu {
namespace {

constexpr int64_t kAlignment = 64;

// Partial results take this much at most. Batches that would need more have so many keys that a task can take all
// splits of its rows and the threads still find enough tasks.
constexpr int64_t kMaxPartialBytes = int64_t{16} << 20;

constexpr int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t task_table_bytes(int64_t num_sequences) {
  return align((num_sequences + 1) * static_cast<int64_t>(sizeof(int64_t)));
}

int64_t pending_bytes(const AttentionPlan& plan) {
  return align(plan.params->kv.num_sequences() * plan.tiles(1) * static_cast<int64_t>(sizeof(int32_t)));
}

// Of the partial results of one split of one sequence.
int64_t split_bytes(const AttentionPlan& plan) {
  return plan.num_heads() * partial_stride(plan.head_dim()) * static_cast<int64_t>(sizeof(float));
}

// The workspace: the caller's, or our own for the time of the call.
class Workspace {
 public:
  Workspace(const TensorView& given, int64_t bytes) {
    void* start = given.data;
    if (!given.has_value()) {
      owned_.reset(new (std::nothrow) std::byte[static_cast<size_t>(bytes + kAlignment)]);
      start = owned_.get();
    }
    if (start == nullptr) return;
    size_t space = static_cast<size_t>(bytes + kAlignment);
    next_ = static_cast<std::byte*>(std::align(kAlignment, 1, start, space));
  }
  bool ok() const { return next_ != nullptr; }
  template <class T>
  T* take(int64_t bytes) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    return result;
  }

 private:
  std::unique_ptr<std::byte[]> owned_;
  std::byte* next_ = nullptr;
};

Status out_of_memory(const char* op) { return {StatusCode::kOutOfMemory, std::string(op) + ": no memory for tmpbuf"}; }

Status run(const char* op, const AttentionPlan& plan, int num_threads) {
  Isa isa;
  PUNICA_RETURN_IF_ERROR(active_isa(op, &isa));
  const AttentionKernels* kernels = attention_kernels(isa);
  switch (plan.params->q.dtype) {
    case DType::kFloat16:
      kernels->float16(plan, num_threads);
      return {};
    case DType::kBFloat16:
      kernels->bfloat16(plan, num_threads);
      return {};
    case DType::kFloat32:
      kernels->float32(plan, num_threads);
      return {};
    default:
      return {StatusCode::kInternal, std::string(op) + ": dtype not validated"};
  }
}

// Time that one thread would take for `pairs` (query, key) of every head, for the choice of the number of threads:
// 0.03 ns an element of K and V, measured on one core with AVX-512-BF16 and four heads a KV head.
double nanoseconds(const AttentionPlan& plan, double pairs) {
  return 0.03 * pairs * static_cast<double>(plan.num_heads() * plan.head_dim());
}

}  // namespace

int64_t workspace_bytes(const BatchPrefillParams& params) {
  return kAlignment + task_table_bytes(params.kv.num_sequences());
}

int64_t workspace_bytes(const BatchDecodeParams& params) {
  const AttentionPlan plan{&params, nullptr, nullptr};
  // Splits of all sequences: each may have one that is not full. In floating point: a page may have any size.
  const double sequences = static_cast<double>(params.kv.num_sequences());
  const double pages = static_cast<double>(params.kv.kv_ptrs.shape[0]);
  const double splits = sequences + pages * static_cast<double>(params.kv.page_size) / kSplitTokens;
  const double partial_bytes = splits * static_cast<double>(split_bytes(plan));
  return kAlignment + task_table_bytes(params.kv.num_sequences()) + pending_bytes(plan) +
         (partial_bytes < kMaxPartialBytes ? align(static_cast<int64_t>(std::ceil(partial_bytes))) : kMaxPartialBytes);
}

Status batch_prefill(const BatchPrefillParams& params, const Context& context) {
  const int64_t num_sequences = params.kv.num_sequences();
  if (params.q.numel() == 0 || num_sequences == 0) return {};
  const int64_t table_bytes = task_table_bytes(num_sequences);
  Workspace workspace(params.tmpbuf, table_bytes);
  if (!workspace.ok()) return out_of_memory("batch_prefill");
  int64_t* first_task = workspace.take<int64_t>(table_bytes);
  const AttentionPlan plan{&params, params.qo_indptr.as<const int32_t>(), first_task};

  double pairs = 0;
  first_task[0] = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const int64_t q_len = plan.num_queries(i);
    first_task[i + 1] = first_task[i] + plan.tiles(q_len);
    const KeyRange keys = plan.keys_of(params.kv.sequence(i).kv_len - (q_len + 1) / 2);
    pairs += static_cast<double>(q_len) * static_cast<double>(std::max<int64_t>(1, keys.end - keys.begin));
  }
  return run("batch_prefill", plan, choose_num_threads(context, nanoseconds(plan, pairs)));
}

Status batch_decode(const BatchDecodeParams& params, const Context& context) {
  const int64_t num_sequences = params.kv.num_sequences();
  if (params.q.numel() == 0 || num_sequences == 0) return {};
  AttentionPlan plan{&params, nullptr, nullptr};

  double pairs = 0;
  int64_t num_splits = 0, longest = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const int64_t newest = params.kv.sequence(i).kv_len - 1;
    const KeyRange keys = plan.keys_of(newest), splits = plan.splits_of(newest);
    pairs += static_cast<double>(std::max<int64_t>(1, keys.end - keys.begin));
    const int64_t count = std::max<int64_t>(1, splits.end - splits.begin);
    num_splits += count;
    longest = std::max(longest, count);
  }
  const int num_threads = choose_num_threads(context, nanoseconds(plan, pairs));
  // All heads in one task, as far as that leaves tasks for all threads: it then reads whole pages.
  constexpr int64_t kTasksPerThread = 4;
  plan.kv_heads_per_tile = std::clamp<int64_t>(kTileRows / plan.group_size(), 1, plan.num_kv_heads());
  while (plan.kv_heads_per_tile > 1 && num_splits * plan.tiles(1) < kTasksPerThread * num_threads) {
    plan.kv_heads_per_tile = (plan.kv_heads_per_tile + 1) / 2;
  }
  // Splits become tasks only where whole rows would not spread over the threads evenly. The last condition is also what
  // keeps a table that lies about its lengths within the workspace.
  constexpr int64_t kEven = 16;  // tasks a thread for which an uneven end costs little
  const bool uneven = longest * kEven * num_threads > num_splits * plan.tiles(1);
  const int64_t partial_bytes = static_cast<double>(num_splits) * static_cast<double>(split_bytes(plan)) > 1e15
                                    ? kMaxPartialBytes + 1
                                    : num_splits * split_bytes(plan);
  const int64_t table_bytes = task_table_bytes(num_sequences);
  int64_t room = kMaxPartialBytes;
  if (params.tmpbuf.has_value()) room = cpu::workspace_bytes(params) - kAlignment - table_bytes - pending_bytes(plan);
  const bool split = num_threads > 1 && longest > 1 && uneven && partial_bytes <= room;

  Workspace workspace(params.tmpbuf, table_bytes + (split ? pending_bytes(plan) + partial_bytes : 0));
  if (!workspace.ok()) return out_of_memory("batch_decode");
  int64_t* first_task = workspace.take<int64_t>(table_bytes);
  plan.first_task = first_task;
  if (split) {
    plan.pending = workspace.take<int32_t>(pending_bytes(plan));
    plan.partials = workspace.take<float>(partial_bytes);
  }
  const int64_t tiles = plan.tiles(1);
  first_task[0] = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const KeyRange splits = plan.splits_of(params.kv.sequence(i).kv_len - 1);
    const int64_t count = split ? std::max<int64_t>(1, splits.end - splits.begin) : 1;
    first_task[i + 1] = first_task[i] + tiles * count;
    if (split) std::fill_n(plan.pending + i * tiles, tiles, static_cast<int32_t>(count));
  }
  return run("batch_decode", plan, num_threads);
}

}  // namespace punica::cpu
