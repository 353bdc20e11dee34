#pragma once

#include <string_view>
#include <vector>

namespace pipelive {

/// The instruction sets that the attention kernels are compiled for, slowest first.
enum class Isa {
  portable,     ///< plain C++, any processor
  avx2,         ///< AVX2, FMA and F16C
  avx512,       ///< AVX-512 F, BW, DQ, VL
  avx512_bf16,  ///< the same and products of bfloat16 pairs
};

/// "portable", "avx2", "avx512" or "avx512_bf16".
[[nodiscard]] std::string_view to_string(Isa isa) noexcept;
/// The inverse of to_string. Throws Error(invalid_argument) for another name, and for an ISA that
/// this processor or build lacks; the message lists those it has.
[[nodiscard]] Isa isa_from_name(std::string_view name);
/// What this processor can run and this build contains, slowest first; never empty.
[[nodiscard]] const std::vector<Isa>& available_isas();
/// The fastest of available_isas(): the last, but on Intel's processors not avx512_bf16.
[[nodiscard]] Isa best_isa();

}  // namespace pipelive
