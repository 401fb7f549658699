#include <algorithm>
#include <cstdlib>

#include "src/cuda/lora/add_lora_stream.cuh"

namespace punica::cuda::fused_lora {
namespace {

template <class T>
Status launch(const Launcher& launcher, const Args& args) {
  LaunchShape shape;
  shape.cluster = stream::kBlocks;
  shape.grid = static_cast<unsigned>(std::max(launcher.num_multiprocessors() / stream::kBlocks, 1) * stream::kBlocks);
  shape.block = stream::kThreads;
  shape.shared_bytes = stream::kSharedBytes;
  return launcher.launch<stream::add_lora_stream_kernel<Arch::kSm90, T>>(shape, args);
}

}  // namespace

bool is_stream(const Launcher& launcher, const Args& args) {
  static const int mode = std::getenv("STREAM") == nullptr ? 0 : std::atoi(std::getenv("STREAM"));
  static int calls = 0;
  if (mode == 0 || (mode == 2 && calls++ % 2 == 0)) return false;
  bool aligned = args.x_vectors && args.y_vectors && args.h_in % 8 == 0 && args.x_row_bytes < INT32_MAX &&
                 args.y_row_bytes < INT32_MAX;
  for (int s = 0; s <= args.num_slices; ++s) aligned = aligned && args.slice_begin[s] % 8 == 0;
  // Whatever the segments are, the sum of all weights fits into 31 bits.
  const int64_t tiles = (int64_t{args.capacity} / kTileRows + 1) * args.max_segments * args.num_slices;
  return launcher.arch == Arch::kSm90 && aligned && args.max_rank <= kPlainRank && tiles < 1 << 24 &&
         tiles * (32 * int64_t{args.leaf_pieces} + args.width / 128 + 1) < int64_t{1} << 31;
}

Status launch_stream(const Launcher& launcher, DType dtype, const Args& args) {
  return dtype == DType::kFloat16 ? launch<__half>(launcher, args) : launch<__nv_bfloat16>(launcher, args);
}

}  // namespace punica::cuda::fused_lora
