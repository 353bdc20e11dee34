#pragma once

#include "pipelive/cuda/portable.hpp"

/// CRC32C on the device: pieces are summed in parallel and joined. In the notation of polynomials
/// over bits, the sum of bytes without start and end value is linear: that of a row of words is the
/// sum of word_j * x^(32 * words from j on), so words may be taken in any order.
namespace pipelive::cuda {

/// The polynomial with its bits reversed: bit 31 is the coefficient of x^0.
inline constexpr u32 kCrcPolynomial = 0x82F63B78U;

/// a * b modulo the polynomial.
PIPELIVE_HD constexpr u32 crc_multiply(u32 a, u32 b) {
  u32 product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    product ^= b & (0U - ((a >> bit) & 1U));
    b = (b >> 1) ^ (kCrcPolynomial & (0U - (b & 1U)));
  }
  return product;
}

/// x^(8 * bytes) modulo the polynomial: multiplying a sum by it appends that many zero bytes.
PIPELIVE_HD constexpr u32 crc_power(u64 bytes) {
  u32 result = 0x80000000U;       // 1
  u32 square = 0x80000000U >> 8;  // x^8
  for (; bytes != 0; bytes >>= 1) {
    if ((bytes & 1U) != 0) result = crc_multiply(result, square);
    square = crc_multiply(square, square);
  }
  return result;
}

inline constexpr u32 kCrcThreads = 256;
inline constexpr u32 kCrcColumns = 4;                            ///< words of a thread in a row
inline constexpr u32 kCrcRowWords = kCrcThreads * kCrcColumns;   ///< 1,024
inline constexpr u32 kCrcRowBytes = kCrcRowWords * sizeof(u32);  ///< 4 KiB

/// What the kernel needs ready: the host fills it once.
struct CrcTables {
  u32 fold[4][256];          ///< byte k of a sum, times x^(8 * kCrcRowBytes)
  u32 weight[kCrcRowWords];  ///< x^(32 * (kCrcRowWords - j)) for word j of a row
};

/// Fills the tables; takes the host some tens of microseconds.
inline void fill_crc_tables(CrcTables& tables) {
  const u32 row = crc_power(kCrcRowBytes);
  for (u32 k = 0; k < 4; ++k) {
    for (u32 v = 0; v < 256; ++v) tables.fold[k][v] = crc_multiply(v << (8 * k), row);
  }
  const u32 word = crc_power(sizeof(u32));
  u32 power = word;
  for (u32 j = kCrcRowWords; j-- > 0; power = crc_multiply(power, word)) tables.weight[j] = power;
}

/// The sum, one row further.
PIPELIVE_HD u32 crc_next_row(const u32 (*fold)[256], u32 sum) {
  return fold[0][sum & 0xFFU] ^ fold[1][(sum >> 8) & 0xFFU] ^ fold[2][(sum >> 16) & 0xFFU] ^
         fold[3][sum >> 24];
}

/// One call of the kernel: sums of tiles of `rows` rows. Tiles are laid from the end of the bytes,
/// so that only the first is short: zeros before the bytes do not change a sum.
struct CrcArgs {
  u64 bytes;     ///< address
  u64 size;      ///< in bytes, at least 1
  u64 tables;    ///< CrcTables
  u64 sums;      ///< u32[tiles]
  u32 rows;      ///< of a tile
  u32 tiles;     ///< size / (rows * kCrcRowBytes), rounded up
  u32 by_words;  ///< 1 where address and size are multiples of 16
  u32 padding;
};

/// Zero bytes in front of the first tile's.
PIPELIVE_HD u64 crc_padding(const CrcArgs& args) {
  return static_cast<u64>(args.tiles) * args.rows * kCrcRowBytes - args.size;
}

/// The sum of what one thread takes of a tile: a column of words in every row, weighted by its
/// place. The tile's sum is the sum (exclusive or) over its threads.
PIPELIVE_HD u32 crc_of_thread(const CrcArgs& args, const u32 (*fold)[256], u32 tile, u32 thread) {
  const u64 padding = crc_padding(args);
  u64 at = static_cast<u64>(tile) * args.rows * kCrcRowBytes + thread * kCrcColumns * sizeof(u32);
  u32 sum[kCrcColumns] = {0, 0, 0, 0};
  for (u32 row = 0; row < args.rows; ++row, at += kCrcRowBytes) {
    u32 word[kCrcColumns] = {0, 0, 0, 0};
    if (args.by_words != 0) {
      if (at >= padding) {  // a multiple of 16, as `at` is
        const u32* from = at_address<const u32>(args.bytes + (at - padding));
        struct alignas(16) Quad {
          u32 x, y, z, w;
        };
        const Quad quad = *reinterpret_cast<const Quad*>(from);
        word[0] = quad.x;
        word[1] = quad.y;
        word[2] = quad.z;
        word[3] = quad.w;
      }
    } else {
      for (u32 i = 0; i < kCrcColumns * 4; ++i) {
        if (at + i < padding) continue;
        const u32 byte = *at_address<const unsigned char>(args.bytes + (at + i - padding));
        word[i / 4] |= byte << (8 * (i % 4));
      }
    }
    PIPELIVE_UNROLL
    for (u32 c = 0; c < kCrcColumns; ++c) sum[c] = crc_next_row(fold, sum[c]) ^ word[c];
  }
  const u32* weight = at_address<const CrcTables>(args.tables)->weight + thread * kCrcColumns;
  u32 joined = 0;
  for (u32 c = 0; c < kCrcColumns; ++c) joined ^= crc_multiply(sum[c], weight[c]);
  return joined;
}

/// Joins the tiles' sums to what crc32c(bytes, seed) gives.
inline u32 join_crc(const CrcArgs& args, const u32* sums, u32 seed) {
  const u32 tile = crc_power(static_cast<u64>(args.rows) * kCrcRowBytes);
  // All tiles but the last are multiplied by one number: its multiples by every half byte, at each
  // of the eight places, make that eight look-ups instead of a loop over the bits.
  u32 multiple[8][16] = {};
  for (u32 place = 0; place < 8; ++place) {
    for (u32 half = 1; half < 16; ++half) {
      const u32 rest = half & (half - 1);
      multiple[place][half] = rest == 0 ? crc_multiply(half << (4 * place), tile)
                                        : multiple[place][rest] ^ multiple[place][half ^ rest];
    }
  }
  u32 sum = 0;
  for (u32 i = 0; i < args.tiles; ++i) {
    u32 product = 0;
    for (u32 place = 0; place < 8; ++place) product ^= multiple[place][(sum >> (4 * place)) & 15U];
    sum = product ^ sums[i];
  }
  return ~(crc_multiply(~seed, crc_power(args.size)) ^ sum);
}

}  // namespace pipelive::cuda
