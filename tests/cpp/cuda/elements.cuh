// What bgmv_test.cu and add_lora_tester.cuh share: counts of checks and failures, a CUDA call that must succeed, random
// elements of any type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "punica/cuda.h"

namespace {

using punica::DType;

int g_checks = 0, g_failures = 0;
bool g_small = false;  // few and small cases, for compute-sanitizer
std::string g_case;

void fail(const std::string& what) {
  if (++g_failures <= 60) std::printf("FAILED %s\n", what.c_str());
}

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: CUDA: %s\n", g_case.c_str(), cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;

// Random elements are made as 24 pseudo-random bits, so that even large weights take little time.
struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
  }
  float value() { return (static_cast<float>(next() >> 8) / 8388608.0f - 1.0f) * 1.5f; }
};

template <class T>
T from(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

float value(float v) { return v; }
float value(__half v) { return __half2float(v); }
float value(__nv_bfloat16 v) { return __bfloat162float(v); }

}  // namespace
