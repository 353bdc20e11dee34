#include "pipelive/cuda/nccl_channel.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace pipelive::cuda {
namespace {

constexpr std::chrono::seconds kReleasePatience{30};
constexpr std::chrono::microseconds kFirstPause{50};
constexpr unsigned kMostDoublings = 3;  // pauses of up to 0.4 ms, less than a turn is left free

}  // namespace

NcclChannel::NcclChannel(std::shared_ptr<Channel> base, Options options)
    : options_(std::move(options)),
      comm_([&]() -> NcclComm& {
        if (!options_.comm || !options_.turn) {
          throw Error(ErrorCode::invalid_argument,
                      "a nccl channel needs a communicator and its device's turn");
        }
        if (options_.comm->ranks() != 2) {
          throw Error(ErrorCode::invalid_argument, "the communicator has " +
                                                       std::to_string(options_.comm->ranks()) +
                                                       " ranks, expected the two ends");
        }
        if (!options_.out || !options_.in || options_.out == options_.in ||
            options_.out->device() != options_.comm->device() ||
            options_.in->device() != options_.comm->device()) {
          throw Error(ErrorCode::invalid_argument,
                      "a nccl channel needs staging for either direction on its device");
        }
        return *options_.comm;
      }()),
      jitter_(std::random_device()()),
      link_(std::move(base), options_.window_bytes, [this](const Note& note) { take_note(note); }) {
}

NcclChannel::~NcclChannel() {
  close();
}

void NcclChannel::note_stream(Stream stream, std::shared_ptr<const void> owner) {
  options_.out->users().note(stream, owner);
  options_.in->users().note(stream, std::move(owner));
}

void NcclChannel::cancel() noexcept {
  link_.cancel();
  comm_.abort();
}

void NcclChannel::close() noexcept {
  link_.close();
  comm_.abort();
}

std::uint64_t NcclChannel::retries() {
  const std::unique_lock held = link_.lock();
  return retries_;
}

// Runs in the reading thread, under the link's mutex.
void NcclChannel::take_note(const Note& note) {
  const auto refuse = [&](const char* why) {
    throw Error(ErrorCode::protocol,
                "a note of kind " + std::to_string(static_cast<unsigned>(note.kind)) +
                    " for message " + std::to_string(note.number) + ": " + why);
  };
  switch (note.kind) {
    case Note::Kind::accept:
    case Note::Kind::reject:
      if (offered_attempt_ == 0 || note.number != offered_number_ ||
          note.attempt != offered_attempt_ || answer_) {
        refuse("this end has made no such offer");
      }
      answer_ = note;
      return;
    case Note::Kind::offer:
      if (note.number == 0 || note.attempt == 0 || offer_) refuse("an offer out of turn");
      offer_ = note;
      return;
    case Note::Kind::go:
    case Note::Kind::withdraw:
      if (verdict_) refuse("a second verdict");
      verdict_ = note;
      return;
    default:
      refuse("a nccl channel takes no such note");
  }
}

void NcclChannel::fail(const Error& error, const std::string& what) {
  const Error named(error.code(), what + ": " + error.what());
  link_.fail(named);
  comm_.abort();
  // A cancel or a close of this end's own is the better reason.
  const std::unique_lock held = link_.lock();
  link_.check(held);
  throw named;
}

void NcclChannel::wait_stream(Deadline deadline, const char* what) {
  try {
    comm_.device()->record(comm_.stream())->wait(deadline);
  } catch (const Error& error) {
    fail(error, std::string(what) + " a piece of staging");
  }
}

std::span<std::byte> NcclChannel::do_acquire(std::size_t bytes, Deadline deadline) {
  link_.wait_room(bytes, deadline);
  return {out_.reserve(bytes), bytes};
}

Bulk NcclChannel::do_acquire_bulk(std::size_t bytes, Deadline /*deadline*/) {
  // submit waits for the transfer, so the piece is always free here.
  const std::unique_lock held = link_.lock();
  link_.check(held);
  lent_ = true;
  return {options_.out->piece(0), bytes, comm_.stream()};
}

void NcclChannel::do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) {
  if (std::exchange(lent_, false)) {
    wait_stream(deadline, bulk_bytes == 0 ? "giving back" : "filling");
  }
  if (bytes == 0) return;
  Note note;
  note.bulk_bytes = bulk_bytes;
  if (bulk_bytes != 0) note.number = next_number_++;
  link_.send(note, {out_.data(), bytes}, deadline);
  if (bulk_bytes != 0) push(note.number, bulk_bytes, deadline);
}

void NcclChannel::back_off(std::unique_lock<std::mutex>& held, std::uint32_t attempt,
                           Deadline deadline) {
  retries_ += 1;
  const auto most = kFirstPause * (1U << std::min(attempt, kMostDoublings));
  const auto pause = std::chrono::microseconds(1 + jitter_() % static_cast<unsigned>(most.count()));
  const Deadline until = Deadline::after(pause);
  static_cast<void>(
      link_.wait(held, until.at() < deadline.at() ? until : deadline, [] { return false; }));
}

std::string NcclChannel::describe_tries(std::uint32_t attempt) const {
  const std::string holder = options_.turn->holder();
  return "; offered " + std::to_string(attempt) + " times" +
         (holder.empty() ? std::string() : "; the turn here is held by " + holder);
}

// The sender's half of the handshake, and the transfer.
void NcclChannel::push(std::uint64_t number, std::size_t bytes, Deadline deadline) {
  Note note;
  note.number = number;
  for (note.attempt = 1;; ++note.attempt) {
    std::unique_lock held = link_.lock();
    offered_number_ = number;
    offered_attempt_ = note.attempt;
    answer_.reset();
    note.kind = Note::Kind::offer;
    link_.send(held, note);
    if (!link_.wait(held, deadline, [&] { return answer_.has_value(); })) {
      held.unlock();
      fail(Error(ErrorCode::timeout, "the peer did not answer the offer of message " +
                                         std::to_string(number) + " before the deadline" +
                                         describe_tries(note.attempt)),
           "sending by NCCL");
    }
    const bool accepted = answer_->kind == Note::Kind::accept;
    answer_.reset();
    offered_attempt_ = 0;
    if (accepted) {
      if (options_.turn->try_take("a patch that is sent by NCCL")) {
        const TurnHeld turn(*options_.turn);
        note.kind = Note::Kind::go;
        link_.send(held, note);
        held.unlock();
        try {
          comm_.send(options_.out->piece(0), bytes, peer(),
                     Deadline::after(options_.transfer_limit), options_.out,
                     [this] { return link_.ended(); });
        } catch (const Error& error) {
          fail(error, "sending by NCCL");
        }
        return;
      }
      note.kind = Note::Kind::withdraw;
      link_.send(held, note);
    }
    back_off(held, note.attempt, deadline);
    if (deadline.passed()) {
      held.unlock();
      fail(Error(ErrorCode::timeout,
                 "the two devices' turns were not free together before the deadline" +
                     describe_tries(note.attempt)),
           "sending by NCCL");
    }
  }
}

// The receiver's half. False where the sender has not offered by the deadline.
bool NcclChannel::pull(const Note& message, Deadline deadline) {
  std::unique_lock held = link_.lock();
  while (true) {
    if (!link_.wait(held, deadline, [&] { return offer_.has_value(); })) return false;
    Note note = *offer_;
    offer_.reset();
    verdict_.reset();
    if (note.number != message.number) {
      held.unlock();
      fail(Error(ErrorCode::protocol, "the peer offers message " + std::to_string(note.number) +
                                          ", the oldest is " + std::to_string(message.number)),
           "receiving by NCCL");
    }
    if (!options_.turn->try_take("a patch that is received by NCCL")) {
      note.kind = Note::Kind::reject;
      link_.send(held, note);
      continue;
    }
    const TurnHeld turn(*options_.turn);
    note.kind = Note::Kind::accept;
    link_.send(held, note);
    // Not the caller's deadline, which may be a day: the engine waits for the turn meanwhile.
    if (!link_.wait(held, Deadline::after(options_.verdict_patience),
                    [&] { return verdict_.has_value(); })) {
      held.unlock();
      fail(Error(ErrorCode::timeout, "the peer's offer was accepted, but it did not go on"),
           "receiving by NCCL");
    }
    const Note verdict = *std::exchange(verdict_, std::nullopt);
    if (verdict.number != note.number || verdict.attempt != note.attempt) {
      held.unlock();
      fail(Error(ErrorCode::protocol, "the peer decides on another offer than the one accepted"),
           "receiving by NCCL");
    }
    if (verdict.kind == Note::Kind::withdraw) continue;
    held.unlock();
    try {
      comm_.receive(options_.in->piece(0), message.bulk_bytes, peer(),
                    Deadline::after(options_.transfer_limit), options_.in,
                    [this] { return link_.ended(); });
    } catch (const Error& error) {
      fail(error, "receiving by NCCL");
    }
    return true;
  }
}

std::optional<std::span<const std::byte>> NcclChannel::do_receive(Deadline deadline) {
  const FrameLink::Incoming* const incoming = link_.front(deadline);
  if (incoming == nullptr) return std::nullopt;
  const Note& note = incoming->note;
  if (note.bulk_bytes != 0) {
    if (note.bulk_bytes > options_.in->shape().piece_bytes || note.number != expected_number_) {
      fail(Error(ErrorCode::protocol, "the peer announces " + std::to_string(note.bulk_bytes) +
                                          " bytes beside message " + std::to_string(note.number) +
                                          "; expected were " +
                                          std::to_string(options_.in->shape().piece_bytes) +
                                          " at most beside " + std::to_string(expected_number_)),
           "receiving by NCCL");
    }
    if (!pull(note, deadline)) return std::nullopt;
    expected_number_ += 1;
  }
  received_bytes_ = note.bulk_bytes;
  return std::span<const std::byte>(incoming->message);
}

Bulk NcclChannel::do_received_bulk() const {
  if (received_bytes_ == 0) return {};
  return {options_.in->piece(0), received_bytes_, comm_.stream()};
}

void NcclChannel::do_release() {
  if (std::exchange(received_bytes_, 0) != 0) {
    wait_stream(Deadline::after(kReleasePatience), "reading");
  }
  link_.drop_front();
}

}  // namespace pipelive::cuda
