#include "src/cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>
#include <string_view>

namespace punica::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kNeon};

thread_local const char* t_last_isa = nullptr;

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know this one. It needs no register state beyond AVX's.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the registers.
bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2") && has_f16c();
    case Isa::kAvx512:
      return is_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    case Isa::kAvx512Bf16:
      return is_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kNeon:
      return false;
  }
  return false;
#elif defined(__aarch64__)
  return isa == Isa::kNeon;
#else
  return isa == Isa::kBaseline;
#endif
}

struct Choice {
  Isa isa = Isa::kBaseline;
  std::string error;  // without the name of the operation; empty: none
};

Choice choose() {
  Choice choice;
  for (const Isa isa : kAll) {
    if (is_supported(isa)) choice.isa = isa;  // kAll goes from the slowest to the fastest
  }
  const char* forced = std::getenv("PUNICA_ISA");
  if (forced == nullptr || *forced == '\0') return choice;
  for (const Isa isa : kAll) {
    if (std::string_view(forced) == isa_name(isa) && is_supported(isa)) {
      choice.isa = isa;
      return choice;
    }
  }
  choice.error =
      "the environment variable PUNICA_ISA must be one of " + supported_isas() + " on this CPU, got '" + forced + "'";
  return choice;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kNeon:
      return "neon";
  }
  return "unknown";
}

std::string supported_isas() {
  std::string names;
  for (const Isa isa : kAll) {
    if (is_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Status active_isa(const char* op, Isa* isa) {
  static const Choice choice = choose();
  *isa = choice.isa;
  if (choice.error.empty()) return {};
  return {StatusCode::kUnsupported, std::string(op) + ": " + choice.error};
}

Status active_isa(Isa* isa) { return active_isa("active_isa", isa); }

const char* last_isa() { return t_last_isa; }

void record_isa(const char* name) { t_last_isa = name; }

}  // namespace punica::cpu
