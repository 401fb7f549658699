// rms_norm: two passes over a row, the second from cache.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/cpu/backend.h"
#include "src/cpu/isa.h"
#include "src/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/norm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/simd-inl.h"

#ifndef PUNICA_CPU_NORM_ONCE
#define PUNICA_CPU_NORM_ONCE
namespace punica::cpu {

struct NormKernels {
  using Run = void (*)(const RmsNormParams& params, int num_threads, int64_t rows_per_task);
  Run float16, bfloat16, float32;
};

}  // namespace punica::cpu
#endif  // PUNICA_CPU_NORM_ONCE

HWY_BEFORE_NAMESPACE();
namespace punica::cpu {
namespace HWY_NAMESPACE {
namespace {

// Elements whose squares are summed in float32 before the sum goes into a double: keeps the error of very long rows
// that of short ones.
inline constexpr int64_t kSumBlock = 4096;

// The vector at column c of the row to normalise, n of whose lanes are columns (all where kFull). Updates the residual.
template <bool kFull, class T>
HWY_INLINE VF load_input(const T* input, T* residual, int64_t c, int64_t n) {
  VF x = kFull ? load(input + c) : load_n(input + c, n);
  if (residual == nullptr) return x;
  x = hn::Add(x, kFull ? load(residual + c) : load_n(residual + c, n));
  // What is normalised is the rounded sum.
  if (kFull) {
    store(x, residual + c);
    return load(residual + c);
  }
  store_n(x, residual + c, n);
  return load_n(residual + c, n);
}

template <class T>
HWY_INLINE void rms_norm_row(T* output, const T* input, const T* weight, T* residual, int64_t columns, float epsilon) {
  double sum = 0;
  int64_t c = 0;
  while (c + kLanes <= columns) {
    const int64_t block_end = std::min(columns, c + kSumBlock);
    VF s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (; c + 4 * kLanes <= block_end; c += 4 * kLanes) {
      const VF x0 = load_input<true>(input, residual, c, kLanes);
      const VF x1 = load_input<true>(input, residual, c + kLanes, kLanes);
      const VF x2 = load_input<true>(input, residual, c + 2 * kLanes, kLanes);
      const VF x3 = load_input<true>(input, residual, c + 3 * kLanes, kLanes);
      s0 = hn::MulAdd(x0, x0, s0);
      s1 = hn::MulAdd(x1, x1, s1);
      s2 = hn::MulAdd(x2, x2, s2);
      s3 = hn::MulAdd(x3, x3, s3);
    }
    for (; c + kLanes <= block_end; c += kLanes) {
      const VF x = load_input<true>(input, residual, c, kLanes);
      s0 = hn::MulAdd(x, x, s0);
    }
    sum += sum_lanes(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
  }
  if (c < columns) {
    const VF x = load_input<false>(input, residual, c, columns - c);
    sum += sum_lanes(hn::Mul(x, x));
  }

  const T* x = residual == nullptr ? input : residual;
  const double mean = sum / static_cast<double>(columns);
  const VF scale = broadcast(static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(epsilon))));
  for (c = 0; c + kLanes <= columns; c += kLanes) {
    store(hn::Mul(hn::Mul(load(x + c), scale), load(weight + c)), output + c);
  }
  if (const int64_t n = columns - c; n > 0) {
    store_n(hn::Mul(hn::Mul(load_n(x + c, n), scale), load_n(weight + c, n)), output + c, n);
  }
}

template <class T>
void rms_norm_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* residual = params.residual.has_value() ? params.residual.as<T>() + row * params.residual.stride[0] : nullptr;
    rms_norm_row(params.output.as<T>() + row * params.output.stride[0],
                 params.input.as<const T>() + row * params.input.stride[0], params.weight.as<const T>(), residual,
                 params.input.shape[1], params.epsilon);
  }
}

template <class T, bool kNativeBf16>
void run(const RmsNormParams& params, int num_threads, int64_t rows_per_task) {
  PUNICA_RECORD_ISA(kNativeBf16);
  const int64_t rows = params.input.shape[0];
  parallel_for(num_threads, (rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    rms_norm_rows<T>(params, begin, std::min(rows, begin + rows_per_task));
  });
}

template <bool kNativeBf16>
const NormKernels* norm_kernels() {
  static constexpr NormKernels table = {run<float16_t, kNativeBf16>, run<bfloat16_t, kNativeBf16>,
                                        run<float, kNativeBf16>};
  return &table;
}

const NormKernels* kernels() { return norm_kernels<false>(); }
#if HWY_TARGET == HWY_AVX3
const NormKernels* kernels_bf16() { return norm_kernels<true>(); }
#endif

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace punica::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace punica::cpu {

Status rms_norm(const RmsNormParams& params, const Context& context) {
  const int64_t rows = params.input.shape[0], columns = params.input.shape[1];
  if (rows == 0 || columns == 0) return {};
  Isa isa;
  PUNICA_RETURN_IF_ERROR(active_isa("rms_norm", &isa));
  const NormKernels* kernels = PUNICA_SELECT_KERNELS(isa);
  // Measured on one core with AVX-512 : about 0.2 ns an element.
  const int num_threads = choose_num_threads(context, 0.2 * static_cast<double>(rows) * static_cast<double>(columns));
  const int64_t rows_per_task = std::max<int64_t>(1, 16384 / columns);
  switch (params.input.dtype) {
    case DType::kFloat16:
      kernels->float16(params, num_threads, rows_per_task);
      return {};
    case DType::kBFloat16:
      kernels->bfloat16(params, num_threads, rows_per_task);
      return {};
    case DType::kFloat32:
      kernels->float32(params, num_threads, rows_per_task);
      return {};
    default:
      return {StatusCode::kInternal, "rms_norm: dtype not validated"};
  }
}

}  // namespace punica::cpu
#endif  // HWY_ONCE
