#include "pipelive/tracker/dirty_tracker.hpp"

#include <chrono>
#include <new>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/tracker/slot_ranges.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kSpareLogs = 16;
constexpr std::chrono::milliseconds kLookAgain{10};

Deadline sooner(Deadline deadline, std::chrono::nanoseconds most) {
  return deadline.remaining() < most ? deadline : Deadline::after(most);
}

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

std::uint64_t checked_slots(std::uint64_t num_slots) {
  if (num_slots < 1 || num_slots > DirtyTracker::kMaxSlots) {
    refuse("DirtyTracker: num_slots is " + std::to_string(num_slots) + ", expected 1 to " +
           std::to_string(DirtyTracker::kMaxSlots));
  }
  return num_slots;
}

std::int64_t checked_first(const char* caller, std::int64_t next_seq) {
  if (next_seq < 0) {
    refuse(std::string(caller) + ": next_seq is " + std::to_string(next_seq) +
           ", expected at least 0");
  }
  return next_seq;
}

SlotBitmap make_bitmap(std::uint64_t num_slots) {
  try {
    return SlotBitmap(num_slots);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "DirtyTracker: no memory for the marks of " +
                                              std::to_string(num_slots) + " slots (2 x " +
                                              std::to_string(num_slots / 8) + " bytes)");
  }
}

}  // namespace

DirtyTracker::DirtyTracker(std::uint64_t num_slots, std::int64_t next_seq,
                           std::shared_ptr<MarkSource> marks)
    : num_slots_(checked_slots(num_slots)),
      marks_(std::move(marks)),
      drained_(make_bitmap(num_slots_)),
      pending_(make_bitmap(num_slots_)),
      first_seq_(checked_first("DirtyTracker", next_seq)),
      next_seq_(next_seq) {
  spare_logs_.reserve(kSpareLogs);
  if (!marks_) return;
  if (marks_->num_slots() != num_slots_ || marks_->num_sets() <= kFirstStepSet) {
    refuse("DirtyTracker: marks has " + std::to_string(marks_->num_slots()) + " slots and " +
           std::to_string(marks_->num_sets()) + " sets, expected " + std::to_string(num_slots_) +
           " and at least " + std::to_string(kFirstStepSet + 1));
  }
  sealed_sets_.reserve(marks_->num_sets());
  free_all_sets();
}

void DirtyTracker::free_all_sets() {
  free_sets_.clear();
  sealed_sets_.clear();
  pending_set_used_ = false;
  held_set_used_ = false;
  pending_marks_ = 0;
  if (!marks_) return;
  for (unsigned set = kFirstStepSet; set < marks_->num_sets(); ++set) free_sets_.push_back(set);
}

WriteLog DirtyTracker::take_log() {
  if (spare_logs_.empty()) return WriteLog(num_slots_);
  WriteLog log = std::move(spare_logs_.back());
  spare_logs_.pop_back();
  return log;
}

void DirtyTracker::keep_log(WriteLog&& log) noexcept {
  if (spare_logs_.size() == kSpareLogs) return;
  log.clear();
  spare_logs_.push_back(std::move(log));
}

DirtyTracker::Step& DirtyTracker::find_open(const char* caller, std::int64_t seq) {
  if (seq >= next_seq_ || seq < 0) {
    refuse(std::string(caller) + ": step " + std::to_string(seq) + " was not opened, the next is " +
           std::to_string(next_seq_));
  }
  Step* const step =
      seq < first_seq_ ? nullptr : &steps_[static_cast<std::size_t>(seq - first_seq_)];
  if (step == nullptr || step->sealed || step->event) {
    refuse(std::string(caller) + ": step " + std::to_string(seq) + " is sealed already");
  }
  return *step;
}

void DirtyTracker::open(std::int64_t seq) {
  const std::lock_guard lock(mutex_);
  if (seq != next_seq_) {
    refuse("DirtyTracker.open: seq is " + std::to_string(seq) + ", expected " +
           std::to_string(next_seq_) + "; steps are opened in order, without gaps");
  }
  notice_events();
  if (steps_.size() >= kMaxOpenSteps) {
    throw Error(ErrorCode::busy, "DirtyTracker.open: " + std::to_string(steps_.size()) +
                                     " steps are logged and step " + std::to_string(first_seq_) +
                                     ", the first of them, was never sealed");
  }
  steps_.push_back({WriteLog(num_slots_)});
  steps_.back().log = take_log();
  ++next_seq_;
  ++open_steps_;
}

void DirtyTracker::record(std::int64_t seq, std::span<const std::int64_t> slots) {
  const std::lock_guard lock(mutex_);
  find_open("DirtyTracker.record", seq).log.add_slots("DirtyTracker.record", slots);
}

void DirtyTracker::record_ranges(std::int64_t seq, std::span<const SlotRange> ranges) {
  const std::lock_guard lock(mutex_);
  find_open("DirtyTracker.record_ranges", seq).log.add_ranges("DirtyTracker.record_ranges", ranges);
}

void DirtyTracker::record_blocks(std::int64_t seq, std::span<const std::int64_t> ids,
                                 std::uint32_t block_size) {
  const std::lock_guard lock(mutex_);
  find_open("DirtyTracker.record_blocks", seq)
      .log.add_blocks("DirtyTracker.record_blocks", ids, block_size);
}

void DirtyTracker::mark(std::int64_t seq, Stream stream) {
  std::unique_lock lock(mutex_);
  if (!marks_) refuse("DirtyTracker.mark: the tracker was made without marks of a device");
  await_take(lock);  // after it every look at the books below stays true
  if (find_open("DirtyTracker.mark", seq).set) {
    refuse("DirtyTracker.mark: step " + std::to_string(seq) + " is marked already");
  }
  if (free_sets_.empty()) {
    notice_events();
    fold_marks();
  }
  if (free_sets_.empty()) fold_held_marks();
  if (free_sets_.empty()) {
    throw Error(ErrorCode::busy,
                "DirtyTracker.mark: " + std::to_string(marks_->num_sets() - kFirstStepSet) +
                    " steps are in flight and step " + std::to_string(last_sealed() + 1) +
                    ", the first of them, is not sealed; no marks are left for step " +
                    std::to_string(seq));
  }
  marks_->select(free_sets_.back(), stream);
  // Looked for again: noticing events may have moved the steps.
  find_open("DirtyTracker.mark", seq).set = free_sets_.back();
  free_sets_.pop_back();
}

void DirtyTracker::await_take(std::unique_lock<std::mutex>& lock) {
  changed_.wait(lock, [this] { return !taking_; });
}

// Empties the sets of folded steps; no collect is taking sets.
void DirtyTracker::fold_marks() {
  if (sealed_sets_.empty()) return;
  pending_marks_ += marks_->fold(sealed_sets_, kPendingSet);
  pending_set_used_ = true;
  free_sets_.insert(free_sets_.end(), sealed_sets_.begin(), sealed_sets_.end());
  sealed_sets_.clear();
}

// Empties the sets of held steps that are complete, so that a hold may last.
void DirtyTracker::fold_held_marks() {
  std::vector<unsigned> sets;
  for (auto step = steps_.begin(); step != steps_.end() && step->sealed; ++step) {
    if (step->set) sets.push_back(*step->set);
  }
  if (sets.empty()) return;
  static_cast<void>(marks_->fold(sets, kHeldSet));
  held_set_used_ = true;
  for (auto step = steps_.begin(); step != steps_.end() && step->sealed; ++step) step->set.reset();
  free_sets_.insert(free_sets_.end(), sets.begin(), sets.end());
}

void DirtyTracker::seal(std::int64_t seq) {
  const std::lock_guard lock(mutex_);
  find_open("DirtyTracker.seal", seq).sealed = true;
  --open_steps_;
  fold_sealed_steps();
  changed_.notify_all();
}

void DirtyTracker::seal(std::int64_t seq, std::shared_ptr<Event> event) {
  if (!event) refuse("DirtyTracker.seal: event is null, expected one");
  const std::lock_guard lock(mutex_);
  find_open("DirtyTracker.seal", seq).event = std::move(event);
  changed_.notify_all();
}

void DirtyTracker::wait_sealed(std::int64_t seq, Deadline deadline) {
  std::unique_lock lock(mutex_);
  if (await_sealed_locked(lock, seq, nullptr, deadline)) return;
  throw Error(ErrorCode::timeout,
              "DirtyTracker.wait_sealed: step " + std::to_string(last_sealed() + 1) +
                  " was not completed, step " + std::to_string(seq) + " is waited for");
}

bool DirtyTracker::await_sealed(std::int64_t seq, const std::atomic<bool>& stop,
                                Deadline deadline) {
  std::unique_lock lock(mutex_);
  return await_sealed_locked(lock, seq, &stop, deadline);
}

void DirtyTracker::wake() {
  const std::lock_guard lock(mutex_);
  changed_.notify_all();
}

bool DirtyTracker::await_sealed_locked(std::unique_lock<std::mutex>& lock, std::int64_t seq,
                                       const std::atomic<bool>* stop, Deadline deadline) {
  while (true) {
    notice_events();
    const std::int64_t sealed = last_sealed();
    if (sealed >= seq) return true;
    if (deadline.passed() || (stop != nullptr && stop->load())) return false;
    const auto place = static_cast<std::size_t>(sealed + 1 - first_seq_);
    const std::shared_ptr<Event> event = place < steps_.size() ? steps_[place].event : nullptr;
    if (event) {
      lock.unlock();
      try {
        // A wait for the device cannot be woken, so one that may be told to stop is cut short.
        event->wait(stop == nullptr ? deadline : sooner(deadline, kLookAgain));
      } catch (const Error& error) {
        if (error.code() != ErrorCode::timeout) throw;
      }
      lock.lock();
    } else {
      changed_.wait_until(lock, deadline.at());
    }
  }
}

// Seals the steps whose events have passed, up to the first that is not complete.
void DirtyTracker::notice_events() {
  bool any = false;
  for (Step& step : steps_) {
    if (!step.sealed) {
      if (!step.event || !step.event->done()) break;
      step.sealed = true;
      step.event.reset();
      --open_steps_;
      any = true;
    }
  }
  if (!any) return;
  fold_sealed_steps();
  changed_.notify_all();
}

void DirtyTracker::fold_sealed_steps() noexcept {
  while (!steps_.empty() && steps_.front().sealed && (!held_from_ || first_seq_ < *held_from_)) {
    WriteLog& log = steps_.front().log;
    pending_slots_ += log.fold_into(pending_);
    if (steps_.front().set) sealed_sets_.push_back(*steps_.front().set);  // reserved
    keep_log(std::move(log));
    steps_.pop_front();
    ++first_seq_;
  }
}

template <typename Add>
std::uint64_t DirtyTracker::add_external(Add&& add) {
  WriteLog log(num_slots_);
  add(log);
  const std::lock_guard lock(mutex_);
  if (externals_.size() >= kMaxOpenExternals) {
    throw Error(ErrorCode::busy,
                "DirtyTracker.record_external: " + std::to_string(externals_.size()) +
                    " external writes are logged and were never collected");
  }
  externals_.emplace(next_token_, External{std::move(log), held_from_.has_value()});
  ++open_externals_;
  return next_token_++;
}

std::uint64_t DirtyTracker::record_external(std::span<const std::int64_t> slots) {
  return add_external([&](WriteLog& log) { log.add_slots("DirtyTracker.record_external", slots); });
}

std::uint64_t DirtyTracker::record_external_ranges(std::span<const SlotRange> ranges) {
  return add_external(
      [&](WriteLog& log) { log.add_ranges("DirtyTracker.record_external_ranges", ranges); });
}

std::uint64_t DirtyTracker::record_external_blocks(std::span<const std::int64_t> ids,
                                                   std::uint32_t block_size) {
  return add_external([&](WriteLog& log) {
    log.add_blocks("DirtyTracker.record_external_blocks", ids, block_size);
  });
}

void DirtyTracker::seal_external(std::uint64_t token) {
  const std::lock_guard lock(mutex_);
  const auto found = externals_.find(token);
  if (found == externals_.end() || found->second.sealed) {
    refuse("DirtyTracker.seal_external: token " + std::to_string(token) +
           " was never given, is sealed already, or was dropped by a reset");
  }
  --open_externals_;
  if (found->second.held) {
    found->second.sealed = true;
    return;
  }
  pending_slots_ += found->second.log.fold_into(pending_);
  externals_.erase(found);
}

Collected DirtyTracker::collect() {
  const std::lock_guard collecting(collect_mutex_);
  Collected collected;
  std::vector<unsigned> sets;
  std::uint64_t counted_marks = 0;
  if (marks_) sets.reserve(marks_->num_sets());
  {
    const std::lock_guard lock(mutex_);
    notice_events();
    if (marks_) {
      sets = sealed_sets_;
      if (pending_set_used_) sets.push_back(kPendingSet);
      taking_ = !sets.empty();
      sealed_sets_.clear();
      pending_set_used_ = false;
      counted_marks = std::exchange(pending_marks_, 0);
    }
    std::swap(pending_, drained_);
    collected.through_seq = first_seq_ - 1;
    collected.num_slots = std::exchange(pending_slots_, 0);
    collected.generation = ++generation_;
    for (const auto& [token, external] : externals_) {
      collected.open_externals += external.held ? 0 : 1;
    }
  }
  const auto put_back = [this] {
    pending_slots_ += pending_.merge(drained_);
    drained_.clear();
  };
  if (!sets.empty()) {
    std::vector<SlotRange> marked;
    try {
      marks_->take(sets, marked);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      for (const unsigned set : sets) {
        if (set == kPendingSet) {
          pending_set_used_ = true;
        } else {
          sealed_sets_.push_back(set);
        }
      }
      pending_marks_ += counted_marks;
      taking_ = false;
      put_back();
      changed_.notify_all();
      throw;
    }
    for (const SlotRange& range : marked) drained_.set(range.begin, range.count);
    const std::lock_guard lock(mutex_);
    for (const unsigned set : sets) {
      if (set != kPendingSet) free_sets_.push_back(set);
    }
    taking_ = false;
    changed_.notify_all();
  }
  try {
    drained_.drain(collected.ranges);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    put_back();
    throw;
  }
  if (!sets.empty()) collected.num_slots = count_slots(collected.ranges);
  return collected;
}

void DirtyTracker::restore(std::span<const SlotRange> ranges) {
  WriteLog log(num_slots_);
  log.add_ranges("DirtyTracker.restore", ranges);
  const std::lock_guard lock(mutex_);
  pending_slots_ += log.fold_into(pending_);
}

void DirtyTracker::hold_from(std::int64_t seq) {
  const std::lock_guard lock(mutex_);
  if (seq < first_seq_) {
    refuse("DirtyTracker.hold_from: step " + std::to_string(seq) +
           " is sealed and may be collected already, expected at least " +
           std::to_string(first_seq_));
  }
  if (held_from_ && *held_from_ != seq) {
    throw Error(ErrorCode::busy, "DirtyTracker.hold_from: seq is " + std::to_string(seq) +
                                     ", but the steps from " + std::to_string(*held_from_) +
                                     " on are held");
  }
  held_from_ = seq;
}

void DirtyTracker::release_hold() {
  std::unique_lock lock(mutex_);
  if (held_set_used_) {
    await_take(lock);
    if (held_set_used_) {
      const unsigned held = kHeldSet;
      pending_marks_ += marks_->fold({&held, 1}, kPendingSet);
      pending_set_used_ = true;
      held_set_used_ = false;
    }
  }
  held_from_.reset();
  notice_events();
  fold_sealed_steps();
  for (auto external = externals_.begin(); external != externals_.end();) {
    external->second.held = false;
    if (external->second.sealed) {
      pending_slots_ += external->second.log.fold_into(pending_);
      external = externals_.erase(external);
    } else {
      ++external;
    }
  }
}

void DirtyTracker::reset(std::int64_t next_seq) {
  checked_first("DirtyTracker.reset", next_seq);
  // A collect that is under way ends first, so that nothing of it comes back afterwards.
  const std::lock_guard collecting(collect_mutex_);
  const std::lock_guard lock(mutex_);
  if (marks_) marks_->clear();
  free_all_sets();
  steps_.clear();
  externals_.clear();
  pending_.clear();
  pending_slots_ = 0;
  open_steps_ = 0;
  open_externals_ = 0;
  held_from_.reset();
  first_seq_ = next_seq;
  next_seq_ = next_seq;
}

std::int64_t DirtyTracker::next_seq() const {
  const std::lock_guard lock(mutex_);
  return next_seq_;
}

std::int64_t DirtyTracker::last_sealed() const noexcept {
  std::int64_t seq = first_seq_ - 1;
  for (auto step = steps_.begin(); step != steps_.end() && step->sealed; ++step) ++seq;
  return seq;
}

std::int64_t DirtyTracker::sealed_through() {
  const std::lock_guard lock(mutex_);
  notice_events();
  return last_sealed();
}

std::uint64_t DirtyTracker::pending_slots() {
  std::unique_lock lock(mutex_);
  notice_events();
  if (!sealed_sets_.empty()) {
    await_take(lock);
    fold_marks();
  }
  return pending_slots_ + pending_marks_;
}

std::uint64_t DirtyTracker::open_steps() {
  const std::lock_guard lock(mutex_);
  notice_events();
  return open_steps_;
}

std::uint64_t DirtyTracker::open_externals() const {
  const std::lock_guard lock(mutex_);
  return open_externals_;
}

std::uint64_t DirtyTracker::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 2 * pending_.bytes() + (marks_ ? marks_->memory_bytes() : 0);
  for (const Step& step : steps_) bytes += step.log.bytes();
  for (const auto& [token, external] : externals_) bytes += external.log.bytes();
  for (const WriteLog& log : spare_logs_) bytes += log.bytes();
  return bytes;
}

}  // namespace pipelive
