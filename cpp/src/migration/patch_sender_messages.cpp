// How a sender fills the messages of a round, of a region and of all else.
#include <algorithm>
#include <cstring>
#include <utility>

#include "pipelive/migration/patch_sender.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/slot_copy.hpp"

namespace pipelive {
namespace {

class Stopwatch {
 public:
  explicit Stopwatch(double* total) : total_(total), begin_(Deadline::Clock::now()) {}
  ~Stopwatch() {
    if (total_ == nullptr) return;
    *total_ += std::chrono::duration<double>(Deadline::Clock::now() - begin_).count();
  }

 private:
  double* total_;
  Deadline::Clock::time_point begin_;
};

}  // namespace

wire::Header PatchSender::header(wire::Kind kind) const {
  wire::Header head;
  head.kind = kind;
  head.epoch = options_.epoch;
  head.flags = options_.checksum ? wire::kBodyChecksum : 0;
  return head;
}

void PatchSender::send_payload(wire::Header head, std::span<const std::byte> payload, bool limited,
                               Deadline deadline, double* busy) {
  head.payload_bytes = payload.size();
  const std::size_t size = wire::message_bytes(0, payload.size());
  if (limited) limit_.charge(size, deadline);
  const Stopwatch watch(busy);
  const std::span<std::byte> message = channel_->acquire(size, deadline);
  wire::write_records(message, {});
  std::uint32_t crc = wire::records_crc(message, 0);
  std::byte* const target = message.data() + wire::payload_offset(0);
  if (options_.checksum) {
    crc = crc32c_copy(target, payload, crc);
  } else if (!payload.empty()) {
    std::memcpy(target, payload.data(), payload.size());
  }
  wire::write_header(message, head, crc);
  channel_->submit(size, deadline);
}

std::uint32_t PatchSender::pack(std::span<const wire::Record> records, Packed payload,
                                std::uint32_t crc, Deadline deadline) {
  std::vector<SlotRange> ranges;
  ranges.reserve(records.size());  // the spans below refer to it
  std::vector<LayerSlots> slots;
  for (std::size_t i = 0; i < records.size();) {
    const std::uint32_t layer = records[i].layer;
    const std::size_t first = ranges.size();
    for (; i < records.size() && records[i].layer == layer; ++i) {
      ranges.push_back({records[i].begin, records[i].count});
    }
    const PatchLayer& place = layers_.all()[layers_.at(layer)];
    slots.push_back({&place.layout, place.memory, std::span(ranges).subspan(first)});
  }
  return layers_.copier().gather(slots, payload, options_.checksum, crc, deadline);
}

// How many slots a message with so many records, one more and so many slots still takes.
std::uint64_t PatchSender::room(std::size_t records, std::uint64_t slots) const {
  const std::size_t slot_bytes = layers_.slot_bytes();
  const std::size_t used = wire::message_bytes(records + 1, slots * slot_bytes);
  if (max_beside_ == 0) return used >= max_message_ ? 0 : (max_message_ - used) / slot_bytes;
  if (wire::message_bytes(records + 1, 0) > max_message_) return 0;
  const std::uint64_t all =
      used >= options_.max_message_bytes ? 0 : (options_.max_message_bytes - used) / slot_bytes;
  return std::min<std::uint64_t>(all, max_beside_ / slot_bytes - slots);
}

void PatchSender::send_data(wire::Header head, std::span<wire::Record> records, std::uint64_t slots,
                            Deadline deadline, RoundStats& stats) {
  const std::size_t most_bytes = slots * layers_.slot_bytes();
  limit_.charge(wire::message_bytes(records.size(), most_bytes), deadline);
  const Stopwatch watch(&stats.busy_seconds);
  const std::span<std::byte> message = channel_->acquire(
      wire::message_bytes(records.size(), max_beside_ == 0 ? most_bytes : 0), deadline);
  Bulk bulk;
  if (max_beside_ != 0) {
    head.flags |= wire::kPayloadBeside;
    bulk = channel_->acquire_bulk(most_bytes, deadline);
  }
  std::size_t size = 0;
  std::size_t beside = 0;
  {
    const std::vector<Residency::Use> uses = layers_.use();
    // The capacity may have sunk since the round was planned; what is beyond it is not live.
    const std::uint64_t most = mapped_slots();
    std::size_t kept = 0;
    slots = 0;
    for (wire::Record record : records) {
      const std::uint64_t count =
          record.begin >= most ? 0 : std::min<std::uint64_t>(record.count, most - record.begin);
      stats.skipped_slots += record.count - count;
      if (count == 0) continue;
      record.count = static_cast<std::uint32_t>(count);
      records[kept++] = record;
      slots += count;
    }
    records = records.first(kept);
    if (kept != 0) {
      head.records = static_cast<std::uint32_t>(kept);
      head.payload_bytes = slots * layers_.slot_bytes();
      beside = max_beside_ == 0 ? 0 : head.payload_bytes;
      size = wire::message_bytes(kept, head.payload_bytes - beside);
      wire::write_records(message, records);
      const Packed payload =
          beside == 0 ? Packed{message.data() + wire::payload_offset(kept), head.payload_bytes}
                      : Packed{bulk.data, beside, channel_->bulk_device()->info().kind};
      const std::uint32_t crc = pack(
          records, payload, options_.checksum ? wire::records_crc(message, kept) : 0, deadline);
      wire::write_header(message, head, crc);
    }
  }
  channel_->submit(size, deadline, beside);
  if (size == 0) return;
  stats.messages += 1;
  stats.records += records.size();
  stats.slots += slots;
  stats.bytes += size + beside;
}

std::uint64_t PatchSender::mapped_slots() const {
  const std::uint64_t blocks = layers_.resident_blocks();
  if (blocks == 0 && layers_.size() != 0) {
    throw Error(ErrorCode::not_resident, "one of the moving layers is not held here");
  }
  return blocks * layers_.block_size();
}

std::vector<SlotRange> PatchSender::resident(std::span<const SlotRange> ranges,
                                             std::uint64_t& skipped) const {
  static_cast<void>(count_slots(ranges, layers_.max_slots()));
  const std::uint64_t most = mapped_slots();
  std::vector<SlotRange> kept;
  kept.reserve(ranges.size());
  for (const SlotRange& range : ranges) {
    const std::uint64_t count = range.begin >= most ? 0 : std::min(range.count, most - range.begin);
    skipped += range.count - count;
    if (count != 0) kept.push_back({range.begin, count});
  }
  return kept;
}

void PatchSender::send_region_piece(wire::Header head, ConstPacked piece, Deadline deadline) {
  const std::size_t inside = max_beside_ == 0 ? piece.bytes : 0;
  head.payload_bytes = piece.bytes;
  limit_.charge(wire::message_bytes(0, piece.bytes), deadline);
  const std::span<std::byte> message = channel_->acquire(wire::message_bytes(0, inside), deadline);
  Packed payload{message.data() + wire::payload_offset(0), piece.bytes};
  if (inside == 0) {
    head.flags |= wire::kPayloadBeside;
    const Bulk bulk = channel_->acquire_bulk(piece.bytes, deadline);
    payload = {bulk.data, piece.bytes, channel_->bulk_device()->info().kind};
  }
  layers_.copier().copy(payload, piece, deadline);
  wire::write_records(message, {});
  std::uint32_t crc = 0;
  if (options_.checksum) {
    crc = layers_.copier().crc({payload.data, payload.bytes, payload.where},
                               wire::records_crc(message, 0), deadline);
  }
  wire::write_header(message, head, crc);
  channel_->submit(message.size(), deadline, piece.bytes - inside);
}

}  // namespace pipelive
