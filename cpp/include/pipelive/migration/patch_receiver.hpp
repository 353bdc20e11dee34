#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/migration/generations.hpp"
#include "pipelive/migration/patch_layers.hpp"
#include "pipelive/migration/round_ledger.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/wire.hpp"

namespace pipelive {

/// What a receiver has done so far.
struct ReceiverStats {
  std::uint64_t messages = 0;
  std::uint64_t records = 0;
  std::uint64_t slots = 0;            ///< written, summed over layers
  std::uint64_t overtaken_slots = 0;  ///< not written: a newer generation was there already
  std::uint64_t dropped_slots = 0;    ///< not written: of before a resize that took them away
  std::uint64_t duplicates = 0;       ///< messages that had been applied before
  std::uint64_t bytes = 0;            ///< payload written to slots and regions
  std::uint64_t rounds = 0;           ///< completely applied
  double busy_seconds = 0.0;          ///< checking and writing, not waiting
};

/// A place for raw bytes (a layer's weights).
struct PatchRegion {
  std::uint64_t id = 0;
  std::span<std::byte> bytes;
  std::shared_ptr<const void> owner;
  DeviceKind where = DeviceKind::host;  ///< or that of the moving layers
};

/// The target's end of a migration session: checks everything that arrives and writes it to live
/// memory under the rules of epoch and generation.
///
/// `run` is the only thing that writes, in its callers' threads, and only under a lock that
/// `cancel` and `set_capacity` take too: when either has returned, nothing is written that it
/// forbids.
///
/// A message is checked as a whole before its first byte is written. A record never overwrites a
/// slot that holds a newer generation, whatever order messages come in; a message that comes twice
/// is applied once. A round counts as applied when everything that its end announced is there, and
/// so is every round before it.
class PatchReceiver {
 public:
  struct Options {
    std::uint64_t epoch = 0;

    std::optional<bool> checksum;  ///< demanded (or refused) of the sender; empty: as it likes
  };

  /// Throws Error(invalid_argument): options out of range, a region named twice.
  PatchReceiver(std::shared_ptr<Channel> channel, PatchLayers layers, const Options& options,
                std::vector<PatchRegion> regions = {});
  ~PatchReceiver();

  /// Receives until the source has finished, or until `rounds` rounds are applied and all before
  /// them; true where it has finished. After false it is called again, from any thread: what a
  /// receiver writes first is the bulk, which another thread may take its time for. Any error ends
  /// the session: the source is told why, the channel is closed, and whoever waits is woken with
  /// the same error. Throws Error(invalid_argument) while another call runs, and after the end.
  bool run(Deadline deadline, std::uint64_t rounds = kUntilFinished);
  static constexpr std::uint64_t kUntilFinished = ~std::uint64_t{0};

  /// The gate: waits until every write of steps up to `through_seq` is applied, to all layers or to
  /// the one given. Throws what ended `run`, if it ended before that.
  void wait_applied(std::int64_t through_seq, Deadline deadline,
                    std::optional<std::uint32_t> layer = std::nullopt);
  /// -1 at first.
  [[nodiscard]] std::int64_t applied_through() const;
  /// Rounds that are applied, and all before them; once `run` has ended this stays as it is.
  [[nodiscard]] std::uint64_t rounds_applied() const;
  /// Waits until all bytes of a region are there.
  void wait_region(std::uint64_t id, Deadline deadline);

  /// Tells of a resize: block ids [0, blocks) are usable from step `resize_seq` on (the number in
  /// whose stamp the resize came). When it has returned, nothing is written beyond.
  ///
  /// Memory that is not mapped is never touched, told or not. A record that reaches beyond waits
  /// for the pool to grow, until run's deadline: the source may have grown first. But what a round
  /// of before `resize_seq` says about slots beyond is dropped: the resize has moved what was live
  /// there, and the source sends it again under its new id.
  void set_capacity(std::uint64_t blocks, std::int64_t resize_seq = -1);

  /// Nothing is written any more when this has returned. From any thread, any number of times.
  void cancel();

  [[nodiscard]] ReceiverStats stats() const;
  [[nodiscard]] const PatchLayers& layers() const noexcept { return layers_; }
  [[nodiscard]] std::uint64_t epoch() const noexcept { return options_.epoch; }

 private:
  struct Region {
    PatchRegion place;
    std::uint64_t received = 0;
    bool complete = false;
  };

  // Leave to touch the slots below `slots`.
  struct Access {
    std::unique_lock<std::mutex> lock;
    std::vector<Residency::Use> uses;
    std::uint64_t slots = 0;
  };

  bool receive(Deadline deadline, std::uint64_t rounds);
  bool handle(const wire::Message& message, Deadline deadline);
  void check_header(const wire::Header& header) const;
  void take_hello(const wire::Message& message, Deadline deadline);
  void take_data(const wire::Message& message, Deadline deadline);
  void take_round_end(const wire::Message& message, Deadline deadline);
  void take_verify(const wire::Message& message, Deadline deadline);
  void take_region(const wire::Message& message, Deadline deadline);
  [[nodiscard]] ConstPacked packed(const wire::Message& message,
                                   std::span<const std::byte> bytes) const;
  void take_region_end(const wire::Message& message);
  void take_finish(const wire::Header& finish, Deadline deadline);
  void complete_rounds(Deadline deadline);
  std::uint64_t check_records(const wire::Message& message) const;
  void write_records(const wire::Message& message, std::uint64_t end_slot, Deadline deadline);
  Access access(const wire::Message& message, std::uint64_t end_slot, Deadline deadline);
  void reply(wire::Header header, std::span<const std::byte> payload, Deadline deadline);
  void tell_abort(const Error& error) noexcept;
  [[noreturn]] void fail(ErrorCode code, const std::string& why);
  void end_locked(std::optional<Error> failure);
  template <typename Ready>
  void wait_until(const Ready& ready, Deadline deadline, const std::string& what);

  std::shared_ptr<Channel> channel_;
  PatchLayers layers_;
  Options options_;
  bool checksum_ = false;
  bool hello_seen_ = false;
  RoundLedger ledger_;
  std::vector<Generations> generations_;  // per layer
  std::vector<std::byte> private_;        // what of a message the peer must not change any more
  std::vector<SlotRange> fresh_;
  std::vector<SlotRange> batch_;
  std::vector<std::size_t> batch_places_;  // of batch_, in layers_

  // Held while anything live is written or read; guards the capacity.
  std::mutex memory_mutex_;
  std::condition_variable capacity_changed_;
  std::uint64_t capacity_ = ~std::uint64_t{0};
  std::int64_t resize_seq_ = -1;
  bool cancelled_ = false;

  mutable std::mutex mutex_;  // guards all below; never held while waiting for memory_mutex_
  std::condition_variable changed_;
  AppliedThrough applied_;
  std::map<std::uint64_t, Region> regions_;
  ReceiverStats stats_;
  bool running_ = false;
  bool ended_ = false;
  std::optional<Error> failure_;
};

}  // namespace pipelive
