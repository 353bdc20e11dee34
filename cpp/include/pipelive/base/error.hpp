#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace pipelive {

/// What kind of failure an Error reports; each kind becomes one Python exception class.
enum class ErrorCode {
  invalid_argument,  ///< a caller's value is wrong; nothing was changed
  out_of_memory,     ///< the device or the operating system refused memory
  over_budget,       ///< the operation would hold more bytes than the pool's budget
  not_resident,      ///< a block, layer or page that the operation needs is not mapped
  busy,              ///< the object is in use in a way that forbids the operation now
  closed,            ///< the object was closed or its peer has gone
  timeout,           ///< a deadline passed; the message says who did not answer, in which phase
  cancelled,         ///< the operation was cancelled on purpose
  protocol,          ///< a peer sent something that the protocol does not allow
  corrupt,           ///< a checksum or a digest does not agree
  device,            ///< a device or system call failed; the message carries its name and number
};

[[nodiscard]] std::string_view to_string(ErrorCode code) noexcept;

/// The one exception type of the core. The message says what failed, where, and the number.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// Throws Error(device) for a failed system call: "mmap(2097152 bytes): Cannot allocate memory
/// (12)".
[[noreturn]] void throw_errno(std::string_view call, int error_number);

}  // namespace pipelive
