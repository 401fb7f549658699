// sgmv_shrink and sgmv_cutlass on CUDA devices: y += x @ W_i for the rows of each segment i.
//
// Blocks work on tiles of 64 rows, or of 16 where segments are short, of one segment. Which segment that is they find
// out on the device, from s_start and s_end (sgmv_tile.cuh), so that the host needs to know nothing and a graph may be
// replayed with other segments. The kernels share that. Which arithmetic there is is a function of the type, of d_in
// and d_out and of the path, so that the bits of a row never depend on its segment; sgmv_ring.cu, chosen by the number
// of rows and alignment too, has that of the two it stands in for.
#include "src/cuda/backend.h"
#include "src/cuda/lora/sgmv.h"

namespace punica::cuda {
namespace {

// From here on the sum is long enough to share among warps and blocks.
constexpr int64_t kDeepIn = 256;
constexpr int64_t kDeepOut = 512;
// Up to here the sums are small.
constexpr int64_t kStreamOut = 16;
// Up to here the weights of a product are in registers.
constexpr int64_t kExpandIn = 16;
// From here on, on sm_90, products of warpgroups pay.
constexpr int64_t kWideIn = 129;

bool is_deep(int64_t d_in, int64_t d_out) { return d_in >= kDeepIn && d_out <= kDeepOut && d_in > d_out; }

bool rows_aligned(const TensorView& view) {
  const int64_t item = static_cast<int64_t>(dtype_size(view.dtype));
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (view.shape[0] <= 1 || view.stride[0] * item % 16 == 0);
}

}  // namespace

int64_t sgmv_cutlass_tmp_size(int64_t /*num_segments*/) { return 0; }

Status sgmv(const SgmvParams& params, const Context& context) {
  const char* op = params.weights == SgmvWeights::kOutIn ? "sgmv_shrink" : "sgmv_cutlass";
  SgmvArgs args = {};
  args.y = params.y.data;
  args.x = params.x.data;
  args.w_ptr = params.w_ptr.as<const int64_t>();
  args.s_start = params.s_start.as<const int32_t>();
  args.s_end = params.s_end.as<const int32_t>();
  args.y_stride = params.y.stride[0];
  args.x_stride = params.x.stride[0];
  args.rows = params.y.shape[0];
  args.d_in = params.x.shape[1];
  args.d_out = params.y.shape[1];
  args.w_offset = params.layer_idx * args.d_in * args.d_out;
  args.num_segments = params.w_ptr.shape[0];
  args.y_aligned = rows_aligned(params.y);
  args.x_aligned = rows_aligned(params.x);
  args.early_reads = context.early_reads;
  if (args.num_segments == 0 || args.rows == 0 || args.d_in == 0 || args.d_out == 0) return {};
  return on_device(op, params.y.device, context, [&](const Launcher& launcher) {
    if (params.y.dtype == DType::kFloat32) return launch_sgmv_float(launcher, params.weights, args);
    if (is_deep(args.d_in, args.d_out) && launcher.arch == Arch::kSm90) {
      const bool out_in = params.weights == SgmvWeights::kOutIn;
      if (args.d_out > kStreamOut) {
        return out_in ? launch_sgmv_shrink_out_in(launcher, params.y.dtype, args)
                      : launch_sgmv_shrink_in_out(launcher, params.y.dtype, args);
      }
      if (out_in) {
        if (is_sgmv_split(args)) return launch_sgmv_split(launcher, params.y.dtype, args);
        if (is_sgmv_rows(args)) return launch_sgmv_rows(launcher, params.y.dtype, args);
        if (is_sgmv_short(args)) return launch_sgmv_short(launcher, params.y.dtype, args);
        return launch_sgmv_stream(launcher, params.y.dtype, args);
      }
    }
    if (is_deep(args.d_in, args.d_out)) return launch_sgmv_deep(launcher, params.weights, params.y.dtype, args);
    if (is_sgmv_ring(launcher, args)) return launch_sgmv_ring(launcher, params.weights, params.y.dtype, args);
    if (args.d_in <= kExpandIn) return launch_sgmv_expand(launcher, params.weights, params.y.dtype, args);
    if (launcher.arch == Arch::kSm90 && args.d_in >= kWideIn) {
      if (is_sgmv_broad(params.weights, args)) {
        return launch_sgmv_broad(launcher, params.weights, params.y.dtype, args);
      }
      return launch_sgmv_wide_wgmma(launcher, params.weights, params.y.dtype, args);
    }
    return launch_sgmv_wide(launcher, params.weights, params.y.dtype, args);
  });
}

}  // namespace punica::cuda
