#include "pipelive/migration/round_ledger.hpp"

#include <algorithm>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

[[noreturn]] void refuse(std::uint64_t round, const std::string& why) {
  throw Error(ErrorCode::protocol, "round " + std::to_string(round) + ": " + why);
}

}  // namespace

void AppliedThrough::complete(std::int64_t through_seq, std::span<const std::uint32_t> layers) {
  for (const std::uint32_t place : layers) {
    through_.at(place) = std::max(through_.at(place), through_seq);
  }
}

std::int64_t AppliedThrough::all() const noexcept {
  return through_.empty() ? -1 : *std::min_element(through_.begin(), through_.end());
}

bool RoundLedger::seen(const wire::Header& header) const {
  if (header.round < next_) return true;
  const auto found = open_.find(header.round);
  if (found == open_.end()) return false;
  const Round& round = found->second;
  if (round.through_seq != header.through_seq) {
    refuse(header.round, "a message says through_seq " + std::to_string(header.through_seq) +
                             ", one before said " + std::to_string(round.through_seq));
  }
  return header.index < round.messages.size() && round.messages[header.index];
}

RoundLedger::Round& RoundLedger::open(const wire::Header& header) {
  const auto found = open_.find(header.round);
  if (found != open_.end()) {
    if (found->second.through_seq != header.through_seq) static_cast<void>(seen(header));
    return found->second;
  }
  if (open_.size() >= kMostOpenRounds || header.round - next_ >= kMostOpenRounds) {
    refuse(header.round, "it is too far ahead: round " + std::to_string(next_) +
                             " is not complete, " + std::to_string(open_.size()) + " are open");
  }
  Round& round = open_[header.round];
  round.through_seq = header.through_seq;
  return round;
}

void RoundLedger::applied(const wire::Header& header, std::uint64_t slots) {
  if (header.index >= kMostMessages) {
    refuse(header.round, "message number " + std::to_string(header.index) + ", expected below " +
                             std::to_string(kMostMessages));
  }
  Round& round = open(header);
  if (header.index >= round.messages.size()) round.messages.resize(std::size_t{header.index} + 1);
  round.messages[header.index] = true;
  round.got.messages += 1;
  round.got.records += header.records;
  round.got.slots += slots;
  check_totals(header.round, round);
}

void RoundLedger::ended(const wire::Header& header, const wire::RoundTotals& totals,
                        std::vector<std::uint32_t> layers) {
  if (header.round < next_) return;
  Round& round = open(header);
  if (round.has_end && (!(round.expected == totals) || round.layers != layers)) {
    refuse(header.round, "two ends that differ");
  }
  round.has_end = true;
  round.expected = totals;
  round.layers = std::move(layers);
  check_totals(header.round, round);
}

void RoundLedger::check_totals(std::uint64_t number, const Round& round) const {
  if (!round.has_end) return;
  if (round.messages.size() > round.expected.messages ||
      round.got.messages > round.expected.messages || round.got.records > round.expected.records ||
      round.got.slots > round.expected.slots) {
    refuse(number, "more arrived than its end announced (" +
                       std::to_string(round.expected.messages) + " messages)");
  }
  if (round.got.messages == round.expected.messages && !(round.got == round.expected)) {
    refuse(number, "its " + std::to_string(round.expected.messages) + " messages hold " +
                       std::to_string(round.got.records) + " records and " +
                       std::to_string(round.got.slots) + " slots, its end announced " +
                       std::to_string(round.expected.records) + " and " +
                       std::to_string(round.expected.slots));
  }
}

bool RoundLedger::take_completed(Completed& completed) {
  const auto found = open_.find(next_);
  if (found == open_.end() || !found->second.has_end ||
      !(found->second.got == found->second.expected)) {
    return false;
  }
  completed.round = next_++;
  completed.through_seq = found->second.through_seq;
  completed.layers = std::move(found->second.layers);
  open_.erase(found);
  return true;
}

std::string RoundLedger::describe_open() const {
  if (open_.empty()) return "no round is open";
  const auto& [number, round] = *open_.begin();
  return "round " + std::to_string(number) + " has " + std::to_string(round.got.messages) + " of " +
         (round.has_end ? std::to_string(round.expected.messages) : std::string("?")) + " messages";
}

}  // namespace pipelive
