#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

/// What libFuzzer calls, and what replay.cpp calls with the files of the corpus.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace pipelive::fuzz {

/// A rule that must hold whatever the input: ends the process, so that the fuzzer keeps the input.
inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "broken rule: %s\n", rule);
  std::abort();
}

/// The fuzzer's bytes, taken from the front; what is not there reads as 0.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size)
      : rest_(reinterpret_cast<const std::byte*>(data), size) {}

  [[nodiscard]] bool empty() const noexcept { return rest_.empty(); }
  [[nodiscard]] std::size_t left() const noexcept { return rest_.size(); }

  template <typename T>
  T take() {
    T value{};
    const std::span<const std::byte> part = bytes(sizeof value);
    if (!part.empty()) std::memcpy(&value, part.data(), part.size());
    return value;
  }
  std::span<const std::byte> bytes(std::size_t most) {
    const std::span<const std::byte> part = rest_.first(most < rest_.size() ? most : rest_.size());
    rest_ = rest_.subspan(part.size());
    return part;
  }

 private:
  std::span<const std::byte> rest_;
};

/// Writes an input; the inverse of Input.
class Seed {
 public:
  template <typename T>
  Seed& put(T value) {
    const auto* const from = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof value);
    return *this;
  }
  Seed& put_bytes(std::span<const std::byte> part) {
    bytes.insert(bytes.end(), part.begin(), part.end());
    return *this;
  }

  std::vector<std::byte> bytes;
};

}  // namespace pipelive::fuzz
