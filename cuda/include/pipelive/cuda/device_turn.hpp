#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "pipelive/base/deadline.hpp"

namespace pipelive::cuda {

/// Whose turn it is to have NCCL work under way on one device of this process. Two communicators on
/// one device whose operations are issued in different orders by different ranks wait on each other
/// for ever; who holds the turn is alone, from before it issues until its work has completed.
///
/// Patches only ever *try* to take it, on both ends before either issues, and hold it for one
/// transfer. An engine may wait for it. So that an engine which takes it again and again does not
/// shut patches out, one that waits leaves a turn for which a patch has tried in vain free for up
/// to a millisecond, but not twice in 20 ms where no patch came. Not bound to a thread.
class DeviceTurn {
 public:
  /// The turn of a device ("cuda:0"), the same object for all in this process.
  [[nodiscard]] static std::shared_ptr<DeviceTurn> of(const std::string& device);

  DeviceTurn() = default;
  DeviceTurn(const DeviceTurn&) = delete;
  DeviceTurn& operator=(const DeviceTurn&) = delete;

  /// `holder` is who takes it, for messages.
  [[nodiscard]] bool try_take(std::string holder);
  /// Throws Error(timeout) naming the holder.
  void take(std::string holder, Deadline deadline);
  /// Throws Error(invalid_argument) where nobody holds it.
  void give();
  /// Empty where nobody holds it.
  [[nodiscard]] std::string holder() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable given_;
  bool taken_ = false;
  bool wanted_ = false;                            // a patch has tried since it was taken
  Deadline::Clock::time_point left_free_until_{};  // for a patch that has tried
  Deadline::Clock::time_point patient_from_{};     // no such time is granted before
  std::string holder_;
};

/// A turn that was taken, given back with the object.
class TurnHeld {
 public:
  explicit TurnHeld(DeviceTurn& turn) : turn_(turn) {}
  ~TurnHeld() { turn_.give(); }
  TurnHeld(const TurnHeld&) = delete;
  TurnHeld& operator=(const TurnHeld&) = delete;

 private:
  DeviceTurn& turn_;
};

}  // namespace pipelive::cuda
