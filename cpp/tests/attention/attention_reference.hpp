#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "pipelive/attention/attention.hpp"

namespace pipelive::testing {

[[nodiscard]] float to_float(DType dtype, const std::byte* from);
void from_float(DType dtype, float value, std::byte* to);

/// A batch over a cache of permuted blocks, all in vectors of its own, and its result in double.
struct Batch {
  Batch(DType dtype, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t head_dim,
        std::int64_t block_size, const std::vector<std::int32_t>& lens,
        const std::vector<std::int32_t>& query_lens, unsigned seed = 1);

  /// Arguments over `kv`, `query` and `out`, without options.
  [[nodiscard]] AttentionArgs args();
  /// [tokens, q_heads, head_dim]
  [[nodiscard]] std::vector<double> expected(const AttentionArgs& args) const;
  [[nodiscard]] std::vector<float> result() const;
  [[nodiscard]] double kv_at(std::int64_t seq, std::int64_t position, std::int64_t head, int side,
                             std::int64_t d) const;

  DType dtype;
  std::int64_t q_heads, kv_heads, head_dim, block_size;
  std::int64_t tokens = 0, num_blocks = 0, width = 0;
  std::vector<std::int32_t> lens, starts, tables;
  std::vector<std::byte> kv, query, out;
  std::vector<float> kv_values;  ///< `kv` as it was filled
  std::vector<float> lse;
};

}  // namespace pipelive::testing
