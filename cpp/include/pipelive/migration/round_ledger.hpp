#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "pipelive/transport/wire.hpp"

namespace pipelive {

/// What a layer has for sure: every write of steps up to through_seq.
///
/// A round counts once every round before it is complete too, since it carries only what was
/// written after them; a layer advances by the rounds that named it. Both ends keep one of these,
/// so an acknowledgement is a single number.
class AppliedThrough {
 public:
  explicit AppliedThrough(std::size_t num_layers) : through_(num_layers, -1) {}

  /// `layers` are places, not ids.
  void complete(std::int64_t through_seq, std::span<const std::uint32_t> layers);
  /// The smallest over all layers; -1 where there is none.
  [[nodiscard]] std::int64_t all() const noexcept;
  [[nodiscard]] std::int64_t layer(std::size_t place) const { return through_.at(place); }

 private:
  std::vector<std::int64_t> through_;
};

/// Which messages of which rounds have arrived. Rounds may arrive in any order, and so may the
/// messages of a round and its end; what came before is recognised. Its memory is bounded: a peer
/// that leaves many rounds open or numbers its messages wildly is refused.
class RoundLedger {
 public:
  static constexpr std::size_t kMostOpenRounds = 64;
  static constexpr std::uint32_t kMostMessages = 1U << 22;

  struct Completed {
    std::uint64_t round = 0;
    std::int64_t through_seq = -1;
    std::vector<std::uint32_t> layers;
  };

  /// True where this message of this round has been applied before: it is a duplicate. Throws
  /// Error(protocol) where its numbers contradict what the round has said before.
  [[nodiscard]] bool seen(const wire::Header& header) const;
  /// Notes that a message has been applied: that many records and slots.
  void applied(const wire::Header& header, std::uint64_t slots);
  /// Notes the end of a round; a second end that says the same is harmless. Throws Error(protocol).
  void ended(const wire::Header& header, const wire::RoundTotals& totals,
             std::vector<std::uint32_t> layers);

  /// Takes the next round that is complete, in order; false where it is not complete yet.
  [[nodiscard]] bool take_completed(Completed& completed);
  /// Rounds that are complete and have only complete ones before them.
  [[nodiscard]] std::uint64_t num_completed() const noexcept { return next_; }
  /// Rounds that have begun and are not complete, or complete but with a gap before them.
  [[nodiscard]] std::size_t num_open() const noexcept { return open_.size(); }
  /// "round 3 has 5 of 6 messages", for an error.
  [[nodiscard]] std::string describe_open() const;

 private:
  struct Round {
    std::int64_t through_seq = -1;
    wire::RoundTotals got;
    wire::RoundTotals expected;
    bool has_end = false;
    std::vector<bool> messages;
    std::vector<std::uint32_t> layers;
  };

  Round& open(const wire::Header& header);
  void check_totals(std::uint64_t number, const Round& round) const;

  std::map<std::uint64_t, Round> open_;
  std::uint64_t next_ = 0;
};

}  // namespace pipelive
