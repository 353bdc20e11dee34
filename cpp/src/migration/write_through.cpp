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
      options_(options),
      sent_through_(options.sent_through),
      next_round_(options.first_round) {
  const bool complete = tracker_ && !senders.empty() &&
                        std::find(senders.begin(), senders.end(), nullptr) == senders.end();
  if (!complete) {
    throw Error(ErrorCode::invalid_argument,
                "WriteThrough: tracker or senders missing, expected one tracker and at least one "
                "sender");
  }
  for (std::shared_ptr<PatchSender>& sender : senders) {
    const std::uint64_t rounds = sender->rounds_sent();
    links_.push_back({std::move(sender), rounds, 0, 0, 0});
  }
}

bool WriteThrough::run(Deadline deadline) {
  while (true) {
    stop_ = false;
    if (cancelled_) throw Error(ErrorCode::cancelled, "write-through was cancelled");
    flush();
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
    keep(tracker_->collect(), start);
    flush();
  }
}

void WriteThrough::keep(const Collected& collected, std::int64_t start_ns) {
  Kept kept{collected.ranges, collected.through_seq, {}};
  kept.step.through_seq = collected.through_seq;
  kept.step.slots = collected.num_slots;
  kept.step.start_ns = start_ns;
  {
    const std::lock_guard lock(mutex_);
    kept.step.round = next_round_++;
    if (options_.keep_ranges) {
      ranges_.insert(ranges_.end(), collected.ranges.begin(), collected.ranges.end());
      if (ranges_.size() >= merge_at_) {
        ranges_ = merge_ranges(ranges_);
        merge_at_ = 2 * ranges_.size() + 4096;
      }
    }
  }
  kept_.push_back(std::move(kept));
}

// Sends everybody what they have not been sent yet. What has gone out to one target is not sent
// again because another one's connection has failed.
void WriteThrough::flush() {
  const std::uint64_t end = kept_from_ + kept_.size();
  for (; reported_ < end; ++reported_) {
    Kept& kept = kept_[reported_ - kept_from_];
    for (Link& link : links_) {
      if (link.next > reported_) continue;
      const RoundStats stats = link.sender->send_round(kept.step.round, kept.through_seq,
                                                       kept.ranges, {}, message_deadline());
      link.next += 1;
      kept.step.records += stats.records;
      kept.step.bytes += stats.bytes;
      kept.step.busy_seconds += stats.busy_seconds;
      const std::lock_guard lock(mutex_);
      bytes_ += stats.bytes;
    }
    kept.step.end_ns = now_ns();
    kept.step.lag_steps = std::max<std::int64_t>(0, tracker_->sealed_through() - kept.through_seq);
    const std::lock_guard lock(mutex_);
    sent_through_ = kept.through_seq;
    if (sent_.size() == kMostKept) sent_.pop_front();
    sent_.push_back(kept.step);
  }
  forget_applied();
}

std::uint64_t WriteThrough::applied(const Link& link, std::uint64_t rounds) noexcept {
  return rounds > link.base ? link.first + (rounds - link.base) : link.floor;
}

void WriteThrough::forget_applied() {
  std::uint64_t least = kept_from_ + kept_.size();
  for (const Link& link : links_) {
    least = std::min(least, applied(link, link.sender->rounds_acknowledged()));
  }
  for (; kept_from_ < least; ++kept_from_) kept_.pop_front();
}

void WriteThrough::resume(std::size_t place, std::shared_ptr<PatchSender> sender,
                          std::uint64_t rounds_applied) {
  if (place >= links_.size() || !sender) {
    throw Error(ErrorCode::invalid_argument,
                "WriteThrough::resume: place " + std::to_string(place) + " of " +
                    std::to_string(links_.size()) + ", expected an existing one and a sender");
  }
  Link& link = links_[place];
  const std::uint64_t sent =
      link.next == link.floor ? link.base : link.base + (link.next - link.first);
  // The end of a round may have gone out before sending it failed.
  if (rounds_applied > sent + 1) {
    throw Error(ErrorCode::invalid_argument, "WriteThrough::resume: the target has applied " +
                                                 std::to_string(rounds_applied) +
                                                 " rounds, sent were " + std::to_string(sent));
  }
  const std::uint64_t from = std::max(applied(link, rounds_applied), kept_from_);
  const std::uint64_t end = kept_from_ + kept_.size();
  std::vector<SlotRange> ranges;
  std::int64_t through = -1;
  for (std::uint64_t number = from; number < end; ++number) {
    const Kept& kept = kept_[number - kept_from_];
    ranges.insert(ranges.end(), kept.ranges.begin(), kept.ranges.end());
    through = kept.through_seq;
  }
  if (end == from) through = sent_through();
  // One round carries all up to `end`, so it stands for the last of them. Noted before it is sent:
  // where that fails, the next connection goes on from here.
  const std::uint64_t base = sender->rounds_sent();
  const bool any = end != 0;
  link = {std::move(sender), any ? base : base + 1, any ? end - 1 : 0, from, from};
  const RoundStats stats = link.sender->send_round(
      next_round_, through, merge_ranges(std::move(ranges)), {}, message_deadline());
  link.next = end;
  const std::lock_guard lock(mutex_);
  bytes_ += stats.bytes;
}

// Writers that are not steps may have sealed their slots since the last step was sent.
void WriteThrough::finish() {
  const std::int64_t start = now_ns();
  const Collected rest = tracker_->collect();
  if (rest.num_slots != 0) keep(rest, start);
  flush();
  const std::int64_t through = sent_through();
  for (const Link& link : links_) link.sender->wait_applied(through, message_deadline());
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
