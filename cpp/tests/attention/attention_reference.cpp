#include "attention/attention_reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace pipelive::testing {
namespace {

/// The value of a small floating-point format, written out from its definition.
double decode(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const bool negative = (bits >> (exponent_bits + mantissa_bits)) & 1u;
  const auto exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const double mantissa = std::ldexp(bits & ((1u << mantissa_bits) - 1), -mantissa_bits);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias);
  } else {
    value = std::ldexp(1 + mantissa, exponent - bias);
  }
  return negative ? -value : value;
}

}  // namespace

float to_float(DType dtype, const std::byte* from) {
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return static_cast<float>(dtype == DType::float16 ? decode(bits, 5, 10) : decode(bits, 8, 7));
}

void from_float(DType dtype, float value, std::byte* to) {
  if (dtype == DType::float32) {
    std::memcpy(to, &value, sizeof value);
    return;
  }
  // The nearest of all finite numbers of the format; even where two are equally near.
  const bool negative = std::signbit(value);
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent_bits = dtype == DType::float16 ? 5 : 8;
  const int mantissa_bits = 15 - exponent_bits;
  std::uint32_t low = 0;
  std::uint32_t high = ((1u << exponent_bits) - 1) << mantissa_bits;  // infinity
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (decode(middle, exponent_bits, mantissa_bits) <= magnitude ? low : high) = middle;
  }
  const double below = decode(low, exponent_bits, mantissa_bits);
  const double above = decode(high, exponent_bits, mantissa_bits);
  std::uint32_t bits = low;
  if (magnitude - below > above - magnitude ||
      (magnitude - below == above - magnitude && low % 2 == 1)) {
    bits = high;
  }
  const auto stored = static_cast<std::uint16_t>(bits | (negative ? 0x8000u : 0u));
  std::memcpy(to, &stored, sizeof stored);
}

Batch::Batch(DType dtype_, std::int64_t q_heads_, std::int64_t kv_heads_, std::int64_t head_dim_,
             std::int64_t block_size_, const std::vector<std::int32_t>& lens_,
             const std::vector<std::int32_t>& query_lens, unsigned seed)
    : dtype(dtype_),
      q_heads(q_heads_),
      kv_heads(kv_heads_),
      head_dim(head_dim_),
      block_size(block_size_),
      lens(lens_) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  starts.push_back(0);
  for (const std::int32_t n : query_lens) starts.push_back(starts.back() + n);
  tokens = starts.back();
  for (const std::int32_t n : lens) {
    width = std::max<std::int64_t>(width, (n + block_size - 1) / block_size);
    num_blocks += (n + block_size - 1) / block_size;
  }
  num_blocks += 2;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(num_blocks));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  tables.assign(lens.size() * static_cast<std::size_t>(width), -1);
  std::size_t next = 0;
  for (std::size_t seq = 0; seq < lens.size(); ++seq) {
    for (std::int64_t i = 0; i < (lens[seq] + block_size - 1) / block_size; ++i) {
      tables[seq * static_cast<std::size_t>(width) + static_cast<std::size_t>(i)] = ids[next++];
    }
  }
  const auto item = static_cast<std::int64_t>(size_of(dtype));
  const auto fill = [&](std::vector<std::byte>& memory, std::int64_t count) {
    memory.resize(static_cast<std::size_t>(count * item));
    for (std::int64_t i = 0; i < count; ++i) from_float(dtype, normal(random), &memory[i * item]);
  };
  fill(kv, num_blocks * kv_heads * 2 * block_size * head_dim);
  for (std::size_t i = 0; i < kv.size(); i += size_of(dtype))
    kv_values.push_back(to_float(dtype, &kv[i]));
  fill(query, tokens * q_heads * head_dim);
  out.resize(query.size());
  lse.resize(static_cast<std::size_t>(tokens * q_heads));
}

AttentionArgs Batch::args() {
  AttentionArgs args;
  args.query = {query.data(), dtype, tokens, q_heads, head_dim, q_heads * head_dim, head_dim};
  args.out = args.query;
  args.out.data = out.data();
  args.lse = lse.data();
  args.kv.base = kv.data();
  args.kv.dtype = dtype;
  args.kv.num_blocks = num_blocks;
  args.kv.kv_heads = kv_heads;
  args.kv.block_size = block_size;
  args.kv.head_dim = head_dim;
  args.kv.token_stride = head_dim;
  args.kv.kv_stride = block_size * head_dim;
  args.kv.head_stride = 2 * args.kv.kv_stride;
  args.kv.block_stride = kv_heads * args.kv.head_stride;
  args.num_seqs = static_cast<std::int64_t>(lens.size());
  args.block_tables = tables.data();
  args.table_width = args.table_stride = width;
  args.seq_lens = lens.data();
  args.query_start = starts.data();
  args.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return args;
}

double Batch::kv_at(std::int64_t seq, std::int64_t position, std::int64_t head, int side,
                    std::int64_t d) const {
  const std::int64_t block = tables[static_cast<std::size_t>(seq * width + position / block_size)];
  const std::int64_t index =
      (((block * kv_heads + head) * 2 + side) * block_size + position % block_size) * head_dim + d;
  return kv_values[static_cast<std::size_t>(index)];
}

std::vector<double> Batch::expected(const AttentionArgs& args) const {
  std::vector<double> all(static_cast<std::size_t>(tokens * q_heads * head_dim), 0.0);
  const std::int64_t group = q_heads / kv_heads;
  for (std::int64_t seq = 0; seq < args.num_seqs; ++seq) {
    const std::int64_t len = lens[static_cast<std::size_t>(seq)];
    const std::int64_t first = starts[static_cast<std::size_t>(seq)];
    const std::int64_t count = starts[static_cast<std::size_t>(seq) + 1] - first;
    for (std::int64_t row = 0; len > 0 && row < count * q_heads; ++row) {
      const std::int64_t token = first + row / q_heads;
      const std::int64_t head = row % q_heads;
      const std::int64_t position = len - count + row / q_heads;
      const std::int64_t begin =
          args.window == 0 ? 0 : std::max<std::int64_t>(0, position - args.window + 1);
      const std::size_t at = static_cast<std::size_t>((token * q_heads + head) * head_dim);
      std::vector<double> row_query;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        row_query.push_back(
            to_float(dtype, &query[(at + static_cast<std::size_t>(d)) * size_of(dtype)]));
      }
      std::vector<double> weights;
      for (std::int64_t k = begin; k <= position; ++k) {
        double dot = 0;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          dot += row_query[static_cast<std::size_t>(d)] * kv_at(seq, k, head / group, 0, d);
        }
        dot *= args.scale;
        if (args.soft_cap > 0) dot = args.soft_cap * std::tanh(dot / args.soft_cap);
        weights.push_back(dot);
      }
      const double most = *std::ranges::max_element(weights);
      double sum = 0;
      for (double& weight : weights) sum += weight = std::exp(weight - most);
      for (std::int64_t k = begin; k <= position; ++k) {
        for (std::int64_t d = 0; d < head_dim; ++d) {
          all[at + static_cast<std::size_t>(d)] += weights[static_cast<std::size_t>(k - begin)] /
                                                   sum * kv_at(seq, k, head / group, 1, d);
        }
      }
    }
  }
  return all;
}

std::vector<float> Batch::result() const {
  std::vector<float> all(out.size() / size_of(dtype));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = to_float(dtype, &out[i * size_of(dtype)]);
  return all;
}

}  // namespace pipelive::testing
