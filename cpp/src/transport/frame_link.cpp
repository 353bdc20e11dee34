#include "pipelive/transport/frame_link.hpp"

#include <cstring>
#include <string>
#include <utility>

namespace pipelive {
namespace {

static_assert(std::is_trivially_copyable_v<Note> && sizeof(Note) <= FrameLink::kFrameBytes);
static_assert(std::endian::native == std::endian::little);

// How long a note may take to be handed over. The peer's thread reads without pause, so only a
// peer that stands still takes long.
constexpr std::chrono::seconds kNotePatience{5};
// The reading thread is woken by what comes and by close; the slice only bounds one call.
constexpr std::chrono::seconds kReadSlice{1};
// How long the reading thread may take for what a peer has left behind.
constexpr std::chrono::seconds kLastWords{1};
constexpr std::size_t kSpareBuffers = 4;

std::size_t framed(std::size_t bytes) {
  return FrameLink::kFrameBytes + bytes;
}

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorCode::protocol, "a frame from the peer: " + why);
}

}  // namespace

FrameLink::FrameLink(std::shared_ptr<Channel> channel, std::size_t window_bytes, Handler handler)
    : channel_(std::move(channel)), window_(window_bytes), handler_(std::move(handler)) {
  if (window_ < 2 * kFrameBytes || window_ > channel_->max_message_bytes()) {
    throw Error(ErrorCode::invalid_argument,
                "the window is " + std::to_string(window_) + " bytes, expected " +
                    std::to_string(2 * kFrameBytes) + " to the " +
                    std::to_string(channel_->max_message_bytes()) + " of a " +
                    std::string(channel_->kind()) + " channel's largest message");
  }
  reader_ = std::thread([this] { read_all(); });
}

FrameLink::~FrameLink() {
  close();
  reader_.join();
}

void FrameLink::read_all() {
  try {
    while (true) {
      const auto frame = channel_->try_receive(Deadline::after(kReadSlice));
      if (frame) {
        take(*frame);
        channel_->release();
      }
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
    }
  } catch (const Error& error) {
    fail(error);
  } catch (const std::exception& error) {
    fail(Error(ErrorCode::out_of_memory, std::string("reading frames: ") + error.what()));
  }
}

void FrameLink::take(std::span<const std::byte> frame) {
  if (frame.size() < kFrameBytes) refuse("it has " + std::to_string(frame.size()) + " bytes");
  Note note;
  std::memcpy(&note, frame.data(), sizeof note);
  const std::span<const std::byte> rest = frame.subspan(kFrameBytes);
  if ((note.kind == Note::Kind::message) == rest.empty()) {
    refuse(std::to_string(rest.size()) + " bytes follow a note of kind " +
           std::to_string(static_cast<unsigned>(note.kind)));
  }
  const std::lock_guard lock(mutex_);
  switch (note.kind) {
    case Note::Kind::message: {
      if (framed(rest.size()) > window_ - queued_bytes_) {
        refuse("a message of " + std::to_string(rest.size()) + " bytes beyond the window of " +
               std::to_string(window_));
      }
      std::vector<std::byte> copy;
      if (!spare_.empty()) {
        copy = std::move(spare_.back());
        spare_.pop_back();
      }
      copy.assign(rest.begin(), rest.end());
      queued_bytes_ += framed(rest.size());
      queue_.push_back({note, std::move(copy)});
      break;
    }
    case Note::Kind::credit:
      if (note.bytes > sent_bytes_) {
        refuse("it releases " + std::to_string(note.bytes) + " bytes, under way are " +
               std::to_string(sent_bytes_));
      }
      sent_bytes_ -= note.bytes;
      break;
    case Note::Kind::released:
    case Note::Kind::offer:
    case Note::Kind::accept:
    case Note::Kind::reject:
    case Note::Kind::go:
    case Note::Kind::withdraw:
      handler_(note);
      break;
    default:
      refuse("a note of kind " + std::to_string(static_cast<unsigned>(note.kind)));
  }
  changed_.notify_all();
}

void FrameLink::check(const std::unique_lock<std::mutex>& /*held*/) const {
  if (failure_) throw Error(*failure_);
}

bool FrameLink::ended() const {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

void FrameLink::wait_room(std::size_t bytes, Deadline deadline) {
  std::unique_lock held(mutex_);
  check(held);
  if (!wait(held, deadline, [&] { return window_ - sent_bytes_ >= framed(bytes); })) {
    throw Error(ErrorCode::timeout, "acquire of " + std::to_string(bytes) +
                                        " bytes: the peer released too little of the " +
                                        std::to_string(sent_bytes_) +
                                        " under way before the deadline");
  }
}

void FrameLink::send(const Note& note, std::span<const std::byte> message, Deadline deadline) {
  const std::lock_guard sending(send_mutex_);
  {
    std::unique_lock held(mutex_);
    check(held);
    if (!message.empty()) sent_bytes_ += framed(message.size());
  }
  try {
    const std::span<std::byte> frame = channel_->acquire(framed(message.size()), deadline);
    std::memset(frame.data(), 0, kFrameBytes);
    std::memcpy(frame.data(), &note, sizeof note);
    if (!message.empty()) {
      std::memcpy(frame.data() + kFrameBytes, message.data(), message.size());
    }
    channel_->submit(frame.size(), deadline);
  } catch (const Error& error) {
    std::unique_lock held(mutex_);
    if (error.code() == ErrorCode::closed) {
      // What the peer sent before it went, its reason perhaps, is still being read.
      changed_.wait_for(held, kLastWords, [&] { return failure_.has_value(); });
    }
    held.unlock();
    // Half a frame may be on its way; and a peer that misses a note waits in vain.
    fail(error);
    held.lock();
    check(held);
    throw;
  }
}

void FrameLink::send(const Note& note) {
  send(note, {}, Deadline::after(kNotePatience));
}

void FrameLink::send(std::unique_lock<std::mutex>& held, const Note& note) {
  held.unlock();
  try {
    send(note);
  } catch (...) {
    held.lock();
    throw;
  }
  held.lock();
}

const FrameLink::Incoming* FrameLink::front(Deadline deadline) {
  std::unique_lock held(mutex_);
  // What came completely before the end is still there to be read, unless this end was cancelled
  // or closed.
  if (stopping_) check(held);
  if (queue_.empty() && !wait(held, deadline, [&] { return !queue_.empty(); })) return nullptr;
  return &queue_.front();
}

void FrameLink::drop_front() {
  Note note;
  note.kind = Note::Kind::credit;
  {
    const std::lock_guard lock(mutex_);
    note.bytes = framed(queue_.front().message.size());
    queued_bytes_ -= note.bytes;
    if (spare_.size() < kSpareBuffers) spare_.push_back(std::move(queue_.front().message));
    queue_.pop_front();
    if (failure_) return;
  }
  try {
    send(note);
  } catch (const Error&) {
    // The link has ended; the next call says why. What was released needs no answer.
  }
}

void FrameLink::fail(const Error& error) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = error;
    changed_.notify_all();
  }
  channel_->close();
}

void FrameLink::end(bool cancelled) noexcept {
  {
    const std::lock_guard lock(mutex_);
    const bool again =
        stopping_ && failure_ && (!cancelled || failure_->code() == ErrorCode::cancelled);
    if (!again) {
      stopping_ = true;
      failure_ = cancelled ? Error(ErrorCode::cancelled, "the channel was cancelled")
                           : Error(ErrorCode::closed, "the channel was closed here");
    }
    changed_.notify_all();
  }
  if (cancelled) {
    channel_->cancel();
  } else {
    channel_->close();
  }
}

}  // namespace pipelive
