#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/channel.hpp"

namespace pipelive {

/// A small fixed-size frame. What the numbers mean is its kind's business.
struct Note {
  enum class Kind : std::uint16_t {
    message = 1,  ///< followed by a message; `bulk_bytes` go beside it
    credit,       ///< `bytes` of messages were released
    released,     ///< the staging piece `piece` of message `number` is free again
    offer,        ///< the sender of message `number` asks to transfer, for the `attempt`-th time
    accept,       ///< the receiver is ready and holds its device's turn
    reject,       ///< the receiver could not get its device's turn; ask again
    go,           ///< the sender has its turn too: both issue
    withdraw,     ///< the sender could not get its turn; let go of yours
  };
  Kind kind = Kind::message;
  std::uint16_t reserved = 0;
  std::uint32_t piece = 0;
  std::uint64_t number = 0;
  std::uint64_t bytes = 0;
  std::uint64_t bulk_bytes = 0;
  std::uint32_t attempt = 0;
};

/// Messages and notes over one channel, both ways at once.
///
/// A thread of its own reads all that comes, so that a note never waits behind a message that
/// nobody has read yet, and two ends that both send cannot wait on each other. What it holds is
/// bounded: an end may have `window_bytes` of messages (frames included) under way that the other
/// has not released; who exceeds that breaks the protocol.
///
/// Thread-safe. `wait` and the handler of notes run under one mutex, which callers use to guard
/// what the handler changes.
class FrameLink {
 public:
  /// Called in the reading thread, under the mutex, with every note but message and credit. What it
  /// throws ends the link.
  using Handler = std::function<void(const Note&)>;

  struct Incoming {
    Note note;
    std::vector<std::byte> message;
  };

  static constexpr std::size_t kFrameBytes = 64;

  /// Takes the channel over. Throws Error(invalid_argument) where it cannot carry the window.
  FrameLink(std::shared_ptr<Channel> channel, std::size_t window_bytes, Handler handler);
  /// Closes the link and ends the thread. Nothing may be waiting.
  ~FrameLink();

  [[nodiscard]] std::size_t max_message_bytes() const noexcept { return window_ - kFrameBytes; }
  [[nodiscard]] std::string_view base_kind() const noexcept { return channel_->kind(); }

  /// Waits until the window has room for a message of `bytes`.
  void wait_room(std::size_t bytes, Deadline deadline);
  /// Sends a message; `wait_room` has returned for its size.
  void send(const Note& note, std::span<const std::byte> message, Deadline deadline);
  /// Sends a note, which takes a moment: a peer that does not take it within seconds stands still,
  /// and ends the link. No deadline of a caller's counts, since who sends notes may hold what
  /// others wait for.
  void send(const Note& note);
  /// As send, for notes that belong to the state that the mutex guards: `lock` is let go meanwhile.
  void send(std::unique_lock<std::mutex>& lock, const Note& note);

  /// The oldest message that was not dropped yet, or null at the deadline; it stays where it is.
  [[nodiscard]] const Incoming* front(Deadline deadline);
  /// Drops it and gives its room back to the peer.
  void drop_front();

  [[nodiscard]] std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  /// Waits under `held` until `ready`; false at the deadline. Throws once the link has ended.
  template <typename Ready>
  bool wait(std::unique_lock<std::mutex>& held, Deadline deadline, const Ready& ready) {
    while (!ready()) {
      check(held);
      if (changed_.wait_until(held, deadline.at()) == std::cv_status::timeout && !ready()) {
        check(held);
        return false;
      }
    }
    return true;
  }
  /// Throws what ended the link, if something did.
  void check(const std::unique_lock<std::mutex>& held) const;
  [[nodiscard]] bool ended() const;

  void cancel() noexcept { end(true); }
  void close() noexcept { end(false); }
  /// Ends the link for a reason of this end's; the peer sees it closed.
  void fail(const Error& error) noexcept;

 private:
  void read_all();
  void take(std::span<const std::byte> frame);
  void end(bool cancelled) noexcept;

  std::shared_ptr<Channel> channel_;
  const std::size_t window_;
  Handler handler_;

  std::mutex send_mutex_;  // one frame at a time; never taken while mutex_ is held
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Incoming> queue_;
  std::vector<std::vector<std::byte>> spare_;  // buffers of dropped messages
  std::size_t queued_bytes_ = 0;               // received and not dropped, frames included
  std::size_t sent_bytes_ = 0;                 // sent and not released by the peer
  std::optional<Error> failure_;
  bool stopping_ = false;
  std::thread reader_;
};

}  // namespace pipelive
