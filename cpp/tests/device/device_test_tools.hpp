#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/device/device.hpp"
#include "pipelive/device/unique_fd.hpp"

namespace pipelive::testing {

inline constexpr std::size_t kPage = 4096;

/// Whether a byte can be read, asked of the kernel so that nothing faults.
inline bool accessible(const std::byte* address) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return false;
  const UniqueFd read_end(ends[0]);
  const UniqueFd write_end(ends[1]);
  return ::write(write_end.get(), address, 1) == 1;
}

inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> values(bytes);
  std::uint32_t state = seed * 2654435761u + 1;
  for (std::byte& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<std::byte>(state >> 24);
  }
  return values;
}

inline void finish(Device& device) {
  device.record()->wait(Deadline::after_seconds(10));
}

inline void write(Device& device, std::byte* target, const std::vector<std::byte>& values) {
  device.copy(target, values.data(), values.size());
  finish(device);
}

inline std::vector<std::byte> read(Device& device, const std::byte* source, std::size_t bytes) {
  std::vector<std::byte> values(bytes);
  device.copy(values.data(), source, bytes);
  finish(device);
  return values;
}

/// The code of the Error that `action` throws; fails the test by an impossible value otherwise.
inline int code_of(const std::function<void()>& action, std::string* message = nullptr) {
  try {
    action();
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return static_cast<int>(error.code());
  }
  return -1;
}

#define EXPECT_CODE(expected, ...)                             \
  EXPECT_EQ(static_cast<int>(::pipelive::ErrorCode::expected), \
            ::pipelive::testing::code_of([&] { __VA_ARGS__; }))

/// Asserts the code and that the message holds a text.
#define EXPECT_ERROR(expected, text, ...)                                         \
  do {                                                                            \
    std::string message_;                                                         \
    EXPECT_EQ(static_cast<int>(::pipelive::ErrorCode::expected),                  \
              ::pipelive::testing::code_of([&] { __VA_ARGS__; }, &message_));     \
    EXPECT_NE(message_.find(text), std::string::npos) << "message: " << message_; \
  } while (false)

}  // namespace pipelive::testing
