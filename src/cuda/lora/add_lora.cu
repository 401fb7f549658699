// add_lora on CUDA devices: y += scale * B (A x), every row through its own adapter at its own rank, in one launch.
#include <algorithm>
#include <string>

#include "src/cuda/backend.h"
#include "src/cuda/lora/add_lora.cuh"

namespace punica::cuda {
namespace {

// log2 of the blocks that share a tile of add_lora_ring.cuh. Nothing that depends on it changes bits.
int team_bits(const Launcher& launcher, const fused_lora::Args& args) {
  if (launcher.arch == Arch::kSm80) return 0;
  const int64_t teams = fused_lora::max_tiles(args, fused_lora::kTileRows) * args.num_slices;
  return teams <= 32 ? 3 : teams < 128 || args.max_rank > 16 || args.num_slices == 1 ? 2 : 1;
}

// The most, where the device finds fewer tiles than there might be: eight, but for grids that take the multiprocessors
// more than one turn, which start faster in small clusters, and for larger ranks, whose sums of eight blocks would take
// the room of a third block.
int max_team_bits(const Launcher& launcher, const fused_lora::Args& args) {
  if (launcher.arch == Arch::kSm80) return 0;
  const int64_t teams = fused_lora::max_tiles(args, fused_lora::kTileRows) * args.num_slices;
  const bool many = teams << args.team_bits > 4 * launcher.num_multiprocessors();
  return args.max_rank > 16 || many ? args.team_bits : fused_lora::kMaxTeamBits;
}

}  // namespace

Status add_lora(const AddLoraParams& p, const Context& context) {
  constexpr int64_t kMaxWidth = int64_t{1} << 30;
  if (p.x.shape[1] > kMaxWidth || p.y.shape[1] > kMaxWidth) {
    return {StatusCode::kUnsupported, "add_lora: on CUDA h_in and the width of y must be at most 1073741824"};
  }
  if (p.max_rank > kMaxLoraRank) {
    return {StatusCode::kUnsupported, "add_lora: on CUDA max_rank must be at most " + std::to_string(kMaxLoraRank) +
                                          ", got " + std::to_string(p.max_rank)};
  }
  if (p.y.shape[0] >= int64_t{1} << 27) {
    return {StatusCode::kUnsupported, "add_lora: on CUDA there may be at most 134217727 rows"};
  }
  const int64_t item = static_cast<int64_t>(dtype_size(p.y.dtype));
  const auto rows_aligned = [&](const TensorView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (view.shape[0] <= 1 || view.stride[0] * item % 16 == 0);
  };
  fused_lora::Args args = {};
  args.y = p.y.data;
  args.x = p.x.data;
  args.a_ptr = p.a_ptr.as<const int64_t>();
  args.b_ptr = p.b_ptr.as<const int64_t>();
  args.ranks = p.ranks.as<const int32_t>();
  args.scales = p.scales.as<const float>();
  args.order = p.batch.order.as<const int32_t>();
  args.segment_adapter = p.batch.segment_adapter.as<const int32_t>();
  args.segment_start = p.batch.segment_start.as<const int32_t>();
  args.y_stride = p.y.stride[0];
  args.x_stride = p.x.stride[0];
  args.rank_stride = p.rank_stride();
  args.scale_stride = p.scale_stride();
  args.num_adapters = p.num_adapters();
  args.rows = p.y.shape[0];
  args.layer_idx = p.layer_idx;
  args.a_layer_stride = p.a_layer_stride.value_or(-1);
  args.b_layer_stride = p.b_layer_stride.value_or(-1);
  args.b_row_stride = p.b_row_stride.value_or(-1);
  args.capacity = static_cast<int>(std::min<int64_t>(p.batch.order.shape[0], INT32_MAX));
  args.max_segments = static_cast<int>(std::min<int64_t>(p.max_segments(), INT32_MAX));
  args.h_in = static_cast<int>(p.x.shape[1]);
  args.max_rank = static_cast<int>(p.max_rank);
  args.num_slices = p.num_slices();
  args.leaf_pieces = (args.h_in + 4095) / 4096;
  args.a_of_rank = p.a_layer_stride ? 0 : args.layer_idx * args.h_in;
  args.a_offset = p.a_layer_stride ? args.layer_idx * *p.a_layer_stride : 0;
  args.b_of_size = p.b_layer_stride ? 0 : args.layer_idx;
  args.b_offset = p.b_layer_stride ? args.layer_idx * *p.b_layer_stride : 0;
  for (int s = 0; s <= args.num_slices; ++s) args.slice_begin[s] = static_cast<int>(p.slice_offsets[s]);
  args.x_row_bytes = static_cast<int>(std::min<int64_t>(args.x_stride * item, INT32_MAX));
  args.y_row_bytes = static_cast<int>(std::min<int64_t>(args.y_stride * item, INT32_MAX));
  args.width = static_cast<int>(p.y.shape[1]);
  args.rows_32 = static_cast<int>(args.rows);
  args.num_adapters_32 = static_cast<int>(std::min<int64_t>(args.num_adapters, INT32_MAX));
  args.early_reads = context.early_reads;
  args.x_vectors = rows_aligned(p.x);
  args.y_vectors = rows_aligned(p.y);
  if (args.rows == 0 || args.h_in == 0 || args.max_segments == 0 || args.num_adapters == 0 ||
      args.slice_begin[args.num_slices] == args.slice_begin[0]) {
    return {};
  }
  return on_device("add_lora", p.y.device, context, [&](const Launcher& launcher) {
    if (p.y.dtype == DType::kFloat32) return fused_lora::launch_float32(launcher, args);
    if (fused_lora::is_tiles(launcher, args)) return fused_lora::launch_tiles(launcher, p.y.dtype, args);
    args.team_bits = team_bits(launcher, args);
    args.max_team_bits = max_team_bits(launcher, args);
    args.few_blocks = static_cast<uint32_t>(launcher.num_multiprocessors() / args.num_slices);
    return p.y.dtype == DType::kFloat16 ? fused_lora::launch_ring_float16(launcher, args)
                                        : fused_lora::launch_ring_bfloat16(launcher, args);
  });
}

}  // namespace punica::cuda
