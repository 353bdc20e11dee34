#include "pipelive/migration/write_through.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/tracker/slot_ranges.hpp"

namespace pipelive {
namespace {

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             Deadline::Clock::now().time_since_epoch())
      .count();
}

}  // namespace

WriteThrough::WriteThrough(std::shared_ptr<DirtyTracker> tracker,
                           std::vector<std::shared_ptr<PatchSender>> senders,
                           const Options& options)
    : tracker_(std::move(tracker)),
      senders_(std::move(senders)),
      options_(options),
      sent_through_(options.sent_through),
      next_round_(options.first_round) {
  const bool complete = tracker_ && !senders_.empty() &&
                        std::find(senders_.begin(), senders_.end(), nullptr) == senders_.end();
  if (!complete) {
    throw Error(ErrorCode::invalid_argument,
                "WriteThrough: tracker or senders missing, expected one tracker and at least one "
                "sender");
  }
}

bool WriteThrough::run(Deadline deadline) {
  while (true) {
    stop_ = false;
    if (cancelled_) throw Error(ErrorCode::cancelled, "write-through was cancelled");
    const std::optional<std::int64_t> last = this->last();
    if (last && sent_through() >= *last) {
      finish();
      return true;
    }
    if (!tracker_->await_sealed(sent_through() + 1, stop_, deadline)) {
      if (deadline.passed()) return false;
      continue;
    }
    const std::int64_t start = now_ns();
    send(tracker_->collect(), start);
  }
}

void WriteThrough::send(const Collected& collected, std::int64_t start_ns) {
  SentStep step;
  {
    const std::lock_guard lock(mutex_);
    step.round = next_round_++;
  }
  step.through_seq = collected.through_seq;
  step.slots = collected.num_slots;
  step.start_ns = start_ns;
  for (const std::shared_ptr<PatchSender>& sender : senders_) {
    const RoundStats stats = sender->send_round(step.round, collected.through_seq, collected.ranges,
                                                {}, message_deadline());
    step.records += stats.records;
    step.bytes += stats.bytes;
    step.busy_seconds += stats.busy_seconds;
  }
  step.end_ns = now_ns();
  step.lag_steps = std::max<std::int64_t>(0, tracker_->sealed_through() - collected.through_seq);
  const std::lock_guard lock(mutex_);
  sent_through_ = collected.through_seq;
  bytes_ += step.bytes;
  if (sent_.size() == kMostKept) sent_.pop_front();
  sent_.push_back(step);
  if (!options_.keep_ranges) return;
  ranges_.insert(ranges_.end(), collected.ranges.begin(), collected.ranges.end());
  if (ranges_.size() < merge_at_) return;
  ranges_ = merge_ranges(ranges_);
  merge_at_ = 2 * ranges_.size() + 4096;
}

// Writers that are not steps may have sealed their slots since the last step was sent.
void WriteThrough::finish() {
  const std::int64_t start = now_ns();
  const Collected rest = tracker_->collect();
  if (rest.num_slots != 0) send(rest, start);
  const std::int64_t through = sent_through();
  for (const std::shared_ptr<PatchSender>& sender : senders_) {
    sender->wait_applied(through, message_deadline());
  }
  const std::lock_guard lock(mutex_);
  if (!sent_.empty()) sent_.back().end_ns = now_ns();
}

void WriteThrough::end_after(std::int64_t seq) {
  {
    const std::lock_guard lock(mutex_);
    last_ = seq;
  }
  stop_ = true;
  tracker_->wake();
}

void WriteThrough::cancel() {
  cancelled_ = true;
  stop_ = true;
  tracker_->wake();
}

std::optional<std::int64_t> WriteThrough::last() const {
  const std::lock_guard lock(mutex_);
  return last_;
}

std::int64_t WriteThrough::sent_through() const {
  const std::lock_guard lock(mutex_);
  return sent_through_;
}

std::uint64_t WriteThrough::bytes_sent() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

std::vector<SentStep> WriteThrough::sent(std::uint64_t first) const {
  const std::lock_guard lock(mutex_);
  const auto begin = std::find_if(sent_.begin(), sent_.end(),
                                  [&](const SentStep& step) { return step.round >= first; });
  return {begin, sent_.end()};
}

std::vector<SlotRange> WriteThrough::ranges() const {
  const std::lock_guard lock(mutex_);
  return merge_ranges(ranges_);
}

Deadline WriteThrough::message_deadline() const {
  return Deadline::after_seconds(options_.message_seconds);
}

}  // namespace pipelive
