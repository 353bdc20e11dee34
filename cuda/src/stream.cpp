#include "pipelive/cuda/stream.hpp"

#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

void refuse_capture(const Driver& driver, StreamHandle stream, std::string_view what) {
  CaptureStatus status = CaptureStatus::none;
  const Result result = driver.api().stream_is_capturing(stream, &status);
  // The other answer is about the default stream, while a stream is captured that waits for it.
  if (result == kStreamCaptureImplicit || (result == kSuccess && status != CaptureStatus::none)) {
    throw Error(ErrorCode::busy, std::string(what) +
                                     ": the stream is being captured into a CUDA graph; do this " +
                                     "before the capture or after it");
  }
  driver.check(result, "cuStreamIsCapturing");
}

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
