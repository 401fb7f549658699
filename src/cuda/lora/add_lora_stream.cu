#include <algorithm>
#include <cstdlib>

#include "src/cuda/lora/add_lora_stream.cuh"

namespace punica::cuda::fused_lora {
namespace {

int experiment(int digit) {
  const char* e = std::getenv("STREAM");
  if (e == nullptr) return -1;
  for (int i = 0; i <= digit; ++i) {
    if (e[i] == 0) return -1;
  }
  return e[digit] - '0';
}

int64_t max_items(const Args& args) {
  return max_tiles(args, kTileRows) * args.num_slices * (stream::kGroups << rank_tile_bits(args.max_rank));
}

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  stream::StreamArgs s = {args, static_cast<float4*>(args.workspace), static_cast<uint32_t>(max_items(args)),
                          experiment(0)};
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(launcher.num_multiprocessors() * (experiment(1) == 2 ? 2 : 1));
  shape.block = stream::kThreads;
  shape.shared_bytes = stream::kSharedBytes;
  PUNICA_RETURN_IF_ERROR((launcher.launch<stream::add_lora_shrink_kernel<Arch::kSm90, T>>(shape, s)));
  shape.grid = static_cast<unsigned>(launcher.num_multiprocessors() * (experiment(2) == 2 ? 2 : 1));
  return launcher.launch<stream::add_lora_expand_kernel<Arch::kSm90, T>>(shape, s);
}

}  // namespace

int64_t stream_workspace_bytes(const Args& args) { return max_items(args) * kFragment; }

bool is_stream(const Launcher& launcher, const Args& args) {
  if (experiment(0) < 0) return false;
  bool aligned = args.x_vectors && args.y_vectors && args.h_in % 8 == 0 && args.x_row_bytes < INT32_MAX &&
                 args.y_row_bytes < INT32_MAX;
  for (int s = 0; s <= args.num_slices; ++s) aligned = aligned && args.slice_begin[s] % 8 == 0;
  // Whatever the segments are, counts of items and chunks fit into 31 bits.
  const int64_t most = (int64_t{args.capacity} / kTileRows + 1) * args.max_segments * args.num_slices;
  return launcher.arch == Arch::kSm90 && aligned && args.max_rank <= kPlainRank && args.workspace != nullptr &&
         args.workspace_bytes >= stream_workspace_bytes(args) && most < 1 << 24 &&
         most * (args.width / 128 + 1) < int64_t{1} << 31;
}

Status launch_stream(const Launcher& launcher, DType dtype, const Args& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
