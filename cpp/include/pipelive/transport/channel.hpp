#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "pipelive/base/deadline.hpp"

namespace pipelive {

struct ChannelStats {
  std::uint64_t messages_sent = 0;
  std::uint64_t bytes_sent = 0;
  std::uint64_t messages_received = 0;
  std::uint64_t bytes_received = 0;
};

/// One duplex, ordered connection that carries whole messages in lent buffers.
///
/// To send: `acquire` a buffer, fill it, `submit` what is to go. To read: `receive` a message, use
/// it, `release` it; it stays valid until then. One thread may send while another receives; two
/// threads may not do the same of the two. `cancel` and `close` may come from any thread.
///
/// Errors: invalid_argument (a message that is larger than the channel can ever carry, calls out of
/// order), timeout (the deadline of the call passed, or the peer made no progress inside a
/// message), closed (this end was closed, or the peer has gone), cancelled (this end was
/// cancelled), protocol (the peer broke the rules). What a peer sent completely before it closed is
/// still received; of what it had sent before it *cancelled*, a shm channel delivers nothing more,
/// and a tcp channel only what had arrived in this end's kernel.
class Channel {
 public:
  Channel() = default;
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;
  virtual ~Channel() = default;

  /// "shm" or "tcp".
  [[nodiscard]] virtual std::string_view kind() const noexcept = 0;
  /// The largest message it can carry.
  [[nodiscard]] virtual std::size_t max_message_bytes() const noexcept = 0;
  /// True where the peer can still write to what `receive` returned.
  [[nodiscard]] virtual bool peer_can_write_received() const noexcept = 0;

  /// A buffer of `bytes` (at least 1), aligned to 64; waits until there is room for it.
  [[nodiscard]] std::span<std::byte> acquire(std::size_t bytes, Deadline deadline);
  /// Sends the first `bytes` of the buffer lent last; 0 gives the buffer back unused.
  void submit(std::size_t bytes, Deadline deadline);

  /// The next message; throws Error(timeout) where none has arrived by the deadline.
  [[nodiscard]] std::span<const std::byte> receive(Deadline deadline);
  /// The same, with an empty optional instead of that error.
  [[nodiscard]] std::optional<std::span<const std::byte>> try_receive(Deadline deadline);
  void release();

  /// Ends everything at once: waiting calls return, every later call throws cancelled, the peer
  /// sees the channel closed without what was still on its way.
  virtual void cancel() noexcept = 0;
  /// Ends this end; the peer may still receive what was submitted.
  virtual void close() noexcept = 0;

  [[nodiscard]] ChannelStats stats() const noexcept;

 protected:
  virtual std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) = 0;
  virtual void do_submit(std::size_t bytes, Deadline deadline) = 0;
  virtual std::optional<std::span<const std::byte>> do_receive(Deadline deadline) = 0;
  virtual void do_release() = 0;

 private:
  std::size_t lent_ = 0;    // bytes of the buffer that the sender holds
  bool receiving_ = false;  // a received message was not yet released
  std::atomic<std::uint64_t> messages_sent_{0};
  std::atomic<std::uint64_t> bytes_sent_{0};
  std::atomic<std::uint64_t> messages_received_{0};
  std::atomic<std::uint64_t> bytes_received_{0};
};

/// Sends a copy of `message`.
void send(Channel& channel, std::span<const std::byte> message, Deadline deadline);

}  // namespace pipelive
