#include "pipelive/migration/patch_receiver.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "pipelive/transport/slot_copier.hpp"

namespace pipelive {
namespace {

// How long a receiver that gives up tries to tell the source why.
constexpr std::chrono::milliseconds kAbortPatience{200};

class Stopwatch {
 public:
  Stopwatch() : begin_(Deadline::Clock::now()) {}
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(Deadline::Clock::now() - begin_).count();
  }

 private:
  Deadline::Clock::time_point begin_;
};

}  // namespace

PatchReceiver::PatchReceiver(std::shared_ptr<Channel> channel, PatchLayers layers,
                             const Options& options, std::vector<PatchRegion> regions)
    : channel_(std::move(channel)),
      layers_(std::move(layers)),
      options_(options),
      applied_(layers_.size()) {
  if (const std::optional<Stream> stream = layers_.copier().work_stream()) {
    channel_->note_stream(*stream, layers_.shared_copier());
  }
  for (const PatchLayer& layer : layers_.all()) {
    generations_.emplace_back(layer.memory.num_blocks * layer.layout.block_size);
  }
  for (PatchRegion& region : regions) {
    const std::uint64_t id = region.id;
    if (!regions_.emplace(id, Region{std::move(region), 0, false}).second) {
      throw Error(ErrorCode::invalid_argument, "region " + std::to_string(id) + " is named twice");
    }
  }
}

PatchReceiver::~PatchReceiver() = default;

bool PatchReceiver::run(Deadline deadline, std::uint64_t rounds) {
  {
    const std::lock_guard lock(mutex_);
    if (running_ || ended_) {
      if (failure_) throw Error(*failure_);
      throw Error(ErrorCode::invalid_argument,
                  running_ ? "run was called while another call of it is under way"
                           : "run was called after the source had finished");
    }
    running_ = true;
  }
  try {
    const bool finished = receive(deadline, rounds);
    const std::lock_guard lock(mutex_);
    running_ = false;
    if (finished) end_locked(std::nullopt);
    return finished;
  } catch (const Error& error) {
    fail(error.code(), error.what());
  } catch (const std::exception& error) {
    fail(ErrorCode::out_of_memory, error.what());
  }
}

// True where the source has finished, false where that many rounds are applied.
bool PatchReceiver::receive(Deadline deadline, std::uint64_t rounds) {
  wire::Message message;
  std::vector<std::byte>* const copy = channel_->peer_can_write_received() ? &private_ : nullptr;
  wire::Beside beside;
  beside.crc = [&](std::span<const std::byte> bytes, std::uint32_t seed) {
    return layers_.copier().crc({bytes.data(), bytes.size(), channel_->bulk_device()->info().kind},
                                seed, deadline);
  };
  while (rounds_applied() < rounds) {
    const std::span<const std::byte> bytes = channel_->receive(deadline);
    const Stopwatch watch;
    const Bulk bulk = channel_->received_bulk();
    beside.bytes = {bulk.data, bulk.bytes};
    wire::open_message(bytes, copy, message, bulk.bytes == 0 ? nullptr : &beside);
    const bool more = handle(message, deadline);
    channel_->release();
    const std::lock_guard lock(mutex_);
    stats_.messages += 1;
    stats_.busy_seconds += watch.seconds();
    if (!more) return true;
  }
  return false;
}

void PatchReceiver::fail(ErrorCode code, const std::string& why) {
  Error named(code, "patches of epoch " + std::to_string(options_.epoch) + ", applying: " + why);
  tell_abort(named);
  channel_->close();
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
    end_locked(named);
  }
  throw named;
}

void PatchReceiver::reply(wire::Header head, std::span<const std::byte> payload,
                          Deadline deadline) {
  head.epoch = options_.epoch;
  head.flags = wire::kBodyChecksum;
  send(*channel_, wire::small_message(head, payload), deadline);
}

void PatchReceiver::tell_abort(const Error& error) noexcept {
  if (error.code() == ErrorCode::closed || error.code() == ErrorCode::cancelled) return;
  try {
    wire::Header head;
    head.kind = wire::Kind::abort;
    head.id = static_cast<std::uint64_t>(error.code());
    const std::string reason(error.what());
    reply(head, std::as_bytes(std::span(reason)), Deadline::after(kAbortPatience));
  } catch (const std::exception&) {
    // The source then sees the channel closed, without the reason.
  }
}

void PatchReceiver::end_locked(std::optional<Error> failure) {
  ended_ = true;
  if (!failure_) failure_ = std::move(failure);
  changed_.notify_all();
}

template <typename Ready>
void PatchReceiver::wait_until(const Ready& ready, Deadline deadline, const std::string& what) {
  std::unique_lock lock(mutex_);
  while (!ready()) {
    if (failure_) throw Error(*failure_);
    if (ended_) {
      throw Error(ErrorCode::closed, "patches of epoch " + std::to_string(options_.epoch) +
                                         ": the source finished before " + what);
    }
    if (changed_.wait_until(lock, deadline.at()) == std::cv_status::timeout && !ready()) {
      if (failure_ || ended_) continue;
      throw Error(ErrorCode::timeout, "patches of epoch " + std::to_string(options_.epoch) +
                                          ": waited for the source until the deadline, before " +
                                          what + "; applied up to step " +
                                          std::to_string(applied_.all()));
    }
  }
}

void PatchReceiver::wait_applied(std::int64_t through_seq, Deadline deadline,
                                 std::optional<std::uint32_t> layer) {
  const bool one = layer.has_value();
  const std::size_t place = one ? layers_.at(*layer) : 0;
  wait_until([&] { return (one ? applied_.layer(place) : applied_.all()) >= through_seq; },
             deadline, "step " + std::to_string(through_seq) + " was applied");
}

std::int64_t PatchReceiver::applied_through() const {
  const std::lock_guard lock(mutex_);
  return applied_.all();
}

std::uint64_t PatchReceiver::rounds_applied() const {
  const std::lock_guard lock(mutex_);
  return stats_.rounds;
}

void PatchReceiver::wait_region(std::uint64_t id, Deadline deadline) {
  {
    const std::lock_guard lock(mutex_);
    if (!regions_.contains(id)) {
      throw Error(ErrorCode::invalid_argument,
                  "region " + std::to_string(id) + " is not registered");
    }
  }
  wait_until([&] { return regions_.at(id).complete; }, deadline,
             "region " + std::to_string(id) + " was complete");
}

void PatchReceiver::set_capacity(std::uint64_t blocks, std::int64_t resize_seq) {
  const std::lock_guard lock(memory_mutex_);
  capacity_ = blocks;
  resize_seq_ = std::max(resize_seq_, resize_seq);
  capacity_changed_.notify_all();
}

void PatchReceiver::cancel() {
  channel_->cancel();
  {
    const std::lock_guard lock(memory_mutex_);
    cancelled_ = true;
    capacity_changed_.notify_all();
  }
  const std::lock_guard lock(mutex_);
  if (!failure_ && !ended_) {
    failure_ = Error(ErrorCode::cancelled, "the patch receiver was cancelled");
  }
  changed_.notify_all();
}

ReceiverStats PatchReceiver::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace pipelive
