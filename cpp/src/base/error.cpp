#include "pipelive/base/error.hpp"

#include <cerrno>
#include <system_error>

namespace pipelive {

std::string_view to_string(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid_argument";
    case ErrorCode::out_of_memory:
      return "out_of_memory";
    case ErrorCode::over_budget:
      return "over_budget";
    case ErrorCode::not_resident:
      return "not_resident";
    case ErrorCode::busy:
      return "busy";
    case ErrorCode::closed:
      return "closed";
    case ErrorCode::timeout:
      return "timeout";
    case ErrorCode::cancelled:
      return "cancelled";
    case ErrorCode::protocol:
      return "protocol";
    case ErrorCode::corrupt:
      return "corrupt";
    case ErrorCode::device:
      return "device";
  }
  return "unknown";
}

void throw_errno(std::string_view call, int error_number) {
  const bool memory = error_number == ENOMEM || error_number == ENOSPC;
  throw Error(memory ? ErrorCode::out_of_memory : ErrorCode::device,
              std::string(call) + ": " + std::generic_category().message(error_number) +
                  " (errno " + std::to_string(error_number) + ")");
}

}  // namespace pipelive
