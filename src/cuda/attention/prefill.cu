// Launches of prefill_tensor.cuh: tensor maps of all memory, of queries and of outputs, the grid.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/cuda/attention/counter.cuh"
#include "src/cuda/attention/prefill.h"
#include "src/cuda/attention/prefill_mma.h"
#include "src/cuda/attention/prefill_tensor.cuh"
#include "src/cuda/common/tensor_map.h"

namespace punica::cuda {
namespace {

// Heads and rows of q or o, `rows` rows of a tile at once, each a query and a head of a group.
cudaError_t rows_map(const void* data, int64_t stride, const AttentionArgs& args, int rows, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(args.head_dim), static_cast<cuuint64_t>(args.num_heads()),
                              static_cast<cuuint64_t>(args.num_rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(args.head_dim) * 2, static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(args.group_size),
                            static_cast<cuuint32_t>(rows / args.group_size)};
  return box_map(data, 3, sizes, strides, box, map);
}

// With at least so many items splits stay together: every multiprocessor has work. No bit depends on it.
constexpr int64_t kFewItems = 132;
// From so many items on blocks count them up in the workspace: items differ, and shares fixed ahead would too.
constexpr int64_t kCountedItems = 2 * kFewItems;
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;
// Keys are rotated ahead where each is multiplied in so many items or more, on an average, and in no more memory.
constexpr int64_t kRotatesFrom = 4;
constexpr int64_t kMaxRotatedBytes = int64_t{512} << 20;
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
  return params.q.dtype != DType::kFloat32 && (head_dim == 64 || head_dim == 128) &&
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

// Of keys rotated ahead; 0: none are.
int64_t rotated_bytes(const BatchPrefillParams& params) {
  const int64_t group_size = params.q.shape[1] / params.kv.num_kv_heads, sequences = params.kv.num_sequences();
  const int64_t head_bytes = params.kv.page_size * params.q.shape[2] * 2;
  const double all = static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(params.kv.num_kv_heads) *
                     static_cast<double>(head_bytes);
  if (!params.rope_theta.has_value() || all > kMaxRotatedBytes ||
      max_tiles(params.q.shape[2], params.q.shape[0], group_size, sequences) < (kRotatesFrom + 1) * sequences) {
    return 0;
  }
  return params.kv.kv_ptrs.shape[0] * params.kv.num_kv_heads * head_bytes;
}

template <class T, int kDim>
Status launch(const Launcher& launcher, const AttentionArgs& args, const RopeTable* rope, int64_t items,
              PrefillCall call) {
  const int64_t page_size = args.page_size;
  call.box_rows = static_cast<int>(std::min<int64_t>(page_size & -page_size, kPrefillKeys));
  PrefillMaps maps = {};
  // Rows of those that lie together in a page.
  const MatrixMap rows = {kDim, call.box_rows, kDim, 64, call.box_rows};
  if (const cudaError_t error = matrix_map_anywhere(rows, &maps.memory); error != cudaSuccess) {
    return to_status(launcher.op(), error);
  }
  const int processors = launcher.num_multiprocessors();
  if (args.num_slots > 0) items = processors;
  const auto wide = [](const void* tensor, int64_t stride) {
    return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && stride % 8 == 0;
  };
  call.wide_q = wide(args.q, args.q_stride);
  call.wide_o = wide(args.o, args.o_stride);
  // What no map can be made of goes another way, with the same bits.
  call.copy_q = call.wide_q && 64 % args.group_size == 0 &&
                rows_map(args.q, args.q_stride, args, 64, &maps.queries) == cudaSuccess;
  call.copy_o = call.wide_o && 16 % args.group_size == 0 &&
                rows_map(args.o, args.o_stride, args, 16, &maps.outputs) == cudaSuccess;
  call.read_once = args.num_rows * args.group_size <= kPrefillRows<kDim>;
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(std::min<int64_t>(items, processors));
  shape.block.x = kPrefillThreads<kDim>;
  shape.shared_bytes = sizeof(PrefillShared<kDim>);
  PUNICA_RETURN_IF_ERROR(
      rope == nullptr
          ? (launcher.launch<prefill_kernel<Arch::kSm90, T, kDim, false>>(shape, args, maps, call, NoRope{}))
          : (launcher.launch<prefill_kernel<Arch::kSm90, T, kDim, true>>(shape, args, maps, call, *rope)));
  if (args.num_slots == 0) return {};
  constexpr int64_t kHeadsABlock = kPrefillMergeThreads / 32;
  LaunchShape merge;
  merge.grid.x = static_cast<unsigned>(args.num_rows);
  merge.grid.y = static_cast<unsigned>(std::min<int64_t>((args.num_heads() + kHeadsABlock - 1) / kHeadsABlock, 8));
  merge.block.x = kPrefillMergeThreads;
  return launcher.launch<prefill_merge_kernel<Arch::kSm90, T, kDim>>(merge, args);
}

// Where a workspace's parts are, in bytes from its beginning: the counter of items or partial results, never both, then
// rotated keys.
struct Layout {
  int64_t slots, first_bytes, rotated_bytes;
  bool counted;
};

Layout make_layout(const BatchPrefillParams& params) {
  Layout layout = {};
  if (params.q.numel() == 0 || params.kv.num_sequences() == 0 || !serves_shape(params)) return layout;
  layout.counted = max_items(params) >= kCountedItems;
  layout.slots = num_slots(params);
  layout.first_bytes = layout.counted ? kAlignment : layout.slots * slot_bytes(params);
  layout.first_bytes = (layout.first_bytes + kAlignment - 1) / kAlignment * kAlignment;
  layout.rotated_bytes = rotated_bytes(params);
  return layout;
}

}  // namespace

bool serves_prefill(Arch arch, const BatchPrefillParams& params) { return arch == Arch::kSm90 && serves_shape(params); }

int64_t prefill_workspace_bytes(const BatchPrefillParams& params) {
  const Layout layout = make_layout(params);
  const int64_t all = layout.first_bytes + layout.rotated_bytes;
  return all == 0 ? 0 : all + kAlignment;
}

Status launch_prefill(const Launcher& launcher, const BatchPrefillParams& params, const AttentionArgs& call,
                      const RopeTable* rope) {
  AttentionArgs args = call;
  PrefillCall prefill = {};
  // Without a workspace splits stay together, and keys are rotated each time that they are multiplied.
  if (params.tmpbuf.has_value()) {
    const Layout layout = make_layout(params);
    const int64_t address = reinterpret_cast<int64_t>(params.tmpbuf.data);
    unsigned char* const workspace =
        reinterpret_cast<unsigned char*>((address + kAlignment - 1) / kAlignment * kAlignment);
    if (layout.counted) prefill.next_item = reinterpret_cast<unsigned*>(workspace);
    if (layout.slots > 0) {
      args.num_slots = layout.slots;
      args.partial_sums = reinterpret_cast<float*>(workspace);
      args.partial_states =
          reinterpret_cast<float2*>(args.partial_sums + args.num_slots * args.num_heads() * args.head_dim);
    }
    if (layout.rotated_bytes > 0) {
      MmaCall rotation = {};
      rotation.rotated = workspace + layout.first_bytes;
      rotation.next_item = prefill.next_item;
      prefill.rotated = rotation.rotated;
      PUNICA_RETURN_IF_ERROR(launch_rotate_keys(launcher, params.q.dtype, args, rotation, *rope));
    } else if (prefill.next_item != nullptr) {
      PUNICA_RETURN_IF_ERROR(reset_counter(launcher, prefill.next_item));
    }
  }
  const int64_t items = max_items(params);
  const bool half = params.q.dtype == DType::kFloat16;
  if (args.head_dim == 64) {
    return half ? launch<__half, 64>(launcher, args, rope, items, prefill)
                : launch<__nv_bfloat16, 64>(launcher, args, rope, items, prefill);
  }
  return half ? launch<__half, 128>(launcher, args, rope, items, prefill)
              : launch<__nv_bfloat16, 128>(launcher, args, rope, items, prefill);
}

}  // namespace punica::cuda
