#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attention_emulator.hpp"
#include "pipelive/attention/attention.hpp"
#include "pipelive/cuda/attention.hpp"

namespace pipelive::cuda {

/// A batch over a cache with permuted blocks, NaN wherever no token lies that is attended to.
struct Problem {
  int q_heads = 4;
  int kv_heads = 2;
  int head_dim = 64;
  int block_size = 16;
  std::vector<int> seq_lens{40};
  std::vector<int> query_lens{1};
  DType dtype = DType::bfloat16;
  std::optional<DType> query_dtype;
  std::string order = "hnd";  ///< or "nhd", or "split"
  int window = 0;
  double soft_cap = 0;
  double magnitude = 1;
  bool block_map = false;
  bool one_token_each = false;  ///< no query_start
  int trailing_tokens = 0;      ///< query rows behind the last sequence
  unsigned seed = 1;
  DeviceLimits limits{9, 0, 132, 232448, 233472, 13000};
};

/// Numbers of any element type in memory aligned to 64 bytes.
class Numbers {
 public:
  Numbers() = default;
  Numbers(DType dtype, std::size_t count);
  [[nodiscard]] float get(std::size_t i) const;
  void set(std::size_t i, float value);
  void fill(float value);
  [[nodiscard]] std::byte* data() const;
  [[nodiscard]] std::size_t bytes() const { return count_ * size_of(dtype_); }
  [[nodiscard]] std::size_t size() const { return count_; }

 private:
  DType dtype_ = DType::float32;
  std::size_t count_ = 0;
  std::vector<std::byte> memory_;
  std::size_t offset_ = 0;
};

/// A problem's tensors, and what attention should give.
class Batch {
 public:
  explicit Batch(const Problem& problem);

  [[nodiscard]] const AttentionArgs& args() const { return args_; }
  AttentionArgs& args() { return args_; }
  /// Runs the launch in the emulator; `runs` overrides how many blocks share a tile's splits.
  /// Returns the emulator's complaint.
  [[nodiscard]] std::string emulate(
      attention::emulator::Order order = attention::emulator::Order::forward, int runs = 0,
      int stages = 0);
  /// Fills `expected`, in float64 over the stored numbers.
  void reference();

  Problem problem;
  Numbers kv, query, out;
  std::vector<float> lse;
  std::vector<std::int32_t> tables, lens, starts, map;
  std::vector<double> expected, expected_lse;

  [[nodiscard]] std::size_t kv_index(int block, int head, int side, int offset, int dim) const;
  /// The largest error of `out`, relative to the largest expected value but at least to 1; infinite
  /// where something is not a number.
  [[nodiscard]] double error() const;
  [[nodiscard]] double lse_error() const;

 private:
  std::int64_t strides_[4] = {};  ///< block, head, kv, token
  std::vector<std::vector<int>> blocks_;
  AttentionArgs args_;
};

}  // namespace pipelive::cuda
