#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/slot_range.hpp"
#include "pipelive/device/device.hpp"
#include "pipelive/tracker/mark_source.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"
#include "pipelive/tracker/write_log.hpp"

namespace pipelive {

/// What one collect took out of a tracker.
struct Collected {
  std::vector<SlotRange> ranges;  ///< sorted, disjoint, maximal
  std::int64_t through_seq = -1;  ///< every write of every step up to this one was collected
  std::uint64_t num_slots = 0;    ///< slots in `ranges`
  std::uint64_t generation = 0;   ///< strictly rises with every collect of a tracker, also past a
                                  ///< reset: of two collects the later holds the newer bytes
  std::uint64_t open_externals = 0;  ///< external writes recorded and not sealed, without those
                                     ///< recorded under a hold: they are not in this collect
};

/// The write log of one stage: which slots have been written and not yet been copied.
///
/// Steps are opened in the order of their numbers, without gaps; several may be open, from several
/// threads, and they may be sealed in any order. A step is sealed when the device has completed it.
/// Only the longest prefix of sealed steps is ever collected, so `through_seq` is exact: a step's
/// writes are either all in what has been collected or none of them are.
///
/// Writers that are not steps (received prefill, swap-in, copy on write) record their slots
/// beforehand for a token, and seal the token when their writes are complete. They do not hold back
/// the prefix: what a step needs from them the engine orders itself. The last collect of a
/// migration must see no open external, or its writes would stay behind.
///
/// A step's slots come from the host (record), or the device that writes them marks them itself
/// (mark), or both. A step is sealed by the host's word or by an event: then it counts as sealed
/// once that has passed, which is looked for whenever the tracker is asked something.
///
/// A writer that failed half-way is sealed all the same: its slots are copied once more than
/// needed.
///
/// Memory is bounded: sealed steps are folded into one bitmap whether or not anyone collects, a log
/// holds at most two bitmaps, and at most kMaxOpenSteps steps and kMaxOpenExternals externals are
/// logged at a time.
///
/// Thread-safe. Every operation that throws leaves the tracker as it was; misuse and bad slots are
/// Error(invalid_argument) that name the index and the value.
class DirtyTracker {
 public:
  static constexpr std::uint64_t kMaxSlots = WriteLog::kMaxSlots;
  static constexpr std::uint64_t kMaxOpenSteps = 65536;
  static constexpr std::uint64_t kMaxOpenExternals = 65536;

  /// Steps are numbered from `next_seq` (at least 0). `marks`, for mark(), has as many slots and
  /// belongs to this tracker alone. Throws Error(invalid_argument) or Error(out_of_memory).
  explicit DirtyTracker(std::uint64_t num_slots, std::int64_t next_seq = 0,
                        std::shared_ptr<MarkSource> marks = nullptr);
  DirtyTracker(const DirtyTracker&) = delete;
  DirtyTracker& operator=(const DirtyTracker&) = delete;

  /// Begins the log of step `seq`, which must be `next_seq()`. Throws Error(busy) where
  /// kMaxOpenSteps steps are logged already, because one of them was never sealed.
  void open(std::int64_t seq);

  /// Adds slots to the open step `seq`; -1 marks a padded row and is skipped.
  void record(std::int64_t seq, std::span<const std::int64_t> slots);
  void record_ranges(std::int64_t seq, std::span<const SlotRange> ranges);
  void record_blocks(std::int64_t seq, std::span<const std::int64_t> ids, std::uint32_t block_size);

  /// What `stream` is given from now on marks its slots for the open step `seq`, until mark() is
  /// called for the next step in that stream; once per step. Steps whose marks are made by
  /// different streams must not overlap on the device. Throws Error(invalid_argument) without a
  /// MarkSource, and Error(busy) where as many steps are in flight as it can keep apart.
  void mark(std::int64_t seq, Stream stream);

  /// Says that the device has completed the open step `seq`.
  void seal(std::int64_t seq);
  /// Says that it has once `event` has passed. A failure that the event reports is thrown by
  /// whatever looks for it next; the step stays open then.
  void seal(std::int64_t seq, std::shared_ptr<Event> event);
  /// Waits until every step up to `seq` is sealed; throws Error(timeout).
  void wait_sealed(std::int64_t seq, Deadline deadline);
  /// The same for a thread that others tell when to stop: true once the steps are sealed, false
  /// where the deadline has passed, or once `stop` is set and wake() was called.
  [[nodiscard]] bool await_sealed(std::int64_t seq, const std::atomic<bool>& stop,
                                  Deadline deadline);
  /// Lets waits for sealed steps look at their flag.
  void wake();

  /// Begins a log outside the steps. Returns its token, which is never given twice. Throws
  /// Error(busy) where kMaxOpenExternals are logged.
  [[nodiscard]] std::uint64_t record_external(std::span<const std::int64_t> slots);
  [[nodiscard]] std::uint64_t record_external_ranges(std::span<const SlotRange> ranges);
  [[nodiscard]] std::uint64_t record_external_blocks(std::span<const std::int64_t> ids,
                                                     std::uint32_t block_size);

  /// Says that the external writes of `token` are complete; the token is used up.
  void seal_external(std::uint64_t token);

  /// Takes the sealed writes since the last collect. Concurrent collects run one after the other.
  [[nodiscard]] Collected collect();

  /// Puts ranges back that were collected but could not be sent; the next collect has them again.
  void restore(std::span<const SlotRange> ranges);

  /// Holds back what steps from `seq` on write, and what externals recorded from now on write,
  /// until release_hold(): collects go on for the steps before, and pending_slots() counts no
  /// other. For a switchover, after which the target and not this stage writes the layers that
  /// moved. Throws Error(invalid_argument) where step `seq` was folded into the marks already, and
  /// Error(busy) where another step is held; holding the same step again changes nothing.
  void hold_from(std::int64_t seq);

  /// Lets the held steps and externals be collected; without a hold it does nothing.
  void release_hold();

  /// Forgets every step, external, mark and hold. The next step to open is `next_seq`; generations
  /// go on.
  void reset(std::int64_t next_seq);

  [[nodiscard]] std::uint64_t num_slots() const noexcept { return num_slots_; }
  /// The number that the next open() must give.
  [[nodiscard]] std::int64_t next_seq() const;
  /// Every step up to this one is sealed; one less than the first step's number at first.
  [[nodiscard]] std::int64_t sealed_through();
  /// Slots that a collect would take now; a slot that both host and device have noted counts twice.
  /// With marks of the device it asks the device.
  [[nodiscard]] std::uint64_t pending_slots();
  /// Steps opened and not sealed; events are looked at in the order of the steps.
  [[nodiscard]] std::uint64_t open_steps();
  /// External writes recorded and not sealed.
  [[nodiscard]] std::uint64_t open_externals() const;
  /// Bytes held by bitmaps and logs.
  [[nodiscard]] std::uint64_t memory_bytes() const;
  /// Where the device's own marks are; null without.
  [[nodiscard]] const std::shared_ptr<MarkSource>& marks() const noexcept { return marks_; }

 private:
  struct Step {
    WriteLog log;
    bool sealed = false;
    std::shared_ptr<Event> event = nullptr;      // seals the step
    std::optional<unsigned> set = std::nullopt;  // where the device marks
  };
  struct External {
    WriteLog log;
    bool held = false;    // recorded under a hold
    bool sealed = false;  // and waiting for the hold to end
  };

  // Sets of marks: those of folded steps that have not been collected yet are moved to kPendingSet
  // when their own set is needed, those of held steps to kHeldSet, and the rest is for steps.
  static constexpr unsigned kPendingSet = 0;
  static constexpr unsigned kHeldSet = 1;
  static constexpr unsigned kFirstStepSet = 2;

  bool await_sealed_locked(std::unique_lock<std::mutex>& lock, std::int64_t seq,
                           const std::atomic<bool>* stop, Deadline deadline);
  void notice_events();
  void fold_sealed_steps() noexcept;
  void await_take(std::unique_lock<std::mutex>& lock);
  void fold_marks();
  void fold_held_marks();
  void free_all_sets();
  [[nodiscard]] std::int64_t last_sealed() const noexcept;
  Step& find_open(const char* caller, std::int64_t seq);
  template <typename Add>
  std::uint64_t add_external(Add&& add);
  WriteLog take_log();
  void keep_log(WriteLog&& log) noexcept;

  const std::uint64_t num_slots_;

  const std::shared_ptr<MarkSource> marks_;

  std::mutex collect_mutex_;  // taken before mutex_; guards drained_
  SlotBitmap drained_;        // empty but while a collect scans it

  mutable std::mutex mutex_;  // guards all that follows
  SlotBitmap pending_;        // the sealed writes since the last collect
  std::uint64_t pending_slots_ = 0;
  std::deque<Step> steps_;  // first_seq_ to next_seq_ - 1; a sealed front is held
  std::int64_t first_seq_;
  std::int64_t next_seq_;
  std::uint64_t open_steps_ = 0;
  std::optional<std::int64_t> held_from_;
  std::unordered_map<std::uint64_t, External> externals_;
  std::uint64_t open_externals_ = 0;
  std::uint64_t next_token_ = 1;
  std::uint64_t generation_ = 0;
  std::condition_variable changed_;  // a step was sealed, or a collect has taken its sets
  std::vector<unsigned> free_sets_;
  std::vector<unsigned> sealed_sets_;  // of steps that were folded
  bool pending_set_used_ = false;
  std::uint64_t pending_marks_ = 0;  // slots in kPendingSet
  bool held_set_used_ = false;
  bool taking_ = false;               // a collect takes sets, without the mutex
  std::vector<WriteLog> spare_logs_;  // emptied logs whose memory the next steps use
};

}  // namespace pipelive
