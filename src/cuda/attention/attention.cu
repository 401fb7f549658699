// batch_prefill and batch_decode on CUDA devices: from params to launches. The fast decode (decode.h) serves what it
// can, so do the fast prefills (prefill.h, and prefill_mma.h for what that leaves); the general kernel (general.cuh)
// the rest, and in decode the one that merges (merge.cuh).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/general.cuh"
#include "src/cuda/attention/merge.cuh"
#include "src/cuda/attention/prefill.h"
#include "src/cuda/attention/prefill_mma.h"
#include "src/cuda/backend.h"
#include "src/cuda/common/device.cuh"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

// Partial results take this much at most. Where the sequences have more splits than fit, every block takes whole ones.
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;
constexpr int64_t kAlignment = 16;  // the workspace may start anywhere

// More blocks than any device runs at once: a decode step whose table has room for many pages does not start blocks for
// all of them.
constexpr int64_t kMaxDecodeBlocks = 4096;
constexpr int64_t kMaxPrefillBlocks = 1 << 30;

int64_t slot_bytes(const BatchDecodeParams& params) {
  return params.q.shape[1] *
         (params.q.shape[2] * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}

// Splits that all sequences have together at most, cut to what kMaxPartialBytes holds; 0 where none has more than one.
int64_t num_slots(const BatchDecodeParams& params) {
  const double tokens = static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(params.kv.page_size);
  if (tokens <= kSplitTokens || params.q.numel() == 0) return 0;
  const int64_t room = kMaxPartialBytes / slot_bytes(params);
  const double most = static_cast<double>(params.kv.num_sequences()) + std::floor(tokens / kSplitTokens);
  return most < static_cast<double>(room) ? static_cast<int64_t>(most) : room;
}

// The table of the last call of this thread is kept: an engine has one.
const RopeTable& rope_table(double theta, double scale, int64_t head_dim) {
  thread_local struct {
    double theta = 0, scale = 0;
    int64_t head_dim = 0;
    RopeTable table;
  } cache;
  if (cache.theta == theta && cache.scale == scale && cache.head_dim == head_dim) return cache.table;
  constexpr double kTwoPi = 6.283185307179586476925;
  for (int64_t d = 0; d < kMaxHeadDim / 2; ++d) {
    const double exponent = -2.0 * static_cast<double>(d) / static_cast<double>(head_dim);
    const double turns = d < head_dim / 2 ? std::pow(theta, exponent) / scale / kTwoPi : 0.0;
    const double fraction = turns - std::floor(turns);  // exact, below 1
    cache.table.turns[d] = static_cast<uint64_t>(std::ldexp(fraction, 64));
  }
  cache.theta = theta;
  cache.scale = scale;
  cache.head_dim = head_dim;
  return cache.table;
}

AttentionArgs make_args(const AttentionParams& p, const int32_t* qo_indptr) {
  constexpr double kLog2E = 1.442695040888963407360;
  const int64_t item = static_cast<int64_t>(dtype_size(p.q.dtype)), head_dim = p.q.shape[2];
  const PageShape shape = p.kv.page_shape(head_dim);
  const double scale = p.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  const double cap = p.logits_soft_cap;
  AttentionArgs args = {};
  args.kv_ptrs = p.kv.kv_ptrs.as<const int64_t>();
  args.kv_indptr = p.kv.kv_indptr.as<const int32_t>();
  args.last_page_offset = p.kv.last_page_offset.as<const int32_t>();
  args.qo_indptr = qo_indptr;
  args.q = p.q.data;
  args.o = p.o.data;
  args.lse = p.lse.has_value() ? p.lse.as<float>() : nullptr;
  args.num_sequences = p.kv.num_sequences();
  args.num_rows = p.q.shape[0];
  args.num_page_ptrs = p.kv.kv_ptrs.shape[0];
  args.page_size = p.kv.page_size;
  args.q_stride = p.q.stride[0];
  args.o_stride = p.o.stride[0];
  args.key_bytes = shape.head_offset(p.kv.layer_idx, KvPart::kKey, 0) * item;
  args.value_bytes = shape.head_offset(p.kv.layer_idx, KvPart::kValue, 0) * item - args.key_bytes;
  args.head_bytes = shape.page_size * head_dim * item;
  args.window_left = p.window_left;
  args.num_kv_heads = static_cast<int32_t>(p.kv.num_kv_heads);
  args.group_size = static_cast<int32_t>(p.q.shape[1] / p.kv.num_kv_heads);
  args.head_dim = static_cast<int32_t>(head_dim);
  args.head_tiles = 1;
  args.scale = static_cast<float>(cap > 0 ? scale / cap : scale * kLog2E);
  args.cap = cap > 0 ? static_cast<float>(cap * kLog2E) : 0.0f;
  return args;
}

template <Arch kArch, class T, int kDim>
Status launch_general(const Launcher& launcher, const AttentionParams& p, const AttentionArgs& args, int64_t blocks) {
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(blocks);
  shape.block.x = kAttentionThreads;
  const bool rotates = p.rope_theta.has_value() && sizeof(T) != 4;
  const SharedLayout layout(args.head_dim, static_cast<int>(sizeof(T)), tile_keys(kDim), rotates);
  shape.shared_bytes = sizeof(BlockShared) + static_cast<size_t>(layout.bytes);
  if (p.rope_theta) {
    return launcher.launch<attention_kernel<kArch, T, kDim, true>>(
        shape, args, rope_table(*p.rope_theta, p.rope_scale, args.head_dim));
  }
  return launcher.launch<attention_kernel<kArch, T, kDim, false>>(shape, args, NoRope{});
}

template <Arch kArch, class T>
Status run(const Launcher& launcher, const AttentionParams& p, const AttentionArgs& args, int64_t blocks) {
  PUNICA_RETURN_IF_ERROR(args.head_dim <= 128 ? (launch_general<kArch, T, 128>(launcher, p, args, blocks))
                                              : (launch_general<kArch, T, 256>(launcher, p, args, blocks)));
  if (args.num_slots == 0) return {};
  constexpr int64_t kHeadsABlock = kMergeThreads / 32;
  const int64_t head_blocks = std::min<int64_t>((args.num_heads() + kHeadsABlock - 1) / kHeadsABlock, 8);
  LaunchShape shape;
  const int64_t merge_blocks = args.num_sequences * head_blocks;
  if (merge_blocks > INT32_MAX) {
    return {StatusCode::kUnsupported, std::string(launcher.op()) + ": at most " +
                                          std::to_string(INT32_MAX / head_blocks) + " sequences a call, got " +
                                          std::to_string(args.num_sequences)};
  }
  shape.grid.x = static_cast<unsigned>(merge_blocks);
  shape.block.x = kMergeThreads;
  return launcher.launch<merge_kernel<kArch, T>>(shape, args, static_cast<int>(head_blocks));
}

Status attend(const Launcher& launcher, const AttentionParams& p, const AttentionArgs& args, int64_t blocks) {
  return with_type(p.q.dtype, [&](auto type) {
    using T = decltype(type);
    if (launcher.arch == Arch::kSm90) return run<Arch::kSm90, T>(launcher, p, args, blocks);
    return run<Arch::kSm80, T>(launcher, p, args, blocks);
  });
}

}  // namespace

bool decode_serves(DType dtype, int64_t head_dim) {
  return dtype != DType::kFloat32 && (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

bool decode_serves(const BatchDecodeParams& params) {
  const double limit = 0x1p31 - 2 * kSplitTokens, batch = static_cast<double>(params.kv.num_sequences());
  const double tokens = static_cast<double>(params.kv.kv_ptrs.shape[0]) * static_cast<double>(params.kv.page_size);
  const double splits = (batch + tokens / kSplitTokens) * static_cast<double>(params.q.shape[1]);
  return decode_serves(params.q.dtype, params.q.shape[2]) && tokens < limit && splits < limit &&
         static_cast<double>(params.kv.page_size) < limit;
}

Status launch_decode(const Launcher& launcher, DType dtype, const AttentionArgs& args, const RopeTable* rope) {
  return dtype == DType::kFloat16 ? launch_decode_float16(launcher, args, rope)
                                  : launch_decode_bfloat16(launcher, args, rope);
}

// What the device's path needs; enough for either where there is no such device.
int64_t workspace_bytes(const BatchPrefillParams& params) {
  Arch arch;
  if (!active_arch("batch_prefill", params.q.device.index, &arch).ok()) {
    return std::max(prefill_workspace_bytes(params), prefill_mma_workspace_bytes(params));
  }
  return serves_prefill(arch, params) ? prefill_workspace_bytes(params) : prefill_mma_workspace_bytes(params);
}

int64_t workspace_bytes(const BatchDecodeParams& params) {
  const int64_t slots = num_slots(params);
  if (slots == 0) return 0;
  return slots * slot_bytes(params) + 2 * kAlignment + kMaxDecodeWorkers * static_cast<int64_t>(sizeof(DecodePiece));
}

Status batch_prefill(const BatchPrefillParams& params, const Context& context) {
  if (params.q.numel() == 0 || params.kv.num_sequences() == 0) return {};
  const AttentionArgs args = make_args(params, params.qo_indptr.as<const int32_t>());
  return on_device("batch_prefill", params.q.device, context, [&](const Launcher& launcher) {
    const RopeTable* const rope =
        params.rope_theta ? &rope_table(*params.rope_theta, params.rope_scale, args.head_dim) : nullptr;
    if (serves_prefill(launcher.arch, params)) return launch_prefill(launcher, params, args, rope);
    if (serves_prefill_mma(params)) return launch_prefill_mma(launcher, params, args, rope);
    // Each sequence may have one tile that is not full.
    const int64_t tiles = (args.num_rows * args.group_size + kTileRows - 1) / kTileRows + args.num_sequences;
    return attend(launcher, params, args, std::min(tiles * args.num_kv_heads, kMaxPrefillBlocks));
  });
}

Status batch_decode(const BatchDecodeParams& params, const Context& context) {
  if (params.q.numel() == 0) return {};
  AttentionArgs args = make_args(params, nullptr);
  const bool fast = decode_serves(params);
  const int tile = fast ? decode_head_tile(args.group_size, args.head_dim) : kTileRows;
  args.head_tiles = (args.group_size + tile - 1) / tile;
  // Without a workspace every block takes whole sequences.
  if (params.tmpbuf.has_value()) args.num_slots = num_slots(params);
  if (args.num_slots > 0) {
    const int64_t address = reinterpret_cast<int64_t>(params.tmpbuf.data);
    args.partial_sums = reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
    args.partial_states =
        reinterpret_cast<float2*>(args.partial_sums + args.num_slots * args.num_heads() * args.head_dim);
  }
  if (fast) {
    return on_device("batch_decode", params.q.device, context, [&](const Launcher& launcher) {
      return launch_decode(
          launcher, params.q.dtype, args,
          params.rope_theta ? &rope_table(*params.rope_theta, params.rope_scale, args.head_dim) : nullptr);
    });
  }
  const int64_t items =
      std::max(args.num_slots, args.num_sequences) * args.num_kv_heads * static_cast<int64_t>(args.head_tiles);
  return on_device("batch_decode", params.q.device, context, [&](const Launcher& launcher) {
    return attend(launcher, params, args, std::min(items, kMaxDecodeBlocks));
  });
}

}  // namespace punica::cuda
