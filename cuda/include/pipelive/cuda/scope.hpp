#pragma once

#include "pipelive/cuda/driver.hpp"

namespace pipelive::cuda {

/// What every driver call of ours runs in: the device's primary context is current, and a CUDA
/// graph that some other thread captures (torch captures in the mode that forbids others most) is
/// not invalidated by what this thread does. Both are put back at the end. Costs well below a
/// microsecond; one per public operation is enough.
class CallScope {
 public:
  explicit CallScope(const PrimaryContext& context);
  ~CallScope();
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  ContextScope context_;
  const Driver& driver_;
  CaptureMode mode_ = CaptureMode::relaxed;  ///< the thread's own, while the scope lives
};

}  // namespace pipelive::cuda
