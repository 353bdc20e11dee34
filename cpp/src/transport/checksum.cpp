#include "pipelive/transport/checksum.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace pipelive {
namespace {

// The polynomial with its bits reversed, as CRC32C is defined: bit 31 is the coefficient of x^0.
constexpr std::uint32_t kPolynomial = 0x82F63B78U;

// a * b modulo the polynomial.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000U; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b & 1U) != 0 ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// x^(8 * bytes) modulo the polynomial: multiplying a CRC by it appends that many zero bytes.
constexpr std::uint32_t power_of_bytes(std::size_t bytes) {
  std::uint32_t result = 0x80000000U;       // 1
  std::uint32_t square = 0x80000000U >> 8;  // x^8
  for (; bytes != 0; bytes >>= 1) {
    if ((bytes & 1U) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][v]: what the byte v does to the CRC when k more bytes follow it.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t v = 0; v < 256; ++v) {
    std::uint32_t crc = v;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) != 0 ? (crc >> 1) ^ kPolynomial : crc >> 1;
    tables[0][v] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::uint32_t v = 0; v < 256; ++v) {
      const std::uint32_t before = tables[k - 1][v];
      tables[k][v] = (before >> 8) ^ tables[0][before & 0xFFU];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load64(const std::byte* at) noexcept {
  std::uint64_t value = 0;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::uint32_t portable(const std::byte* at, std::size_t size, std::uint32_t crc) noexcept {
  for (; size >= 8; at += 8, size -= 8) {
    const std::uint64_t word = load64(at) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xFFU];
  }
  for (; size != 0; ++at, --size) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ std::to_integer<std::uint32_t>(*at)) & 0xFFU];
  }
  return crc;
}

#if defined(__x86_64__)

// The instruction has a latency of three cycles and a throughput of one, so three independent
// streams keep it busy. A stream's CRC is joined to the next by appending zero bytes to it, with a
// table per byte of the CRC.
template <std::size_t kStream>
struct Join {
  std::array<std::array<std::uint32_t, 256>, 4> table{};

  constexpr Join() {
    const std::uint32_t power = power_of_bytes(kStream);
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::uint32_t bit = 0; bit < 8; ++bit) {
        table[k][std::size_t{1} << bit] = multiply(1U << (8 * k + bit), power);
      }
      for (std::size_t v = 1; v < 256; ++v) {
        const std::size_t low = v & (~v + 1);
        table[k][v] = table[k][v ^ low] ^ table[k][low];
      }
    }
  }

  [[nodiscard]] std::uint32_t operator()(std::uint32_t crc) const noexcept {
    return table[0][crc & 0xFFU] ^ table[1][(crc >> 8) & 0xFFU] ^ table[2][(crc >> 16) & 0xFFU] ^
           table[3][crc >> 24];
  }
};

constexpr std::size_t kLong = 4096;
constexpr std::size_t kShort = 256;
constexpr Join<kLong> kJoinLong;
constexpr Join<kShort> kJoinShort;

template <std::size_t kStream>
__attribute__((target("sse4.2"))) std::uint32_t three_streams(const std::byte*& at,
                                                              std::size_t& size,
                                                              const Join<kStream>& join,
                                                              std::uint32_t crc) noexcept {
  while (size >= 3 * kStream) {
    std::uint64_t a = crc;
    std::uint64_t b = 0;
    std::uint64_t c = 0;
    for (std::size_t i = 0; i < kStream; i += 8) {
      a = _mm_crc32_u64(a, load64(at + i));
      b = _mm_crc32_u64(b, load64(at + kStream + i));
      c = _mm_crc32_u64(c, load64(at + 2 * kStream + i));
    }
    const std::uint32_t ab = join(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
    crc = join(ab) ^ static_cast<std::uint32_t>(c);
    at += 3 * kStream;
    size -= 3 * kStream;
  }
  return crc;
}

__attribute__((target("sse4.2"))) std::uint32_t hardware(const std::byte* at, std::size_t size,
                                                         std::uint32_t crc) noexcept {
  crc = three_streams<kLong>(at, size, kJoinLong, crc);
  crc = three_streams<kShort>(at, size, kJoinShort, crc);
  std::uint64_t wide = crc;
  for (; size >= 8; at += 8, size -= 8) wide = _mm_crc32_u64(wide, load64(at));
  crc = static_cast<std::uint32_t>(wide);
  for (; size != 0; ++at, --size) {
    crc = _mm_crc32_u8(crc, std::to_integer<std::uint8_t>(*at));
  }
  return crc;
}

#endif

using Update = std::uint32_t (*)(const std::byte*, std::size_t, std::uint32_t) noexcept;

Update choose() noexcept {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2") != 0) return hardware;
#endif
  return portable;
}

Update update() noexcept {
  static const Update chosen = choose();
  return chosen;
}

}  // namespace

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t seed) noexcept {
  return ~update()(bytes.data(), bytes.size(), ~seed);
}

std::uint32_t crc32c_portable(std::span<const std::byte> bytes, std::uint32_t seed) noexcept {
  return ~portable(bytes.data(), bytes.size(), ~seed);
}

std::uint32_t crc32c_copy(std::byte* target, std::span<const std::byte> source,
                          std::uint32_t seed) noexcept {
  // Small enough that what was just written is still in the first-level cache when it is read back.
  constexpr std::size_t kPiece = 3 * 4096;
  const Update function = update();
  std::uint32_t crc = ~seed;
  for (std::size_t done = 0; done < source.size();) {
    const std::size_t piece = std::min(kPiece, source.size() - done);
    std::memcpy(target + done, source.data() + done, piece);
    crc = function(target + done, piece, crc);
    done += piece;
  }
  return ~crc;
}

bool crc32c_is_hardware() noexcept {
  return update() != static_cast<Update>(portable);
}

}  // namespace pipelive
