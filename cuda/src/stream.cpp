#include "pipelive/cuda/stream.hpp"

#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

OwnStream::OwnStream(std::shared_ptr<const PrimaryContext> context, Priority priority)
    : context_(std::move(context)) {
  const CallScope scope(*context_);
  const Driver& driver = context_->driver();
  int least = 0;
  int greatest = 0;
  driver.check(driver.api().ctx_get_stream_priority_range(&least, &greatest),
               "cuCtxGetStreamPriorityRange");
  // Normal is 0 on every device; the range only widens it.
  const int chosen = priority == Priority::high ? greatest : 0;
  driver.check(driver.api().stream_create_with_priority(&handle_, kStreamNonBlocking, chosen),
               "cuStreamCreateWithPriority");
}

OwnStream::~OwnStream() {
  try {
    const CallScope scope(*context_);
    context_->driver().api().stream_destroy(handle_);
  } catch (const Error&) {
    // The context is gone, and its streams with it.
  }
}

}  // namespace pipelive::cuda
