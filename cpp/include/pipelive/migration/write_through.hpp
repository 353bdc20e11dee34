#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/slot_range.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "pipelive/tracker/dirty_tracker.hpp"

namespace pipelive {

/// One step's writes on their way; where the sender was behind, those of several steps.
struct SentStep {
  std::uint64_t round = 0;
  std::int64_t through_seq = -1;  ///< the last step in it
  std::uint64_t slots = 0;        ///< of one layer
  std::uint64_t records = 0;      ///< to all targets
  std::uint64_t bytes = 0;        ///< to all targets
  std::int64_t start_ns = 0;      ///< of the steady clock: the step was found sealed
  std::int64_t end_ns = 0;        ///< handed to the channels; the last one: applied
  double busy_seconds = 0.0;      ///< packing and sending
  std::int64_t lag_steps = 0;     ///< steps that were sealed meanwhile
};

/// The source's last mode before a switchover: each step's slots go out as soon as the step is
/// sealed, and nobody waits for the target in between.
///
/// `run` is called by one thread, which nobody has to wake: sealing a step does. It ends when every
/// write of steps up to the one that `end_after` names is applied at every target. The senders send
/// nothing else meanwhile; generations keep a slot that several rounds in flight carry at its
/// newest bytes.
///
/// A connection that is lost on the way may be made again: what the target may not have applied is
/// kept until it has said that it has, and goes out once more (`resume`), and nothing else does.
class WriteThrough {
 public:
  struct Options {
    std::int64_t sent_through = -1;  ///< steps up to this one were sent before
    std::uint64_t first_round = 0;   ///< the number of the next round, for errors and reports
    bool keep_ranges = false;        ///< remember what was sent, for a verification
    double message_seconds = 60.0;   ///< the longest wait for a channel or an acknowledgement
  };
  /// How many of the last rounds are kept.
  static constexpr std::size_t kMostKept = 1024;

  /// Throws Error(invalid_argument) without a tracker or a sender.
  WriteThrough(std::shared_ptr<DirtyTracker> tracker,
               std::vector<std::shared_ptr<PatchSender>> senders, const Options& options);

  /// Sends until the last step is applied (true) or the deadline has passed (false; it may be
  /// called again). Throws Error(cancelled) after cancel(), and what the senders throw.
  [[nodiscard]] bool run(Deadline deadline);

  /// Goes on over `sender`, a new connection to the target of number `place` among the senders,
  /// which has applied `rounds_applied` whole rounds of the connection before and takes no more
  /// of it. Called where run() is called, after run() has thrown. Throws
  /// Error(invalid_argument) for a place or a number of rounds that cannot be, and what `sender`
  /// throws; then it may be called again with another one.
  void resume(std::size_t place, std::shared_ptr<PatchSender> sender, std::uint64_t rounds_applied);

  /// Step `seq` is the last one to send. The tracker holds what later steps write.
  void end_after(std::int64_t seq);
  /// Lets run() end. From any thread, any number of times.
  void cancel();

  [[nodiscard]] std::int64_t sent_through() const;
  [[nodiscard]] std::uint64_t bytes_sent() const;
  /// The last rounds in their order, kMostKept at most, from number `first` on.
  [[nodiscard]] std::vector<SentStep> sent(std::uint64_t first = 0) const;
  /// All slots sent, with keep_ranges; normal ranges.
  [[nodiscard]] std::vector<SlotRange> ranges() const;

 private:
  // What was collected at one time, until every target has applied it.
  struct Kept {
    std::vector<SlotRange> ranges;
    std::int64_t through_seq = -1;
    SentStep step;
  };
  // One connection. Its round `base + i` carries number `first + i` of what was kept; what comes
  // before that is applied up to `floor` for sure.
  struct Link {
    std::shared_ptr<PatchSender> sender;
    std::uint64_t base = 0;
    std::uint64_t first = 0;
    std::uint64_t floor = 0;
    std::uint64_t next = 0;  // to be sent
  };

  void keep(const Collected& collected, std::int64_t start_ns);
  void flush();
  void forget_applied();
  [[nodiscard]] static std::uint64_t applied(const Link& link, std::uint64_t rounds) noexcept;
  void finish();
  [[nodiscard]] std::optional<std::int64_t> last() const;
  [[nodiscard]] Deadline message_deadline() const;

  const std::shared_ptr<DirtyTracker> tracker_;
  const Options options_;
  std::atomic<bool> stop_{false};  // there is news: look at what is below
  std::atomic<bool> cancelled_{false};

  // Used by the thread that runs.
  std::vector<Link> links_;
  std::deque<Kept> kept_;
  std::uint64_t kept_from_ = 0;  // the number of the first one that is kept
  std::uint64_t reported_ = 0;   // the number of the first one that not everybody was sent

  mutable std::mutex mutex_;  // guards all below
  std::optional<std::int64_t> last_;
  std::int64_t sent_through_;
  std::uint64_t next_round_;
  std::uint64_t bytes_ = 0;
  std::deque<SentStep> sent_;
  std::vector<SlotRange> ranges_;
  std::size_t merge_at_ = 4096;
};

}  // namespace pipelive
