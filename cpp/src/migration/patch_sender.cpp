#include "pipelive/migration/patch_sender.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "pipelive/transport/slot_copy.hpp"

namespace pipelive {
namespace {

Deadline now() {
  return Deadline::after(std::chrono::nanoseconds::zero());
}

// A request makes the target read this much at most, so that it answers in good time.
constexpr std::uint64_t kVerifyBytes = std::uint64_t{64} << 20;
constexpr std::size_t kVerifyRanges = 4096;

PatchSender::Options resolved(PatchSender::Options options, const Channel& channel) {
  if (options.max_message_bytes == 0) {
    options.max_message_bytes = std::size_t{channel.bulk_device() == nullptr ? 1U : 16U} << 20;
  }
  return options;
}

}  // namespace

PatchSender::PatchSender(std::shared_ptr<Channel> channel, PatchLayers layers,
                         const Options& options)
    : channel_(std::move(channel)),
      layers_(std::move(layers)),
      options_(resolved(options, *channel_)),
      max_message_(std::min(options_.max_message_bytes, channel_->max_message_bytes())),
      max_beside_(channel_->bulk_device() != nullptr &&
                          channel_->bulk_device()->info().kind == layers_.copier().kind()
                      ? channel_->max_bulk_bytes()
                      : 0),
      limit_(options.rate_limit, max_beside_ == 0 ? max_message_ : options_.max_message_bytes),

      applied_(layers_.size()) {
  if (const std::optional<Stream> stream = layers_.copier().work_stream()) {
    channel_->note_stream(*stream, layers_.shared_copier());
  }
  const std::size_t least =
      std::max(wire::message_bytes(1, layers_.slot_bytes()),
               wire::message_bytes(0, wire::kRoundTotalsBytes + 4 * layers_.size()));
  const std::size_t most = max_beside_ == 0 ? max_message_ : options_.max_message_bytes;
  if (most < least) {
    throw Error(ErrorCode::invalid_argument,
                "max_message_bytes is " + std::to_string(most) +
                    " (the smaller of the option and the channel's), expected " +
                    std::to_string(least) + " or more");
  }
  if (max_beside_ != 0 && max_beside_ < layers_.slot_bytes()) {
    throw Error(ErrorCode::invalid_argument,
                "the channel's staging takes " + std::to_string(max_beside_) +
                    " bytes, a slot of one layer has " + std::to_string(layers_.slot_bytes()));
  }
}

PatchSender::~PatchSender() = default;

// Runs `work` and remembers what ends the session. What the caller got wrong does not end it, nor
// does a deadline where nothing is left half done.
template <typename Work>
auto PatchSender::guarded(const char* phase, bool fatal_timeout, const Work& work)
    -> decltype(work()) {
  check_failed();
  try {
    return work();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::invalid_argument) throw;
    if (error.code() == ErrorCode::closed) {
      // The target says why before it closes; that is the better error.
      try {
        read_available();
      } catch (const Error& reason) {
        if (reason.code() != ErrorCode::closed) {
          fail(Error(reason.code(), "patches of epoch " + std::to_string(options_.epoch) + ", " +
                                        phase + ": " + reason.what()));
        }
      }
    }
    if (error.code() == ErrorCode::timeout && !fatal_timeout) throw;
    fail(Error(error.code(), "patches of epoch " + std::to_string(options_.epoch) + ", " + phase +
                                 ": " + error.what()));
    check_failed();
    throw;
  } catch (const std::bad_alloc&) {
    fail(Error(ErrorCode::out_of_memory, "patches of epoch " + std::to_string(options_.epoch) +
                                             ", " + phase + ": no memory"));
    check_failed();
    throw;
  }
}

void PatchSender::fail(const Error& error) {
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = error;
  changed_.notify_all();
}

void PatchSender::check_failed() {
  const std::lock_guard lock(mutex_);
  if (cancelled_) throw Error(ErrorCode::cancelled, "the patch sender was cancelled");
  if (failure_) throw Error(*failure_);
}

void PatchSender::start(Deadline deadline) {
  if (started_) return;
  started_ = true;
  const wire::Hello hello = wire::make_hello(layers_.spec(), options_.checksum, layers_.ids());
  send_payload(header(wire::Kind::hello), wire::write_hello(hello), false, deadline, nullptr);
}

RoundStats PatchSender::send_round(std::uint64_t round, std::int64_t through_seq,
                                   std::span<const SlotRange> ranges,
                                   std::span<const std::uint32_t> layers, Deadline deadline) {
  const std::string phase = "round " + std::to_string(round);
  return guarded(phase.c_str(), true, [&] {
    if (through_seq < last_through_ || through_seq < -1) {
      throw Error(ErrorCode::invalid_argument, "through_seq is " + std::to_string(through_seq) +
                                                   ", expected " + std::to_string(last_through_) +
                                                   " or more");
    }
    std::vector<std::uint32_t> ids(layers.begin(), layers.end());
    if (ids.empty()) ids.assign(layers_.ids().begin(), layers_.ids().end());
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    SentRound sent{through_seq, {}};
    for (const std::uint32_t id : ids) {
      sent.places.push_back(static_cast<std::uint32_t>(layers_.at(id)));
    }
    RoundStats stats;
    std::uint64_t skipped = 0;
    const std::vector<SlotRange> kept = resident(ranges, skipped);
    stats.skipped_slots = skipped * ids.size();
    start(deadline);

    wire::Header head = header(wire::Kind::data);
    head.round = next_round_;
    head.through_seq = through_seq;
    const std::uint64_t generation = next_round_ + 1;
    const std::uint64_t block = layers_.block_size();
    std::vector<wire::Record> records;
    std::uint64_t slots = 0;
    const auto flush = [&] {
      if (records.empty()) return;
      const std::uint64_t before = stats.messages;
      send_data(head, records, slots, deadline, stats);
      if (stats.messages != before) head.index += 1;
      records.clear();
      slots = 0;
      read_available();
      check_failed();
    };
    for (const std::uint32_t id : ids) {
      for (SlotRange rest : kept) {
        while (rest.count != 0) {
          std::uint64_t take =
              std::min<std::uint64_t>({room(records.size(), slots), rest.count, 0xFFFFFFFFULL});
          if (take < rest.count) {
            // Cut at the end of a block, so that whole blocks stay one copy.
            const std::uint64_t end = (rest.begin + take) / block * block;
            if (end > rest.begin) {
              take = end - rest.begin;
            } else if (!records.empty()) {
              take = 0;
            }
          }
          if (take == 0) {
            flush();
            continue;
          }
          records.push_back({rest.begin, generation, static_cast<std::uint32_t>(take), id});
          slots += take;
          rest.begin += take;
          rest.count -= take;
        }
      }
    }
    flush();

    head.kind = wire::Kind::round_end;
    const wire::RoundTotals totals{stats.messages, stats.records, stats.slots};
    const std::vector<std::byte> end = wire::write_round_end(totals, ids);
    {
      const std::lock_guard lock(mutex_);
      unacknowledged_.push_back(std::move(sent));
    }
    send_payload(head, end, false, deadline, &stats.busy_seconds);
    stats.bytes += wire::message_bytes(0, end.size());
    next_round_ += 1;
    last_through_ = through_seq;
    return stats;
  });
}

void PatchSender::wait_applied(std::int64_t through_seq, Deadline deadline) {
  guarded("waiting for the target to apply them", false, [&] {
    std::unique_lock lock(mutex_);
    wait_until(
        lock, [&] { return applied_.all() >= through_seq; }, deadline,
        "to say that it has applied step " + std::to_string(through_seq));
  });
}

std::int64_t PatchSender::applied_through() {
  guarded("reading acknowledgements", false, [&] { read_available(); });
  const std::lock_guard lock(mutex_);
  return applied_.all();
}

std::uint64_t PatchSender::rounds_acknowledged() {
  guarded("reading acknowledgements", false, [&] { read_available(); });
  const std::lock_guard lock(mutex_);
  return acknowledged_;
}

bool PatchSender::failed() {
  const std::lock_guard lock(mutex_);
  return failure_.has_value() || cancelled_;
}

std::uint64_t PatchSender::verify(std::span<const SlotRange> ranges, Deadline deadline) {
  return guarded("verification", false, [&] {
    std::uint64_t skipped = 0;
    std::vector<SlotRange> rest = resident(ranges, skipped);
    start(deadline);
    const std::uint64_t layer_count = std::max<std::size_t>(1, layers_.size());
    const std::uint64_t most_slots = std::max<std::uint64_t>(
        layers_.block_size(), kVerifyBytes / (layers_.slot_bytes() * layer_count));
    std::size_t most_ranges = kVerifyRanges;
    while (most_ranges > 1 && wire::payload_offset(most_ranges) > max_message_) most_ranges /= 2;
    std::uint64_t compared = 0;
    std::vector<wire::Record> records;
    std::vector<SlotRange> request;
    for (std::size_t i = 0; i < rest.size();) {
      records.clear();
      request.clear();
      std::uint64_t slots = 0;
      while (i < rest.size() && slots < most_slots && records.size() < most_ranges) {
        const std::uint64_t count = std::min(rest[i].count, most_slots - slots);
        records.push_back({rest[i].begin, 0, static_cast<std::uint32_t>(count), wire::kEveryLayer});
        request.push_back({rest[i].begin, count});
        slots += count;
        rest[i].begin += count;
        rest[i].count -= count;
        if (rest[i].count == 0) ++i;
      }
      wire::Header head = header(wire::Kind::verify_request);
      head.index = next_verify_++;
      head.records = static_cast<std::uint32_t>(records.size());
      const std::size_t size = wire::message_bytes(records.size(), 0);
      const std::span<std::byte> message = channel_->acquire(size, deadline);
      wire::write_records(message, records);
      wire::write_header(message, head, wire::records_crc(message, records.size()));
      channel_->submit(size, deadline);
      // Both ends read their memory at the same time.
      std::vector<std::uint64_t> own;
      {
        const std::vector<Residency::Use> uses = layers_.use();
        static_cast<void>(count_slots(request, mapped_slots()));
        for (const PatchLayer& layer : layers_.all()) {
          own.push_back(
              layers_.copier().digest({&layer.layout, layer.memory, request}, 0, deadline));
        }
      }
      std::unique_lock lock(mutex_);
      wait_until(
          lock, [&] { return verified_ == head.index; }, deadline,
          "to verify " + std::to_string(slots) + " slots");
      for (std::size_t place = 0; place < own.size(); ++place) {
        if (place < digests_.size() && digests_[place] == own[place]) continue;
        throw Error(ErrorCode::corrupt, "the bytes of layer " +
                                            std::to_string(layers_.ids()[place]) +
                                            " differ between source and target somewhere in " +
                                            std::to_string(request.size()) + " ranges from slot " +
                                            std::to_string(request.front().begin) + " to " +
                                            std::to_string(request.back().end() - 1));
      }
      compared += slots * layers_.size();
    }
    return compared;
  });
}

// A piece of a region that lies in a device's memory.
void PatchSender::send_region(std::uint64_t id, std::span<const std::byte> bytes, Deadline deadline,
                              DeviceKind where) {
  const std::string phase = "region " + std::to_string(id);
  guarded(phase.c_str(), true, [&] {
    start(deadline);
    const bool beside = max_beside_ != 0 && where == layers_.copier().kind();
    const std::size_t most = beside ? max_beside_ : max_message_ - wire::payload_offset(0);
    wire::Header head = header(wire::Kind::region);
    head.id = id;
    for (std::size_t done = 0; done < bytes.size();) {
      const std::span<const std::byte> piece =
          bytes.subspan(done, std::min(most, bytes.size() - done));
      head.offset = done;
      if (beside || where != DeviceKind::host) {
        send_region_piece(head, {piece.data(), piece.size(), where}, deadline);
      } else {
        send_payload(head, piece, true, deadline, nullptr);
      }
      done += piece.size();
      read_available();
      check_failed();
    }
    head.kind = wire::Kind::region_end;
    head.offset = bytes.size();
    send_payload(head, {}, false, deadline, nullptr);
  });
}

void PatchSender::finish(Deadline deadline) {
  guarded("finishing", true, [&] {
    start(deadline);
    wire::Header head = header(wire::Kind::finish);
    head.round = next_round_;
    head.through_seq = last_through_;
    send_payload(head, {}, false, deadline, nullptr);
    std::unique_lock lock(mutex_);
    wait_until(lock, [&] { return finished_; }, deadline, "to confirm that all is applied");
  });
}

void PatchSender::cancel() {
  limit_.cancel();
  channel_->cancel();
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

template <typename Ready>
void PatchSender::wait_until(std::unique_lock<std::mutex>& lock, const Ready& ready,
                             Deadline deadline, const std::string& what) {
  while (!ready()) {
    if (cancelled_) throw Error(ErrorCode::cancelled, "the patch sender was cancelled");
    if (failure_) throw Error(*failure_);
    if (!reading_) {
      if (read_one(lock, deadline)) continue;
    } else if (changed_.wait_until(lock, deadline.at()) == std::cv_status::no_timeout) {
      continue;
    }
    if (ready()) return;
    if (deadline.passed()) {
      throw Error(ErrorCode::timeout, "waited for the target " + what +
                                          " until the deadline; it has applied up to step " +
                                          std::to_string(applied_.all()));
    }
  }
}

bool PatchSender::read_one(std::unique_lock<std::mutex>& lock, Deadline deadline) {
  reading_ = true;
  lock.unlock();
  struct Reading {
    PatchSender& sender;
    std::unique_lock<std::mutex>& held;
    ~Reading() {
      if (!held.owns_lock()) held.lock();
      sender.reading_ = false;
      sender.changed_.notify_all();
    }
  } reading{*this, lock};
  const auto bytes = channel_->try_receive(deadline);
  if (!bytes) return false;
  // What comes back is small, so a copy costs nothing and leaves the ring free. (Bulk messages,
  // whose payload is not copied, are refused by handle.)
  std::vector<std::byte> copy;
  wire::Message message;
  wire::open_message(*bytes, &copy, message);
  channel_->release();
  lock.lock();
  handle(message);
  return true;
}

void PatchSender::read_available() {
  std::unique_lock lock(mutex_);
  while (!reading_ && read_one(lock, now())) {
  }
}

void PatchSender::handle(const wire::Message& message) {
  const wire::Header& head = message.header;
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::protocol,
                std::string(wire::to_string(head.kind)) + " from the target: " + why);
  };
  if (head.epoch != options_.epoch) {
    refuse("it is of epoch " + std::to_string(head.epoch) + ", expected " +
           std::to_string(options_.epoch));
  }
  switch (head.kind) {
    case wire::Kind::hello: {
      const wire::Hello own = wire::make_hello(layers_.spec(), options_.checksum, layers_.ids());
      const std::string mismatch = wire::describe_mismatch(wire::read_hello(message.payload), own);
      if (!mismatch.empty()) refuse(mismatch);
      hello_seen_ = true;
      return;
    }
    case wire::Kind::ack:
      if (head.round > acknowledged_ + unacknowledged_.size()) {
        refuse("it counts " + std::to_string(head.round) + " rounds, sent were " +
               std::to_string(acknowledged_ + unacknowledged_.size()));
      }
      for (; acknowledged_ < head.round; ++acknowledged_) {
        applied_.complete(unacknowledged_.front().through_seq, unacknowledged_.front().places);
        unacknowledged_.pop_front();
      }
      return;
    case wire::Kind::verify_reply:
      if (message.payload.size() != layers_.size() * sizeof(std::uint64_t)) {
        refuse("it holds " + std::to_string(message.payload.size()) + " bytes for " +
               std::to_string(layers_.size()) + " layers");
      }
      digests_.resize(layers_.size());
      if (!digests_.empty()) {
        std::memcpy(digests_.data(), message.payload.data(), message.payload.size());
      }
      verified_ = head.index;
      return;
    case wire::Kind::finish:
      finished_ = true;
      return;
    case wire::Kind::abort: {
      constexpr auto kLast = static_cast<std::uint64_t>(ErrorCode::device);
      const auto code = head.id <= kLast ? static_cast<ErrorCode>(head.id) : ErrorCode::closed;
      const std::string reason(reinterpret_cast<const char*>(message.payload.data()),
                               std::min<std::size_t>(message.payload.size(), 1024));
      failure_ = Error(code, "patches of epoch " + std::to_string(options_.epoch) +
                                 ": the target gave up: " + reason);
      throw Error(*failure_);
    }
    default:
      refuse("a source does not take that");
  }
}

}  // namespace pipelive
