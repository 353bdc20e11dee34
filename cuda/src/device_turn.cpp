#include "pipelive/cuda/device_turn.hpp"

#include <algorithm>
#include <map>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive::cuda {
namespace {

constexpr std::chrono::milliseconds kLeftFree{1};
constexpr std::chrono::milliseconds kImpatient{20};

}  // namespace

std::shared_ptr<DeviceTurn> DeviceTurn::of(const std::string& device) {
  // Never destroyed: an engine may hold a turn while the process ends.
  static std::mutex* const mutex = new std::mutex();
  static auto* const turns = new std::map<std::string, std::shared_ptr<DeviceTurn>>();
  const std::lock_guard lock(*mutex);
  std::shared_ptr<DeviceTurn>& turn = (*turns)[device];
  if (!turn) turn = std::make_shared<DeviceTurn>();
  return turn;
}

bool DeviceTurn::try_take(std::string holder) {
  const std::lock_guard lock(mutex_);
  const auto now = Deadline::Clock::now();
  if (taken_) {
    wanted_ = now >= patient_from_;
    return false;
  }
  taken_ = true;
  wanted_ = false;
  left_free_until_ = {};
  patient_from_ = {};
  holder_ = std::move(holder);
  return true;
}

void DeviceTurn::take(std::string holder, Deadline deadline) {
  std::unique_lock lock(mutex_);
  while (true) {
    const auto now = Deadline::Clock::now();
    auto until = deadline.at();
    if (!taken_) {
      if (now >= left_free_until_) break;
      until = std::min(until, left_free_until_);
    }
    if (now >= deadline.at()) {
      throw Error(ErrorCode::timeout,
                  "the device's turn was held by " +
                      (taken_ ? holder_ : std::string("nobody, but left to a patch,")) +
                      " until the deadline");
    }
    given_.wait_until(lock, until);
  }
  taken_ = true;
  holder_ = std::move(holder);
}

void DeviceTurn::give() {
  const std::lock_guard lock(mutex_);
  if (!taken_)
    throw Error(ErrorCode::invalid_argument, "the turn is given back, but nobody has it");
  taken_ = false;
  holder_.clear();
  if (std::exchange(wanted_, false)) {
    left_free_until_ = Deadline::Clock::now() + kLeftFree;
    patient_from_ = left_free_until_ + kImpatient;
  }
  given_.notify_all();
}

std::string DeviceTurn::holder() const {
  const std::lock_guard lock(mutex_);
  return holder_;
}

}  // namespace pipelive::cuda
