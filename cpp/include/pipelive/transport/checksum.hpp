#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pipelive {

/// CRC32C (Castagnoli) of `bytes`, continuing from `seed`, the CRC of the bytes before them (0 for
/// none): crc32c(a + b) == crc32c(b, crc32c(a)). Uses the processor's instruction where it has one,
/// decided once at run time.
[[nodiscard]] std::uint32_t crc32c(std::span<const std::byte> bytes,
                                   std::uint32_t seed = 0) noexcept;

/// The same by tables; what machines without the instruction use, and what tests compare with.
[[nodiscard]] std::uint32_t crc32c_portable(std::span<const std::byte> bytes,
                                            std::uint32_t seed = 0) noexcept;

/// Copies `source` to `target` and returns the CRC32C of what was *written*, not of what was read,
/// so that a source which changes meanwhile cannot make the two differ. The regions do not overlap.
[[nodiscard]] std::uint32_t crc32c_copy(std::byte* target, std::span<const std::byte> source,
                                        std::uint32_t seed = 0) noexcept;

/// True where crc32c() runs on the processor's instruction.
[[nodiscard]] bool crc32c_is_hardware() noexcept;

}  // namespace pipelive
