#pragma once

#include "../../src/attention/kernels.hpp"

namespace pipelive::testing {

/// The kernels for processors with products of bfloat16 pairs, with that one instruction written
/// out for plain AVX-512, so that all around it is tested on processors that lack it. Null where
/// the compiler has no AVX-512.
[[nodiscard]] const attention_detail::Kernels* emulated_bf16_kernels() noexcept;

}  // namespace pipelive::testing
