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
  ++uses_;
  return Use(this);
}

void Residency::Use::end() noexcept {
  if (residency_ == nullptr) return;
  const std::lock_guard lock(residency_->mutex_);
  if (--residency_->uses_ == 0) residency_->changed_.notify_all();
  residency_ = nullptr;
}

Residency::Exclusive Residency::exclude(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const bool alone = changed_.wait_until(lock, deadline.at(), [this] { return !excluded_; });
  if (alone) {
    // From here on no use begins, so that a stream of short uses cannot hold a resize off.
    excluded_ = true;
    if (changed_.wait_until(lock, deadline.at(), [this] { return uses_ == 0; })) {
      return Exclusive(this);
    }
    excluded_ = false;
    changed_.notify_all();
  }
  throw Error(ErrorCode::busy,
              std::to_string(uses_) + " operations still use the blocks that are to go");
}

Residency::Exclusive::~Exclusive() {
  if (residency_ == nullptr) return;
  const std::lock_guard lock(residency_->mutex_);
  residency_->excluded_ = false;
  residency_->changed_.notify_all();
}

}  // namespace pipelive
