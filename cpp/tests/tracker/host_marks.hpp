#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/tracker/mark_source.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"

namespace pipelive::test {

/// An event that a test lets pass, or fail.
class FakeEvent final : public Event {
 public:
  [[nodiscard]] bool done() const override {
    const std::lock_guard lock(mutex_);
    if (failed_) throw Error(ErrorCode::device, "the work before the event failed");
    return done_;
  }
  void wait(Deadline deadline) const override {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline.at(), [this] { return done_ || failed_; })) {
      throw Error(ErrorCode::timeout, "the event has not passed");
    }
    if (failed_) throw Error(ErrorCode::device, "the work before the event failed");
  }
  void pass() {
    const std::lock_guard lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  bool failed_ = false;
};

/// Marks as a device would make them, in host memory. Writes go through `write`, as the kernels
/// that a stream was given do.
class HostMarks final : public MarkSource {
 public:
  HostMarks(std::uint64_t num_slots, unsigned sets) : num_slots_(num_slots) {
    for (unsigned i = 0; i < sets; ++i) sets_.emplace_back(num_slots);
  }

  void write(Stream stream, std::uint64_t slot) {
    const std::lock_guard lock(mutex_);
    sets_[selected_.at(stream.handle)].set(slot, 1);
  }
  /// The next call of fold or take throws and changes nothing.
  void fail_next() { failing_ = true; }

  [[nodiscard]] std::uint64_t num_slots() const noexcept override { return num_slots_; }
  [[nodiscard]] unsigned num_sets() const noexcept override {
    return static_cast<unsigned>(sets_.size());
  }
  [[nodiscard]] std::uint64_t memory_bytes() const noexcept override {
    return sets_.size() * sets_.front().bytes();
  }
  void select(unsigned set, Stream stream) override {
    const std::lock_guard lock(mutex_);
    std::vector<SlotRange> found;
    sets_.at(set).drain(found);
    if (!found.empty()) throw Error(ErrorCode::device, "a set was handed out that is not empty");
    selected_[stream.handle] = set;
  }
  [[nodiscard]] std::shared_ptr<Event> record(Stream /*stream*/) override {
    auto event = std::make_shared<FakeEvent>();
    event->pass();
    return event;
  }
  std::uint64_t fold(std::span<const unsigned> sets, unsigned into) override {
    const std::lock_guard lock(mutex_);
    check();
    std::uint64_t fresh = 0;
    for (const unsigned set : sets) {
      fresh += sets_.at(into).merge(sets_.at(set));
      sets_[set].clear();
    }
    return fresh;
  }
  void take(std::span<const unsigned> sets, std::vector<SlotRange>& ranges) override {
    const std::lock_guard lock(mutex_);
    check();
    SlotBitmap all(num_slots_);
    for (const unsigned set : sets) {
      all.merge(sets_.at(set));
      sets_[set].clear();
    }
    all.drain(ranges);
  }
  void clear() override {
    const std::lock_guard lock(mutex_);
    for (SlotBitmap& set : sets_) set.clear();
  }

 private:
  void check() {
    if (!failing_) return;
    failing_ = false;
    throw Error(ErrorCode::device, "the kernel failed");
  }

  const std::uint64_t num_slots_;
  std::mutex mutex_;
  std::vector<SlotBitmap> sets_;
  std::map<void*, unsigned> selected_;
  bool failing_ = false;
};

}  // namespace pipelive::test
