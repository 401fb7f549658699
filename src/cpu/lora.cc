// dispatch_bgmv and sgmv of the CPU backend: how the work is cut into tasks and how many threads take them. The
// arithmetic is in lora_kernels.cc.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>
#include <string>

#include "src/cpu/backend.h"
#include "src/cpu/lora_kernels.h"
#include "src/cpu/parallel.h"

namespace punica::cpu {
namespace {

// What one thread reaches, roughly: enough to tell work that is worth waking others from work that is not.
constexpr double kBytesPerNanosecond = 30;
constexpr double kFlopsPerNanosecond = 100;
constexpr double kTaskNanoseconds = 30;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tasks for each thread that even out what one of them loses to other processes.
constexpr int64_t kTasksPerThread = 4;

}  // namespace

Status dispatch_bgmv(const BgmvParams& params, const Context& context) {
  const int64_t batch = params.y.shape[0], h_out = params.y.shape[1], h_in = params.x.shape[1];
  if (batch == 0 || h_out == 0 || h_in == 0 || params.w_ptr.shape[0] == 0) return {};
  Isa isa;
  PUNICA_RETURN_IF_ERROR(active_isa("dispatch_bgmv", &isa));

  const auto bytes_per_output = static_cast<double>(h_in) * static_cast<double>(dtype_size(params.y.dtype));
  const double bytes_per_row = bytes_per_output * static_cast<double>(h_out);
  BgmvSplit split;
  split.num_threads = choose_num_threads(
      context, static_cast<double>(batch) * (bytes_per_row / kBytesPerNanosecond + kTaskNanoseconds));
  // Long runs of weights stream best, so rows are cut only as far as the threads need it.
  const bool many_rows = batch >= kTasksPerThread * split.num_threads;
  const double outputs = (many_rows ? 256e3 : 32e3) / bytes_per_output;
  split.outputs_per_task = split.num_threads == 1 || outputs >= static_cast<double>(h_out)
                               ? h_out
                               : round_up(std::max<int64_t>(1, static_cast<int64_t>(outputs)), 16);
  lora_kernels(isa)->bgmv[static_cast<int>(params.y.dtype)](params, split);
  return {};
}

// The workspace holds SgmvSplit::first_block, and room to align it.
int64_t sgmv_cutlass_tmp_size(int64_t num_segments) {
  return (num_segments + 1) * static_cast<int64_t>(sizeof(int64_t)) + static_cast<int64_t>(alignof(int64_t));
}

Status sgmv(const SgmvParams& params, const Context& context) {
  const int64_t num_segments = params.w_ptr.shape[0];
  const int64_t d_out = params.y.shape[1], d_in = params.x.shape[1];
  if (num_segments == 0 || params.y.shape[0] == 0 || d_out == 0 || d_in == 0) return {};
  Isa isa;
  PUNICA_RETURN_IF_ERROR(active_isa(params.weights == SgmvWeights::kInOut ? "sgmv_cutlass" : "sgmv_shrink", &isa));

  int64_t num_tokens = 0, num_used = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    const Segment segment = sgmv_segment(params, i);
    num_tokens += segment.end - segment.begin;
    num_used += segment.end > segment.begin;
  }
  if (num_tokens == 0) return {};

  int64_t stack_blocks[65];
  std::unique_ptr<int64_t[]> heap_blocks;
  int64_t* first_block = stack_blocks;
  if (num_segments + 1 > static_cast<int64_t>(std::size(stack_blocks))) {
    void* tmp = params.tmp.data;
    size_t space = params.tmp.has_value() && tmp != nullptr ? static_cast<size_t>(params.tmp.numel()) : 0;
    const size_t needed = static_cast<size_t>(num_segments + 1) * sizeof(int64_t);
    if (space > 0 && std::align(alignof(int64_t), needed, tmp, space) != nullptr) {
      first_block = static_cast<int64_t*>(tmp);
    } else {
      heap_blocks.reset(new (std::nothrow) int64_t[static_cast<size_t>(num_segments + 1)]);
      if (heap_blocks == nullptr) {
        return {StatusCode::kOutOfMemory, "sgmv: cannot allocate " + std::to_string(needed) + " bytes of workspace"};
      }
      first_block = heap_blocks.get();
    }
  }

  const auto element_size = static_cast<double>(dtype_size(params.y.dtype));
  const auto tokens = static_cast<double>(num_tokens), inputs = static_cast<double>(d_in),
             outputs = static_cast<double>(d_out);
  const double bytes =
      element_size * (tokens * (inputs + 2 * outputs) + static_cast<double>(num_used) * inputs * outputs);
  const double flops = 2 * tokens * inputs * outputs;
  SgmvSplit split;
  split.num_threads = choose_num_threads(context, bytes / kBytesPerNanosecond + flops / kFlopsPerNanosecond +
                                                      static_cast<double>(num_used) * kTaskNanoseconds);
  // Where outputs are lanes, whole rows of y while there are enough of them: threads that write neighbouring columns of
  // the same rows fetch each other's lines ahead, and where they share no cache all of these are then moved back
  // (measured: 2.5 times as slow).
  const bool outer = sgmv_lanes_are_outputs(params);
  split.outputs_per_task = outer ? round_up(d_out, kOuterOutputsPerTask) : kDotOutputsPerTask;
  split.tokens_per_task = kMaxTokensPerTask;
  // Many tokens a task use its weights often; fewer only where threads would stay idle.
  const int64_t blocks_wanted =
      split.num_threads == 1 ? 1
                             : ceil_div(kTasksPerThread * split.num_threads, ceil_div(d_out, split.outputs_per_task));
  for (;;) {
    first_block[0] = 0;
    for (int64_t i = 0; i < num_segments; ++i) {
      const Segment segment = sgmv_segment(params, i);
      first_block[i + 1] = first_block[i] + ceil_div(segment.end - segment.begin, split.tokens_per_task);
    }
    if (first_block[num_segments] >= blocks_wanted || split.tokens_per_task <= 16) break;
    split.tokens_per_task /= 2;
  }
  if (outer) {
    const int64_t strips = ceil_div(blocks_wanted, first_block[num_segments]);
    split.outputs_per_task = round_up(ceil_div(d_out, strips), kOuterOutputsPerTask);
  }
  split.first_block = first_block;

  const LoraKernels* kernels = lora_kernels(isa);
  const auto& run = params.weights == SgmvWeights::kOutIn ? kernels->sgmv_out_in : kernels->sgmv_in_out;
  run[static_cast<int>(params.y.dtype)](params, split);
  return {};
}

}  // namespace punica::cpu
