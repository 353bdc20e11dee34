#include "pipelive/attention/isa.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "dispatch.hpp"
#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  // Of clang, __builtin_cpu_supports knows it in its later releases only.
  const auto has_f16c = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  };
  const auto has_avx2 = [&] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  };
  const auto has_avx512 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  };
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return has_avx2();
    case Isa::avx512:
      return has_avx2() && has_avx512();
    case Isa::avx512_bf16:
      return has_avx2() && has_avx512() && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

bool made_by_intel() noexcept {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

const attention_detail::Kernels* compiled(Isa isa) noexcept {
  switch (isa) {
    case Isa::portable:
      return attention_detail::portable_kernels();
    case Isa::avx2:
      return attention_detail::avx2_kernels();
    case Isa::avx512:
      return attention_detail::avx512_kernels();
    case Isa::avx512_bf16:
      return attention_detail::avx512_bf16_kernels();
  }
  return nullptr;
}

constexpr std::array kAll{Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

[[noreturn]] void refuse_isa(std::string_view name) {
  std::string known;
  for (const Isa isa : available_isas()) {
    known += known.empty() ? "" : ", ";
    known += to_string(isa);
  }
  throw Error(ErrorCode::invalid_argument,
              "isa is \"" + std::string(name) + "\", expected one of: " + known);
}

}  // namespace

std::string_view to_string(Isa isa) noexcept {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
    for (const Isa isa : kAll) {
      if (processor_has(isa) && compiled(isa) != nullptr) isas.push_back(isa);
    }
    return isas;
  }();
  return found;
}

Isa best_isa() {
  static const Isa best = [] {
    const Isa last = available_isas().back();
    // Intel's cores multiply pairs of bfloat16 at a rate that does not pay for what it takes to
    // bring them together (docs/benchmarks/README.md).
    return last == Isa::avx512_bf16 && made_by_intel() ? Isa::avx512 : last;
  }();
  return best;
}

Isa isa_from_name(std::string_view name) {
  for (const Isa isa : available_isas()) {
    if (to_string(isa) == name) return isa;
  }
  refuse_isa(name);
}

namespace attention_detail {

const Kernels& kernels_of(std::optional<Isa> isa) {
  const Isa chosen = isa.value_or(best_isa());
  if (std::ranges::find(available_isas(), chosen) == available_isas().end()) {
    refuse_isa(to_string(chosen));
  }
  return *compiled(chosen);
}

}  // namespace attention_detail
}  // namespace pipelive
