#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/base/slot_range.hpp"
#include "pipelive/migration/patch_layers.hpp"
#include "pipelive/migration/rate_limit.hpp"
#include "pipelive/migration/round_ledger.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/wire.hpp"

namespace pipelive {

/// What one round consisted of.
struct RoundStats {
  std::uint64_t records = 0;
  std::uint64_t messages = 0;
  std::uint64_t bytes = 0;          ///< as sent, headers and tables included
  std::uint64_t slots = 0;          ///< summed over layers
  std::uint64_t skipped_slots = 0;  ///< beyond what is mapped, so not live; summed over layers
  double busy_seconds = 0.0;        ///< packing and sending; not waiting for the rate limit or acks
};

/// The source's end of a migration session: packs slot ranges of the moving layers straight into
/// the channel's buffers and sends them, round by round.
///
/// One thread sends. Others may call wait_applied, applied_through, set_rate_limit and cancel.
/// After an error in the middle of a message, and after a peer's refusal, every call throws that
/// error again.
class PatchSender {
 public:
  struct Options {
    std::uint64_t epoch = 0;
    /// Bounds a message and what goes beside it; the channel bounds both further. 0: 1 MiB, which a
    /// core's cache holds, or 16 MiB where a device's memory goes beside messages.
    std::size_t max_message_bytes = 0;
    double rate_limit = 0.0;  ///< bytes per second; 0 for none
    bool checksum = true;
  };

  /// Sends nothing yet. Throws Error(invalid_argument) where an option is out of range or a message
  /// of that size cannot hold one slot.
  PatchSender(std::shared_ptr<Channel> channel, PatchLayers layers, const Options& options);
  ~PatchSender();

  /// Sends `ranges` of `layers` (ids; all moving layers where empty) and the round's end.
  ///
  /// `round` only names the round in errors. `through_seq` (-1 or more, not less than before) says
  /// that with this round every write of steps up to it has been sent. Slots that are not mapped
  /// are skipped, since nothing live is there; a layer that is not held throws Error(not_resident).
  /// Returns when all is handed to the channel, not when it is applied.
  RoundStats send_round(std::uint64_t round, std::int64_t through_seq,
                        std::span<const SlotRange> ranges, std::span<const std::uint32_t> layers,
                        Deadline deadline);
  /// Waits until the target has applied every write of steps up to `through_seq` to all layers.
  void wait_applied(std::int64_t through_seq, Deadline deadline);
  /// The target's last word on that; -1 at first. Reads what has arrived, without waiting.
  [[nodiscard]] std::int64_t applied_through();
  /// Rounds that were begun, and of these from the first on: how many the target has said to have
  /// applied (what has arrived of its answers is read, without waiting).
  [[nodiscard]] std::uint64_t rounds_sent() const noexcept { return next_round_; }
  [[nodiscard]] std::uint64_t rounds_acknowledged();
  /// Whether nothing can be sent any more; every call throws then.
  [[nodiscard]] bool failed();

  /// Compares digests of `ranges`, layer by layer, with the target's. Nobody may be writing to them
  /// on either side. Throws Error(corrupt) naming the layer. Returns the number of slots compared,
  /// summed over layers.
  std::uint64_t verify(std::span<const SlotRange> ranges, Deadline deadline);

  /// Sends bytes to a region that the target has registered, and its end. They lie in host memory
  /// or, where the moving layers do, in a device's.
  void send_region(std::uint64_t id, std::span<const std::byte> bytes, Deadline deadline,
                   DeviceKind where = DeviceKind::host);

  /// Says that nothing more comes, and waits until the target has confirmed that all is applied.
  void finish(Deadline deadline);

  void set_rate_limit(double bytes_per_second) { limit_.set(bytes_per_second); }
  /// Nothing is sent any more when this has returned. From any thread, any number of times.
  void cancel();

  [[nodiscard]] const PatchLayers& layers() const noexcept { return layers_; }
  [[nodiscard]] std::uint64_t epoch() const noexcept { return options_.epoch; }

 private:
  struct SentRound {
    std::int64_t through_seq = -1;
    std::vector<std::uint32_t> places;
  };

  [[nodiscard]] wire::Header header(wire::Kind kind) const;
  void start(Deadline deadline);
  void send_payload(wire::Header head, std::span<const std::byte> payload, bool limited,
                    Deadline deadline, double* busy);
  void send_data(wire::Header head, std::span<wire::Record> records, std::uint64_t slots,
                 Deadline deadline, RoundStats& stats);
  void send_region_piece(wire::Header head, ConstPacked piece, Deadline deadline);
  std::uint32_t pack(std::span<const wire::Record> records, Packed payload, std::uint32_t crc,
                     Deadline deadline);
  [[nodiscard]] std::uint64_t room(std::size_t records, std::uint64_t slots) const;
  [[nodiscard]] std::uint64_t mapped_slots() const;
  [[nodiscard]] std::vector<SlotRange> resident(std::span<const SlotRange> ranges,
                                                std::uint64_t& skipped) const;

  template <typename Work>
  auto guarded(const char* phase, bool fatal_timeout, const Work& work) -> decltype(work());
  void fail(const Error& error);
  void check_failed();
  // Reading what the target sends; `mutex_` is held and let go while it waits.
  template <typename Ready>
  void wait_until(std::unique_lock<std::mutex>& lock, const Ready& ready, Deadline deadline,
                  const std::string& what);
  bool read_one(std::unique_lock<std::mutex>& lock, Deadline deadline);
  void read_available();
  void handle(const wire::Message& message);

  std::shared_ptr<Channel> channel_;
  PatchLayers layers_;
  Options options_;
  std::size_t max_message_;
  std::size_t max_beside_;  // 0: payloads go inside the messages
  RateLimit limit_;
  bool started_ = false;
  std::uint64_t next_round_ = 0;
  std::int64_t last_through_ = -1;
  std::uint32_t next_verify_ = 0;

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  bool reading_ = false;
  bool cancelled_ = false;
  std::optional<Error> failure_;
  std::deque<SentRound> unacknowledged_;
  std::uint64_t acknowledged_ = 0;
  AppliedThrough applied_;
  bool hello_seen_ = false;
  bool finished_ = false;
  std::optional<std::uint32_t> verified_;
  std::vector<std::uint64_t> digests_;
};

}  // namespace pipelive
