// What a receiver does with each kind of message: checks it as a whole, then writes.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "pipelive/migration/patch_receiver.hpp"
#include "pipelive/transport/slot_copier.hpp"

namespace pipelive {
namespace {

constexpr std::chrono::milliseconds kGrowthPoll{1};

[[noreturn]] void refuse(wire::Kind kind, const std::string& why) {
  throw Error(ErrorCode::protocol, std::string(wire::to_string(kind)) + " refused: " + why);
}

}  // namespace

void PatchReceiver::check_header(const wire::Header& header) const {
  if (header.epoch != options_.epoch) {
    refuse(header.kind, "it is of epoch " + std::to_string(header.epoch) + ", expected " +
                            std::to_string(options_.epoch));
  }
  if (!hello_seen_) {
    if (header.kind != wire::Kind::hello) refuse(header.kind, "the first message must be a hello");
    return;
  }
  if (checksum_ != ((header.flags & wire::kBodyChecksum) != 0)) {
    refuse(header.kind, checksum_ ? "it carries no checksum, which the hello promised"
                                  : "it carries a checksum, which the hello denied");
  }
  const bool may_have_records =
      header.kind == wire::Kind::data || header.kind == wire::Kind::verify_request;
  if (!may_have_records && header.records != 0) {
    refuse(header.kind, "it has " + std::to_string(header.records) + " records, expected none");
  }
}

bool PatchReceiver::handle(const wire::Message& message, Deadline deadline) {
  check_header(message.header);
  switch (message.header.kind) {
    case wire::Kind::hello:
      take_hello(message, deadline);
      return true;
    case wire::Kind::data:
      take_data(message, deadline);
      return true;
    case wire::Kind::round_end:
      take_round_end(message, deadline);
      return true;
    case wire::Kind::verify_request:
      take_verify(message, deadline);
      return true;
    case wire::Kind::region:
      take_region(message, deadline);
      return true;
    case wire::Kind::region_end:
      take_region_end(message);
      return true;
    case wire::Kind::finish:
      take_finish(message.header, deadline);
      return false;
    case wire::Kind::abort: {
      const std::string reason(reinterpret_cast<const char*>(message.payload.data()),
                               std::min<std::size_t>(message.payload.size(), 1024));
      throw Error(ErrorCode::closed, "the source gave up: " + reason);
    }
    default:
      refuse(message.header.kind, "a target does not take that");
  }
}

void PatchReceiver::take_hello(const wire::Message& message, Deadline deadline) {
  if (hello_seen_) refuse(wire::Kind::hello, "a second one");
  const wire::Hello hello = wire::read_hello(message.payload);
  const bool checksum = options_.checksum.value_or(hello.checksum == 1);
  const wire::Hello own = wire::make_hello(layers_.spec(), checksum, layers_.ids());
  const std::string mismatch = wire::describe_mismatch(hello, own);
  if (!mismatch.empty()) refuse(wire::Kind::hello, mismatch);
  hello_seen_ = true;
  checksum_ = checksum;
  wire::Header head;
  head.kind = wire::Kind::hello;
  reply(head, wire::write_hello(own), deadline);
}

// Part of a message's payload, wherever it came to lie.
ConstPacked PatchReceiver::packed(const wire::Message& message,
                                  std::span<const std::byte> bytes) const {
  return {bytes.data(), bytes.size(),
          message.beside() ? channel_->bulk_device()->info().kind : DeviceKind::host};
}

// Everything about the records that does not depend on the capacity. Returns the slots.
std::uint64_t PatchReceiver::check_records(const wire::Message& message) const {
  const wire::Kind kind = message.header.kind;
  const std::uint64_t max_slots = layers_.max_slots();
  const std::uint64_t newest = message.header.round + 1;
  std::uint64_t slots = 0;
  for (const wire::Record& record : message.records) {
    if (kind == wire::Kind::data && layers_.find(record.layer) < 0) {
      refuse(kind, "layer " + std::to_string(record.layer) + " is not one of the moving layers");
    }
    if (kind == wire::Kind::verify_request && record.layer != wire::kEveryLayer) {
      refuse(kind, "it names layer " + std::to_string(record.layer));
    }
    if (record.count == 0 || record.count > max_slots || record.begin > max_slots - record.count) {
      refuse(kind, "slots [" + std::to_string(record.begin) + ", +" + std::to_string(record.count) +
                       ") are not inside the " + std::to_string(max_slots) + " slots of the pool");
    }
    if (kind == wire::Kind::data && record.generation > newest) {
      refuse(kind, "a record of generation " + std::to_string(record.generation) +
                       " in a round whose own is " + std::to_string(newest));
    }
    slots += record.count;  // both factors are below 2^32, so this cannot overflow
  }
  return slots;
}

// Access to live memory, once every slot below `end_slot` may be touched.
PatchReceiver::Access PatchReceiver::access(const wire::Message& message, std::uint64_t end_slot,
                                            Deadline deadline) {
  std::unique_lock lock(memory_mutex_);
  while (true) {
    if (cancelled_) throw Error(ErrorCode::cancelled, "the patch receiver was cancelled");
    std::uint64_t blocks = 0;
    {
      std::vector<Residency::Use> uses = layers_.use();
      blocks = std::min(capacity_, layers_.resident_blocks());
      const std::uint64_t slots = blocks * layers_.block_size();
      if (end_slot <= slots || message.header.through_seq < resize_seq_) {
        return {std::move(lock), std::move(uses), slots};
      }
    }
    if (deadline.passed()) {
      throw Error(ErrorCode::not_resident,
                  "a " + std::string(wire::to_string(message.header.kind)) + " of round " +
                      std::to_string(message.header.round) + " reaches to slot " +
                      std::to_string(end_slot - 1) + ", mapped are " + std::to_string(blocks) +
                      " blocks of " + std::to_string(layers_.block_size()));
    }
    // The pool does not tell when it grows, so it is asked again soon.
    capacity_changed_.wait_until(lock,
                                 std::min(deadline.at(), Deadline::Clock::now() + kGrowthPoll));
  }
}

void PatchReceiver::take_data(const wire::Message& message, Deadline deadline) {
  const std::uint64_t slots = check_records(message);
  const std::size_t slot_bytes = layers_.slot_bytes();
  if (message.records.empty()) refuse(wire::Kind::data, "it has no records");
  if (slots > message.payload.size() / slot_bytes || slots * slot_bytes != message.payload.size()) {
    refuse(wire::Kind::data, "its records name " + std::to_string(slots) + " slots of " +
                                 std::to_string(slot_bytes) + " bytes, its payload has " +
                                 std::to_string(message.payload.size()));
  }
  if (ledger_.seen(message.header)) {
    const std::lock_guard lock(mutex_);
    stats_.duplicates += 1;
    return;
  }
  // Noted first, because it refuses what contradicts the round; nothing has been written then.
  ledger_.applied(message.header, slots);
  std::uint64_t end_slot = 0;
  for (const wire::Record& record : message.records) {
    end_slot = std::max(end_slot, record.begin + record.count);
  }
  {
    const Access live = access(message, end_slot, deadline);
    write_records(message, live.slots, deadline);
  }
  complete_rounds(deadline);
}

void PatchReceiver::write_records(const wire::Message& message, std::uint64_t end,
                                  Deadline deadline) {
  const std::size_t slot_bytes = layers_.slot_bytes();

  std::uint64_t written = 0;
  std::uint64_t overtaken = 0;
  std::uint64_t dropped = 0;
  SlotCopier& copier = layers_.copier();
  std::span<const std::byte> batch_bytes;
  std::span<const std::byte> rest = message.payload;
  std::vector<LayerSlots> batch_slots;
  const auto flush = [&] {
    if (batch_.empty()) return;
    batch_slots.clear();
    for (std::size_t i = 0; i < batch_.size();) {
      const std::size_t first = i;
      while (i < batch_.size() && batch_places_[i] == batch_places_[first]) ++i;
      const PatchLayer& layer = layers_.all()[batch_places_[first]];
      batch_slots.push_back(
          {&layer.layout, layer.memory, std::span(batch_).subspan(first, i - first)});
    }
    copier.scatter(batch_slots, packed(message, batch_bytes), deadline);
    batch_.clear();
    batch_places_.clear();
    batch_bytes = {};
  };
  batch_.clear();
  batch_places_.clear();
  for (const wire::Record& record : message.records) {
    const SlotRange range{record.begin, record.count};
    const std::span<const std::byte> bytes = rest.first(range.count * slot_bytes);
    rest = rest.subspan(bytes.size());
    const auto place = static_cast<std::size_t>(layers_.find(record.layer));
    const std::uint64_t inside = range.begin >= end ? 0 : std::min(range.count, end - range.begin);
    dropped += range.count - inside;
    generations_[place].claim({range.begin, inside}, record.generation, fresh_);
    std::uint64_t claimed = 0;
    for (const SlotRange& part : fresh_) claimed += part.count;
    overtaken += inside - claimed;
    written += claimed;
    if (claimed == range.count) {
      // Records that lie one behind the other in the payload go out together.
      batch_bytes =
          batch_.empty() ? bytes : std::span(batch_bytes.data(), batch_bytes.size() + bytes.size());
      batch_.push_back(range);
      batch_places_.push_back(place);
      continue;
    }
    flush();
    const PatchLayer& layer = layers_.all()[place];
    for (const SlotRange& part : fresh_) {
      copier.scatter_part(layer.layout, layer.memory, range, packed(message, bytes), part,
                          deadline);
    }
  }
  flush();
  // What leaves this function under the lock on the memory must not be written to any more.
  copier.finish(deadline);
  const std::lock_guard lock(mutex_);
  stats_.records += message.records.size();
  stats_.slots += written;
  stats_.overtaken_slots += overtaken;
  stats_.dropped_slots += dropped;
  stats_.bytes += written * slot_bytes;
}

void PatchReceiver::take_round_end(const wire::Message& message, Deadline deadline) {
  std::vector<std::uint32_t> layers = wire::read_round_layers(message.payload);
  for (std::uint32_t& layer : layers) {
    const std::ptrdiff_t place = layers_.find(layer);
    if (place < 0) {
      refuse(wire::Kind::round_end,
             "layer " + std::to_string(layer) + " is not one of the moving layers");
    }
    layer = static_cast<std::uint32_t>(place);
  }
  ledger_.ended(message.header, wire::read_round_totals(message.payload), std::move(layers));
  complete_rounds(deadline);
}

void PatchReceiver::complete_rounds(Deadline deadline) {
  RoundLedger::Completed completed;
  bool any = false;
  wire::Header head;
  head.kind = wire::Kind::ack;
  while (ledger_.take_completed(completed)) {
    any = true;
    const std::lock_guard lock(mutex_);
    applied_.complete(completed.through_seq, completed.layers);
    stats_.rounds += 1;
    head.through_seq = applied_.all();
    changed_.notify_all();
  }
  if (!any) return;
  head.round = ledger_.num_completed();
  reply(head, {}, deadline);
}

void PatchReceiver::take_verify(const wire::Message& message, Deadline deadline) {
  static_cast<void>(check_records(message));
  if (!message.payload.empty()) refuse(wire::Kind::verify_request, "it has a payload");
  batch_.clear();
  std::uint64_t end_slot = 0;
  for (const wire::Record& record : message.records) {
    batch_.push_back({record.begin, record.count});
    end_slot = std::max(end_slot, record.begin + record.count);
  }
  std::vector<std::uint64_t> digests;
  {
    const Access live = access(message, end_slot, deadline);
    if (end_slot > live.slots) {
      refuse(wire::Kind::verify_request, "slot " + std::to_string(end_slot - 1) +
                                             " is not among the " + std::to_string(live.slots) +
                                             " that are mapped");
    }
    for (const PatchLayer& layer : layers_.all()) {
      digests.push_back(
          layers_.copier().digest({&layer.layout, layer.memory, batch_}, 0, deadline));
    }
  }
  wire::Header head;
  head.kind = wire::Kind::verify_reply;
  head.index = message.header.index;
  reply(head, std::as_bytes(std::span(digests)), deadline);
}

void PatchReceiver::take_region(const wire::Message& message, Deadline deadline) {
  const wire::Header& head = message.header;
  std::span<std::byte> target;
  DeviceKind where = DeviceKind::host;
  {
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(head.id);
    if (found == regions_.end()) {
      refuse(head.kind, "region " + std::to_string(head.id) + " is not registered");
    }
    const Region& region = found->second;
    const std::span<std::byte> all = region.place.bytes;
    if (head.offset > all.size() || message.payload.size() > all.size() - head.offset) {
      refuse(head.kind, std::to_string(message.payload.size()) + " bytes at " +
                            std::to_string(head.offset) + " are not inside region " +
                            std::to_string(head.id) + " of " + std::to_string(all.size()));
    }
    if (head.offset > region.received) {
      refuse(head.kind, "bytes " + std::to_string(region.received) + " to " +
                            std::to_string(head.offset - 1) + " of region " +
                            std::to_string(head.id) + " have not come");
    }
    if (region.complete) {
      stats_.duplicates += 1;
      return;
    }
    target = all.subspan(head.offset, message.payload.size());
    where = region.place.where;
  }
  {
    const std::lock_guard lock(memory_mutex_);
    if (cancelled_) throw Error(ErrorCode::cancelled, "the patch receiver was cancelled");
    const ConstPacked from = packed(message, message.payload);
    if (where != DeviceKind::host || from.where != DeviceKind::host) {
      layers_.copier().copy({target.data(), target.size(), where}, from, deadline);
    } else if (!target.empty()) {
      std::memcpy(target.data(), from.data, target.size());
    }
  }
  const std::lock_guard lock(mutex_);
  Region& region = regions_.at(head.id);
  region.received = std::max(region.received, head.offset + message.payload.size());
  stats_.bytes += target.size();
}

void PatchReceiver::take_region_end(const wire::Message& message) {
  const wire::Header& head = message.header;
  const std::lock_guard lock(mutex_);
  const auto found = regions_.find(head.id);
  if (found == regions_.end()) {
    refuse(head.kind, "region " + std::to_string(head.id) + " is not registered");
  }
  Region& region = found->second;
  if (head.offset != region.place.bytes.size() || head.offset != region.received) {
    refuse(head.kind, "region " + std::to_string(head.id) + " ends at " +
                          std::to_string(head.offset) + "; it has " +
                          std::to_string(region.place.bytes.size()) + " bytes, of which " +
                          std::to_string(region.received) + " have come");
  }
  region.complete = true;
  changed_.notify_all();
}

void PatchReceiver::take_finish(const wire::Header& finish, Deadline deadline) {
  if (finish.round != ledger_.num_completed() || ledger_.num_open() != 0) {
    refuse(wire::Kind::finish, "not everything has come: it ends " + std::to_string(finish.round) +
                                   " rounds, complete are " +
                                   std::to_string(ledger_.num_completed()) + "; " +
                                   ledger_.describe_open());
  }
  wire::Header head;
  head.kind = wire::Kind::finish;
  head.round = ledger_.num_completed();
  reply(head, {}, deadline);
}

}  // namespace pipelive
