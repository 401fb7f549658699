#include <cuda_runtime_api.h>

#include <cstddef>

#include "src/cuda/common/host_tables.h"
#include "src/cuda/common/launch.h"

namespace punica::cuda {
namespace {

// Where the next table begins: every copy is aligned for every type.
size_t padded(const TensorView& table) {
  constexpr size_t kAlignment = alignof(std::max_align_t);
  return (static_cast<size_t>(table.numel()) * dtype_size(table.dtype) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Status HostTables::copy(const char* op, Device device, const Context& context, std::span<TensorView* const> tables,
                        bool* copied) {
  *copied = false;
  const DeviceGuard guard(device.index);
  PUNICA_RETURN_IF_ERROR(to_status(op, guard.error()));
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  PUNICA_RETURN_IF_ERROR(to_status(op, cudaStreamIsCapturing(stream, &capture)));
  if (capture != cudaStreamCaptureStatusNone) return {};

  size_t bytes = 0;
  for (const TensorView* table : tables) bytes += padded(*table);
  memory_ = std::make_unique_for_overwrite<char[]>(bytes);
  char* to = memory_.get();
  for (TensorView* table : tables) {
    const size_t size = static_cast<size_t>(table->numel()) * dtype_size(table->dtype);
    if (size > 0) {
      PUNICA_RETURN_IF_ERROR(to_status(op, cudaMemcpyAsync(to, table->data, size, cudaMemcpyDeviceToHost, stream)));
    }
    table->data = to;
    table->device = Device{};
    to += padded(*table);
  }
  PUNICA_RETURN_IF_ERROR(to_status(op, cudaStreamSynchronize(stream)));
  *copied = true;
  return {};
}

}  // namespace punica::cuda
