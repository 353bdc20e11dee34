#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "fuzz_tools.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/frame_link.hpp"

namespace pipelive::fuzz {

/// A peer under a FrameLink. `feed` returns once the link's thread has taken the frame and waits
/// for the next, so that an input is worked through in the same order every time.
class FeedChannel final : public Channel {
 public:
  [[nodiscard]] std::string_view kind() const noexcept override { return "feed"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override { return 1U << 20; }
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return false; }
  void cancel() noexcept override { close(); }
  void close() noexcept override {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  /// False once the channel has ended.
  bool feed(std::vector<std::byte> frame) {
    std::unique_lock lock(mutex_);
    frame_ = std::move(frame);
    full_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return closed_ || !full_; });
    return !closed_;
  }
  /// Waits until this end has sent `frames` in all, or for `most`.
  void await_sent(std::uint64_t frames, std::chrono::nanoseconds most) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, most, [&] { return closed_ || sent_ >= frames; });
  }
  [[nodiscard]] std::uint64_t sent() {
    const std::lock_guard lock(mutex_);
    return sent_;
  }

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline /*deadline*/) override {
    check();
    out_.assign(bytes, std::byte{0});
    return out_;
  }
  void do_submit(std::size_t bytes, std::size_t /*bulk*/, Deadline /*deadline*/) override {
    check();
    const std::lock_guard lock(mutex_);
    if (bytes != 0) ++sent_;
    changed_.notify_all();
  }
  std::optional<std::span<const std::byte>> do_receive(Deadline deadline) override {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline.at(), [&] { return closed_ || (full_ && !taken_); });
    if (closed_) throw Error(ErrorCode::closed, "the feeder has ended");
    if (!full_) return std::nullopt;
    taken_ = true;
    return std::span<const std::byte>(frame_);
  }
  void do_release() override {
    const std::lock_guard lock(mutex_);
    full_ = taken_ = false;
    frame_ = {};
    changed_.notify_all();
  }

 private:
  void check() {
    const std::lock_guard lock(mutex_);
    if (closed_) throw Error(ErrorCode::closed, "the feeder has ended");
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::byte> out_;  // of the thread that sends; a link sends one frame at a time
  std::vector<std::byte> frame_;
  bool full_ = false;
  bool taken_ = false;
  bool closed_ = false;
  std::uint64_t sent_ = 0;
};

/// A note and, after one of a message, its bytes: numbers are small, so that some of them fit.
inline std::vector<std::byte> next_frame(Input& input) {
  Note note;
  const auto kind = input.take<std::uint8_t>();
  note.kind = static_cast<Note::Kind>(kind % 16);
  note.piece = input.take<std::uint8_t>();
  note.number = input.take<std::uint8_t>();
  note.attempt = input.take<std::uint8_t>();
  note.bytes = std::uint64_t{input.take<std::uint8_t>()} * 16;
  note.bulk_bytes = std::uint64_t{input.take<std::uint8_t>()} * 256;
  if ((kind & 0x80) != 0) note.number = input.take<std::uint64_t>();
  if ((kind & 0x40) != 0) note.bulk_bytes = note.bytes = input.take<std::uint64_t>();
  if ((kind & 0x20) != 0) note.piece = input.take<std::uint32_t>();
  std::vector<std::byte> frame(FrameLink::kFrameBytes);
  std::memcpy(frame.data(), &note, sizeof note);
  const std::span<const std::byte> rest = (kind & 0x10) != 0 || note.kind == Note::Kind::message
                                              ? input.bytes(input.take<std::uint8_t>())
                                              : std::span<const std::byte>();
  frame.insert(frame.end(), rest.begin(), rest.end());
  if (note.kind == Note::Kind::message && rest.empty()) frame.push_back(std::byte{1});
  return frame;
}

}  // namespace pipelive::fuzz
