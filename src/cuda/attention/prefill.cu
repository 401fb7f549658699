// Launches of prefill_tensor.cuh: the tensor map of all memory, the grid.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "src/cuda/attention/counter.cuh"
#include "src/cuda/attention/prefill.h"
#include "src/cuda/attention/prefill_tensor.cuh"

namespace punica::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that the runtime has loaded: the library links to no driver.
cudaError_t find_encode(EncodeTiled* encode) {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return std::pair(error != cudaSuccess || result == cudaDriverEntryPointSuccess ? error : cudaErrorNotSupported,
                     reinterpret_cast<EncodeTiled>(function));
  }();
  *encode = found.second;
  return found.first;
}

// All memory: coordinates are an element of a row, a row of those that lie together, and an address / 16 in two digits.
// A thread keeps the map of its last call: an engine has one.
cudaError_t tensor_map(int head_dim, int box_rows, CUtensorMap* map) {
  thread_local struct {
    int head_dim = 0, box_rows = 0;
    CUtensorMap map;
  } cache;
  if (cache.head_dim != head_dim || cache.box_rows != box_rows) {
    EncodeTiled encode;
    if (const cudaError_t error = find_encode(&encode); error != cudaSuccess) return error;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(box_rows),
                                cuuint64_t{1} << kAddressBits, cuuint64_t{1} << (48 - 4 - kAddressBits)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(head_dim) * 2, 16, cuuint64_t{16} << kAddressBits};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
    const CUresult result = encode(&cache.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, nullptr, sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
    cache.head_dim = head_dim;
    cache.box_rows = box_rows;
  }
  *map = cache.map;
  return cudaSuccess;
}

// With at least so many items splits stay together: every multiprocessor has work. No bit depends on it.
constexpr int64_t kFewItems = 132;
// From so many items on blocks count them up in the workspace: items differ, and shares fixed ahead would too.
constexpr int64_t kCountedItems = 2 * kFewItems;
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;
constexpr int64_t kAlignment = 16;  // the workspace may start anywhere

// Positions, rows times a group, and items of a sequence are 32-bit numbers in the kernel.
constexpr double kLimit = 0x1p31 - 2 * kPrefillKeys;

// Tiles of rows, at most: each sequence may have one that is not full.
int64_t max_tiles(int64_t head_dim, int64_t rows, int64_t group_size, int64_t num_sequences) {
  const int64_t tile_rows = head_dim == 64 ? kPrefillRows<64> : kPrefillRows<128>;
  return (rows * group_size + tile_rows - 1) / tile_rows + num_sequences;
}

bool serves_shape(const BatchPrefillParams& params) {
  const int64_t head_dim = params.q.shape[2], rows = params.q.shape[0], page_size = params.kv.page_size;
  const int64_t group_size = params.q.shape[1] / params.kv.num_kv_heads;
  // Rows of an item, and up to a group before them, times the group's size: below 2^32 (Output::split_row).
  if (group_size > 32768 || static_cast<double>(rows) * static_cast<double>(group_size) > kLimit ||
      static_cast<double>(max_tiles(head_dim, rows, group_size, 1)) * static_cast<double>(params.kv.num_kv_heads) >
          kLimit ||
      static_cast<double>(page_size) > kLimit ||
      static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(page_size) > kLimit) {
    return false;
  }
  return params.q.dtype != DType::kFloat32 && (head_dim == 64 || head_dim == 128) && !params.rope_theta.has_value() &&
         !(params.sm_scale.has_value() && *params.sm_scale <= 0);
}

int64_t slot_bytes(const BatchPrefillParams& params) {
  return params.q.shape[1] *
         (params.q.shape[2] * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}

int64_t max_items(const BatchPrefillParams& params) {
  const int64_t group_size = params.q.shape[1] / params.kv.num_kv_heads;
  return max_tiles(params.q.shape[2], params.q.shape[0], group_size, params.kv.num_sequences()) *
         params.kv.num_kv_heads;
}

// Pairs of a query and a split, at most; 0 where splits stay together.
int64_t num_slots(const BatchPrefillParams& params) {
  if (params.q.numel() == 0 || params.kv.num_sequences() == 0 || !serves_shape(params)) return 0;
  const double tokens = static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(params.kv.page_size);
  if (tokens <= kPrefillSplitTokens || max_items(params) >= kFewItems) return 0;
  const double most = static_cast<double>(params.q.shape[0]) * (1 + std::floor(tokens / kPrefillSplitTokens));
  return static_cast<int64_t>(std::min(most, static_cast<double>(kMaxPartialBytes / slot_bytes(params))));
}

template <class T, int kDim>
Status launch(const Launcher& launcher, const AttentionArgs& args, int64_t items, unsigned* next_item) {
  const int64_t page_size = args.page_size;
  // Rows that lie together in a page and in a tile.
  const int box_rows = static_cast<int>(std::min<int64_t>(page_size & -page_size, kPrefillKeys));
  CUtensorMap map;
  if (const cudaError_t error = tensor_map(kDim, box_rows, &map); error != cudaSuccess) {
    return to_status(launcher.op(), error);
  }
  const int processors = launcher.num_multiprocessors();
  if (args.num_slots > 0) items = processors;
  const auto wide = [](const void* tensor, int64_t stride) {
    return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && stride % 8 == 0;
  };
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(std::min<int64_t>(items, processors));
  shape.block.x = kPrefillThreads<kDim>;
  shape.shared_bytes = sizeof(PrefillShared<kDim>);
  PUNICA_RETURN_IF_ERROR((launcher.launch<prefill_kernel<Arch::kSm90, T, kDim>>(
      shape, args, map, box_rows, wide(args.q, args.q_stride), wide(args.o, args.o_stride), next_item)));
  if (args.num_slots == 0) return {};
  constexpr int64_t kHeadsABlock = kPrefillMergeThreads / 32;
  LaunchShape merge;
  merge.grid.x = static_cast<unsigned>(args.num_rows);
  merge.grid.y = static_cast<unsigned>(std::min<int64_t>((args.num_heads() + kHeadsABlock - 1) / kHeadsABlock, 8));
  merge.block.x = kPrefillMergeThreads;
  return launcher.launch<prefill_merge_kernel<Arch::kSm90, T, kDim>>(merge, args);
}

}  // namespace

bool serves_prefill(Arch arch, const BatchPrefillParams& params) { return arch == Arch::kSm90 && serves_shape(params); }

int64_t prefill_workspace_bytes(const BatchPrefillParams& params) {
  if (params.q.numel() == 0 || params.kv.num_sequences() == 0 || !serves_shape(params)) return 0;
  if (max_items(params) >= kCountedItems) return static_cast<int64_t>(sizeof(unsigned)) + kAlignment;
  const int64_t slots = num_slots(params);
  return slots == 0 ? 0 : slots * slot_bytes(params) + kAlignment;
}

Status launch_prefill(const Launcher& launcher, const BatchPrefillParams& params, const AttentionArgs& call) {
  AttentionArgs args = call;
  // Without a workspace splits stay together.
  args.num_slots = params.tmpbuf.has_value() ? num_slots(params) : 0;
  const int64_t items = max_items(params);
  const int64_t workspace = (reinterpret_cast<int64_t>(params.tmpbuf.data) + kAlignment - 1) / kAlignment * kAlignment;
  unsigned* next_item = nullptr;
  if (params.tmpbuf.has_value() && items >= kCountedItems) {
    next_item = reinterpret_cast<unsigned*>(workspace);
    PUNICA_RETURN_IF_ERROR(reset_counter(launcher, next_item));
  } else if (args.num_slots > 0) {
    args.partial_sums = reinterpret_cast<float*>(workspace);
    args.partial_states =
        reinterpret_cast<float2*>(args.partial_sums + args.num_slots * args.num_heads() * args.head_dim);
  }
  const bool half = params.q.dtype == DType::kFloat16;
  if (args.head_dim == 64) {
    return half ? launch<__half, 64>(launcher, args, items, next_item)
                : launch<__nv_bfloat16, 64>(launcher, args, items, next_item);
  }
  return half ? launch<__half, 128>(launcher, args, items, next_item)
              : launch<__nv_bfloat16, 128>(launcher, args, items, next_item);
}

}  // namespace punica::cuda
