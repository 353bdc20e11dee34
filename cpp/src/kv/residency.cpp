#include "pipelive/kv/residency.hpp"

#include <algorithm>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr double kExcludedSeconds = 60.0;

}  // namespace

Residency::Residency(std::uint32_t num_layers)
    : num_layers_(num_layers), limits_(new std::atomic<std::uint64_t>[num_layers] {}) {}

void Residency::fail(std::uint32_t layer, const std::string& id, std::uint64_t limit) {
  throw Error(ErrorCode::not_resident, "block " + id + " of layer " + std::to_string(layer) +
                                           " is not resident; resident are the ids below " +
                                           std::to_string(limit));
}

void Residency::check_held(std::uint32_t layer, std::uint64_t limit) const {
  if (layer >= num_layers_) {
    throw Error(
        ErrorCode::invalid_argument,
        "layer is " + std::to_string(layer) + ", expected 0 to " + std::to_string(num_layers_ - 1));
  }
  if (limit == 0) {
    throw Error(ErrorCode::not_resident, "layer " + std::to_string(layer) + " is not held here");
  }
}

template <typename T>
void Residency::check_ids(std::uint32_t layer, std::span<const T> ids) const {
  const std::uint64_t resident = limit(layer);
  check_held(layer, resident);
  for (const T id : ids) {
    if (std::cmp_less(id, 0) || std::cmp_greater_equal(id, resident)) {
      fail(layer, std::to_string(id), resident);
    }
  }
}

void Residency::check(std::uint32_t layer, std::span<const std::int32_t> ids) const {
  check_ids(layer, ids);
}

void Residency::check(std::uint32_t layer, std::span<const std::int64_t> ids) const {
  check_ids(layer, ids);
}

void Residency::check(std::uint32_t layer, std::span<const std::uint64_t> ids) const {
  check_ids(layer, ids);
}

void Residency::check_range(std::uint32_t layer, std::uint64_t begin, std::uint64_t end) const {
  const std::uint64_t resident = limit(layer);
  check_held(layer, resident);
  if (begin < end && end > resident) {
    fail(layer, std::to_string(std::max(begin, resident)), resident);
  }
}

Residency::Use Residency::use() const {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_until(lock, Deadline::after_seconds(kExcludedSeconds).at(),
                           [this] { return !excluded_; })) {
    throw Error(ErrorCode::timeout, "the pool was being resized for over a minute");
  }
  ++uses_[phase_];
  return {this, phase_};
}

void Residency::Use::end() noexcept {
  if (residency_ == nullptr) return;
  const std::lock_guard lock(residency_->mutex_);
  if (--residency_->uses_[phase_] == 0) residency_->changed_.notify_all();
  residency_ = nullptr;
}

void Residency::drain(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto fail_busy = [](std::uint64_t uses) {
    throw Error(ErrorCode::busy,
                std::to_string(uses) + " operations still use the blocks that are to go");
  };
  if (!changed_.wait_until(lock, deadline.at(), [this] { return !draining_; })) {
    fail_busy(uses_[0] + uses_[1]);
  }
  draining_ = true;
  // The phase that begins may have uses left over from a drain that gave up.
  const auto gone = [this](unsigned phase) { return [this, phase] { return uses_[phase] == 0; }; };
  bool done = changed_.wait_until(lock, deadline.at(), gone(1 - phase_));
  if (done) {
    phase_ = 1 - phase_;
    done = changed_.wait_until(lock, deadline.at(), gone(1 - phase_));
  }
  draining_ = false;
  changed_.notify_all();
  if (!done) fail_busy(uses_[0] + uses_[1]);
}

void Residency::note_stream(Stream stream, std::shared_ptr<void> owner) const {
  const std::lock_guard lock(streams_mutex_);
  for (NotedStream& known : streams_) {
    if (known.stream == stream) {
      if (owner != nullptr && owner != known.owner) known.owner.swap(owner);
      return;
    }
  }
  streams_.push_back({stream, std::move(owner)});
}

void Residency::forget_stream(Stream stream) const {
  std::shared_ptr<void> owner;  // dropped without the lock
  const std::lock_guard lock(streams_mutex_);
  for (auto known = streams_.begin(); known != streams_.end(); ++known) {
    if (known->stream == stream) {
      owner.swap(known->owner);
      streams_.erase(known);
      return;
    }
  }
}

std::vector<Stream> Residency::streams() const {
  const std::lock_guard lock(streams_mutex_);
  std::vector<Stream> streams;
  streams.reserve(streams_.size());
  for (const NotedStream& known : streams_) streams.push_back(known.stream);
  return streams;
}

Residency::Exclusive Residency::exclude(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const bool alone = changed_.wait_until(lock, deadline.at(), [this] { return !excluded_; });
  if (alone) {
    // From here on no use begins, so that a stream of short uses cannot hold a resize off.
    excluded_ = true;
    if (changed_.wait_until(lock, deadline.at(), [this] { return uses_[0] + uses_[1] == 0; })) {
      return Exclusive(this);
    }
    excluded_ = false;
    changed_.notify_all();
  }
  throw Error(ErrorCode::busy, std::to_string(uses_[0] + uses_[1]) +
                                   " operations still use the blocks that are to go");
}

Residency::Exclusive::~Exclusive() {
  if (residency_ == nullptr) return;
  const std::lock_guard lock(residency_->mutex_);
  residency_->excluded_ = false;
  residency_->changed_.notify_all();
}

}  // namespace pipelive
