#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

CallScope::CallScope(const PrimaryContext& context) : context_(context), driver_(context.driver()) {
  driver_.check(driver_.api().thread_exchange_capture_mode(&mode_),
                "cuThreadExchangeStreamCaptureMode");
}

CallScope::~CallScope() {
  driver_.api().thread_exchange_capture_mode(&mode_);
}

}  // namespace pipelive::cuda
