#include "pipelive/transport/peer_channel.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace pipelive {
namespace {

// A copy within a device takes milliseconds; only a device that hangs takes this long.
constexpr std::chrono::seconds kReleasePatience{30};
constexpr std::uint64_t kBeingFilled = ~std::uint64_t{0};

}  // namespace

PeerChannel::PeerChannel(std::shared_ptr<Channel> base, Options options)
    : options_(std::move(options)),
      held_by_(options_.own ? options_.own->shape().pieces : 0, 0),
      link_(std::move(base), options_.window_bytes, [this](const Note& note) { take_note(note); }) {
  if (!options_.device) {
    throw Error(ErrorCode::invalid_argument, "a p2p channel needs a device");
  }
}

PeerChannel::~PeerChannel() {
  link_.close();
}

void PeerChannel::note_stream(Stream stream, std::shared_ptr<const void> owner) {
  if (options_.own) options_.own->users().note(stream, owner);
  if (options_.peer) options_.peer->users().note(stream, std::move(owner));
}

void PeerChannel::take_note(const Note& note) {
  if (note.kind != Note::Kind::released) {
    throw Error(ErrorCode::protocol, "a p2p channel takes no note of kind " +
                                         std::to_string(static_cast<unsigned>(note.kind)));
  }
  if (note.piece >= held_by_.size() || note.number == 0 || note.number == kBeingFilled ||
      held_by_[note.piece] != note.number) {
    throw Error(ErrorCode::protocol, "the peer releases piece " + std::to_string(note.piece) +
                                         " of message " + std::to_string(note.number) +
                                         ", which it does not have");
  }
  held_by_[note.piece] = 0;
}

std::span<std::byte> PeerChannel::do_acquire(std::size_t bytes, Deadline deadline) {
  link_.wait_room(bytes, deadline);
  return {out_.reserve(bytes), bytes};
}

Bulk PeerChannel::do_acquire_bulk(std::size_t bytes, Deadline deadline) {
  std::unique_lock held = link_.lock();
  link_.check(held);
  const auto find_free = [&] { return std::find(held_by_.begin(), held_by_.end(), 0U); };
  if (!link_.wait(held, deadline, [&] { return find_free() != held_by_.end(); })) {
    throw Error(ErrorCode::timeout, "acquire of " + std::to_string(bytes) +
                                        " bytes of staging: the peer released none of " +
                                        std::to_string(held_by_.size()) +
                                        " pieces before the deadline");
  }
  const auto free = find_free();
  *free = kBeingFilled;
  lent_ = static_cast<std::uint32_t>(free - held_by_.begin());
  return {options_.own->piece(lent_), bytes, options_.stream};
}

void PeerChannel::free_lent() {
  if (lent_ == kNone) return;
  const std::unique_lock held = link_.lock();
  held_by_[lent_] = 0;
  lent_ = kNone;
}

void PeerChannel::wait_stream(Deadline deadline, const char* what) {
  try {
    options_.device->record(options_.stream)->wait(deadline);
  } catch (const Error& error) {
    // Nobody can say when, or whether, the piece is done with.
    const Error named(error.code(), std::string(what) + " a piece of staging: " + error.what());
    link_.fail(named);
    throw named;
  }
}

void PeerChannel::do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) {
  if (bulk_bytes == 0) {
    // What was begun in the piece must not land in it later.
    if (lent_ != kNone) wait_stream(deadline, "giving back");
    free_lent();
    if (bytes == 0) return;
  }
  Note note;
  note.number = next_number_++;
  if (bulk_bytes != 0) {
    wait_stream(deadline, "filling");
    note.piece = lent_;
    note.bulk_bytes = bulk_bytes;
    const std::unique_lock held = link_.lock();
    held_by_[lent_] = note.number;
    lent_ = kNone;
  }
  link_.send(note, {out_.data(), bytes}, deadline);
}

std::optional<std::span<const std::byte>> PeerChannel::do_receive(Deadline deadline) {
  const FrameLink::Incoming* const incoming = link_.front(deadline);
  if (incoming == nullptr) return std::nullopt;
  const Note& note = incoming->note;
  if (note.bulk_bytes != 0) {
    // That the piece is not one which this end still reads is the peer's own care: it would spoil
    // nothing but its own bytes.
    const std::uint32_t pieces = options_.peer ? options_.peer->shape().pieces : 0;
    if (note.piece >= pieces || note.bulk_bytes > options_.peer->shape().piece_bytes) {
      const Error error(ErrorCode::protocol, "the peer sends " + std::to_string(note.bulk_bytes) +
                                                 " bytes in piece " + std::to_string(note.piece) +
                                                 " of its " + std::to_string(pieces));
      link_.fail(error);
      throw error;
    }
  }
  received_ = note;
  return std::span<const std::byte>(incoming->message);
}

Bulk PeerChannel::do_received_bulk() const {
  if (received_.bulk_bytes == 0) return {};
  return {options_.peer->piece(received_.piece), received_.bulk_bytes, options_.stream};
}

void PeerChannel::do_release() {
  const Note note = std::exchange(received_, Note{});
  if (note.bulk_bytes != 0) {
    wait_stream(Deadline::after(kReleasePatience), "reading");
    Note released;
    released.kind = Note::Kind::released;
    released.piece = note.piece;
    released.number = note.number;
    if (!link_.ended()) {
      try {
        link_.send(released);
      } catch (const Error&) {
        // The link has ended; the next receive says why.
      }
    }
  }
  link_.drop_front();
}

}  // namespace pipelive
