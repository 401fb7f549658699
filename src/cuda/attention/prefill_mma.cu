// What the prefill by warp products serves, its workspace and its launches.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "src/cuda/attention/counter.cuh"
#include "src/cuda/attention/prefill_mma.cuh"
#include "src/cuda/attention/prefill_mma.h"
#include "src/cuda/attention/prefill_mma_merge.cuh"
#include "src/cuda/attention/prefill_mma_rotate.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {
namespace {

// With at least so many items splits stay together: every multiprocessor has work. No bit depends on it.
constexpr int64_t kFewItems = 264;
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;
constexpr int64_t kAlignment = 16;  // the workspace may start anywhere

// Keys are rotated ahead where each is multiplied in so many items or more, on an average, and in no more memory.
constexpr int64_t kRotatesFrom = 4;
constexpr int64_t kMaxRotatedBytes = int64_t{512} << 20;
constexpr int kRotateBlocksPerMultiprocessor = 4;

// Blocks of a launch: each has a place for what it has merged.
constexpr int64_t kMaxBlocks = 320;
constexpr int kBlocksPerMultiprocessor = 2;

int64_t table_tokens(const BatchPrefillParams& params) {  // serves_shape() says that this is no overflow
  return params.kv.kv_ptrs.shape[0] * params.kv.page_size;
}

template <class Body>
auto with_head_dim(int64_t head_dim, Body body) {
  if (head_dim <= 64) return body(std::integral_constant<int, 64>{});
  if (head_dim <= 80) return body(std::integral_constant<int, 80>{});
  if (head_dim <= 96) return body(std::integral_constant<int, 96>{});
  if (head_dim <= 128) return body(std::integral_constant<int, 128>{});
  if (head_dim <= 192) return body(std::integral_constant<int, 192>{});
  return body(std::integral_constant<int, 256>{});
}

int64_t slot_bytes(const BatchPrefillParams& params) {
  return params.q.shape[1] *
         (params.q.shape[2] * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}

// What of the workspace is what, and how many blocks there are at most.
struct Plan {
  int64_t blocks;
  int64_t slots;  // pairs of a query and a split; 0 where splits stay together
  int64_t slot_bytes, saved_bytes, rotated_bytes, counter_bytes;
  bool needed() const { return saved_bytes > 0; }  // the rest only helps
  int64_t bytes() const {
    const int64_t all = slot_bytes + saved_bytes + rotated_bytes + counter_bytes;
    return all == 0 ? 0 : all + kAlignment;
  }
};

Plan make_plan(const BatchPrefillParams& params) {
  const int64_t head_dim = params.q.shape[2], rows = params.q.shape[0], kv_heads = params.kv.num_kv_heads;
  return with_head_dim(head_dim, [&](auto dim) {
    using Shape = MmaShape<decltype(dim)::value, false>;
    const int64_t group_size = params.q.shape[1] / kv_heads;
    // Each sequence may have one tile of rows that is not full.
    const int64_t tiles = (rows * group_size + Shape::kRows - 1) / Shape::kRows + params.kv.num_sequences();
    const int64_t items = tiles * kv_heads, tokens = table_tokens(params);
    Plan plan = {};
    plan.blocks = std::min(items, kMaxBlocks);
    plan.counter_bytes = items > kFewItems ? kAlignment : 0;
    const double rotated = static_cast<double>(tokens) * static_cast<double>(kv_heads * head_dim * 2);
    if (params.rope_theta.has_value() && head_dim % 16 == 0 && rotated <= kMaxRotatedBytes &&
        tiles >= (kRotatesFrom + 1) * params.kv.num_sequences()) {
      plan.rotated_bytes = tokens * kv_heads * head_dim * 2;
    }
    if (tokens <= kMmaSplitTokens) return plan;
    if (items < kFewItems) {
      plan.blocks = kMaxBlocks;
      const double most = static_cast<double>(rows) * (1 + std::floor(static_cast<double>(tokens) / kMmaSplitTokens));
      const int64_t room = kMaxPartialBytes / slot_bytes(params);
      plan.slots = static_cast<int64_t>(std::min(most, static_cast<double>(room)));
      plan.slot_bytes = (plan.slots * slot_bytes(params) + kAlignment - 1) / kAlignment * kAlignment;
    }
    plan.saved_bytes = plan.blocks * Shape::kRows * Shape::kDim * static_cast<int64_t>(sizeof(float));
    return plan;
  });
}

Status launch_merge(const Launcher& launcher, DType dtype, const AttentionArgs& args) {
  constexpr int64_t kHeadsABlock = kMmaMergeThreads / 32;
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(args.num_rows);
  shape.grid.y = static_cast<unsigned>(std::min<int64_t>((args.num_heads() + kHeadsABlock - 1) / kHeadsABlock, 8));
  shape.block.x = kMmaMergeThreads;
  return with_arch(launcher.arch, [&](auto arch) {
    constexpr Arch kArch = decltype(arch)::value;
    return dtype == DType::kFloat16 ? launcher.launch<merge_prefill_mma_kernel<kArch, __half>>(shape, args)
                                    : launcher.launch<merge_prefill_mma_kernel<kArch, __nv_bfloat16>>(shape, args);
  });
}

// But for the path and the device. Nothing of the batch decides but room in the table of pages.
bool serves_shape(const BatchPrefillParams& params) {
  const double limit = 0x1p31 - 2 * kMmaSplitTokens;
  const double scale = params.sm_scale.value_or(1.0);
  const double folded = scale / (params.logits_soft_cap > 0 ? params.logits_soft_cap : 1.0);
  return params.q.dtype != DType::kFloat32 && std::fabs(folded) > 0x1p-100 && std::fabs(folded) < 0x1p100 &&
         static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(params.kv.page_size) < limit;
}

}  // namespace

Status launch_rotate_keys(const Launcher& launcher, DType dtype, const AttentionArgs& args, const MmaCall& call,
                          const RopeTable& rope) {
  // Each sequence may have one tile that is not full.
  const int64_t tiles = args.num_page_ptrs * args.page_size / kRotateTokens + args.num_sequences;
  LaunchShape shape;
  shape.grid.x =
      static_cast<unsigned>(std::min(tiles, int64_t{launcher.num_multiprocessors()} * kRotateBlocksPerMultiprocessor));
  shape.block.x = kRotateThreads;
  return with_arch(launcher.arch, [&](auto arch) {
    constexpr Arch kArch = decltype(arch)::value;
    return dtype == DType::kFloat16
               ? launcher.launch<rotate_keys_kernel<kArch, __half>>(shape, args, call, rope)
               : launcher.launch<rotate_keys_kernel<kArch, __nv_bfloat16>>(shape, args, call, rope);
  });
}

bool serves_prefill_mma(const BatchPrefillParams& params) {
  if (!serves_shape(params)) return false;
  if (params.q.shape[2] <= 192 || params.rope_theta.has_value()) return true;
  // More than the 99 KiB that a block has everywhere.
  int device = 0, shared_bytes = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known && static_cast<size_t>(shared_bytes) >= sizeof(MmaShared<MmaShape<256, false>, false>);
}

int64_t prefill_mma_workspace_bytes(const BatchPrefillParams& params) {
  if (params.q.numel() == 0 || params.kv.num_sequences() == 0 || !serves_shape(params)) return 0;
  return make_plan(params).bytes();
}

Status launch_prefill_mma(const Launcher& launcher, const BatchPrefillParams& params, const AttentionArgs& call,
                          const RopeTable* rope) {
  const Plan plan = make_plan(params);
  AttentionArgs args = call;
  MmaCall mma = {};
  if (params.tmpbuf.has_value()) {
    const int64_t address = reinterpret_cast<int64_t>(params.tmpbuf.data);
    unsigned char* place = reinterpret_cast<unsigned char*>((address + kAlignment - 1) / kAlignment * kAlignment);
    const auto take = [&](int64_t bytes) {
      void* const taken = bytes > 0 ? place : nullptr;
      place += bytes;
      return taken;
    };
    args.num_slots = plan.slots;
    args.partial_sums = static_cast<float*>(take(plan.slot_bytes));
    args.partial_states =
        reinterpret_cast<float2*>(args.partial_sums + args.num_slots * args.num_heads() * args.head_dim);
    mma.saved = static_cast<float*>(take(plan.saved_bytes));
    mma.next_item = static_cast<unsigned*>(take(plan.counter_bytes));
    mma.rotated = static_cast<unsigned char*>(take(plan.rotated_bytes));
  } else if (plan.needed()) {
    return {StatusCode::kInvalidArgument, std::string(launcher.op()) + ": tmpbuf must have at least " +
                                              std::to_string(plan.bytes()) + " bytes on CUDA, got none"};
  }
  mma.page_inverse = static_cast<uint32_t>(0xffffffffu / args.page_size + 1);
  const auto wide = [&](const void* tensor, int64_t stride) {
    return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && stride % 8 == 0 && args.head_dim % 8 == 0;
  };
  mma.wide_q = wide(args.q, args.q_stride);
  mma.wide_o = wide(args.o, args.o_stride);
  const unsigned blocks = static_cast<unsigned>(
      std::min<int64_t>(plan.blocks, int64_t{launcher.num_multiprocessors()} * kBlocksPerMultiprocessor));
  if (mma.rotated != nullptr) {
    PUNICA_RETURN_IF_ERROR(launch_rotate_keys(launcher, params.q.dtype, args, mma, *rope));
  } else if (mma.next_item != nullptr) {
    PUNICA_RETURN_IF_ERROR(reset_counter(launcher, mma.next_item));
  }
  PUNICA_RETURN_IF_ERROR(with_head_dim(args.head_dim, [&](auto dim) {
    return launch_mma<decltype(dim)::value>(launcher, params.q.dtype, args, mma, rope, blocks);
  }));
  if (args.num_slots == 0) return {};
  return launch_merge(launcher, params.q.dtype, args);
}

}  // namespace punica::cuda
