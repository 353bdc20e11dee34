#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "pipelive/base/deadline.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive {

struct ChannelStats {
  std::uint64_t messages_sent = 0;
  std::uint64_t bytes_sent = 0;
  std::uint64_t messages_received = 0;
  std::uint64_t bytes_received = 0;
};

/// Bytes that go beside a message, in the memory of the channel's `bulk_device`. Who fills or reads
/// them does it in the order of `stream`, and need not wait for it: `submit` and `release` do.
struct Bulk {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  Stream stream;
};

/// One duplex, ordered connection that carries whole messages in lent buffers.
///
/// To send: `acquire` a buffer, fill it, `submit` what is to go. To read: `receive` a message, use
/// it, `release` it; it stays valid until then. One thread may send while another receives; two
/// threads may not do the same of the two. `cancel` and `close` may come from any thread.
///
/// Messages lie in host memory. A channel that has a `bulk_device` also takes bytes from its
/// memory along: `acquire_bulk` between acquire and submit lends a place for them, and the peer
/// finds them in `received_bulk` until it releases the message. What arrives there must not be
/// written to: it can be the peer's own memory.
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

  /// "shm", "tcp", "p2p" or "nccl".
  [[nodiscard]] virtual std::string_view kind() const noexcept = 0;
  /// The largest message it can carry.
  [[nodiscard]] virtual std::size_t max_message_bytes() const noexcept = 0;
  /// True where the peer can still write to what `receive` returned.
  [[nodiscard]] virtual bool peer_can_write_received() const noexcept = 0;

  /// Where the bytes that go beside a message lie; null where a message is all there is.
  [[nodiscard]] virtual const Device* bulk_device() const noexcept { return nullptr; }
  /// The most bytes that can go beside one message from this end; 0 where none can.
  [[nodiscard]] virtual std::size_t max_bulk_bytes() const noexcept { return 0; }

  /// A buffer of `bytes` (at least 1), aligned to 64; waits until there is room for it.
  [[nodiscard]] std::span<std::byte> acquire(std::size_t bytes, Deadline deadline);
  /// A place of `bytes` (at least 1) beside the buffer lent last, aligned to 256.
  [[nodiscard]] Bulk acquire_bulk(std::size_t bytes, Deadline deadline);
  /// Sends the first `bytes` of the buffer lent last, and the first `bulk_bytes` of the place
  /// beside it once its stream is done with them; 0 `bytes` gives both back unused.
  void submit(std::size_t bytes, Deadline deadline, std::size_t bulk_bytes = 0);

  /// The next message; throws Error(timeout) where none has arrived by the deadline.
  [[nodiscard]] std::span<const std::byte> receive(Deadline deadline);
  /// The same, with an empty optional instead of that error.
  [[nodiscard]] std::optional<std::span<const std::byte>> try_receive(Deadline deadline);
  /// What came beside the message received last; of 0 bytes where nothing did.
  [[nodiscard]] Bulk received_bulk() const;
  /// Gives the message and what came beside it back, once its stream is done with it.
  void release();

  /// Work in `stream` fills or reads what goes beside messages; its memory outlives that work.
  /// `owner` is kept, as the stream must be, until then.
  virtual void note_stream(Stream /*stream*/, std::shared_ptr<const void> /*owner*/) {}

  /// Ends everything at once: waiting calls return, every later call throws cancelled, the peer
  /// sees the channel closed without what was still on its way.
  virtual void cancel() noexcept = 0;
  /// Ends this end; the peer may still receive what was submitted.
  virtual void close() noexcept = 0;

  [[nodiscard]] ChannelStats stats() const noexcept;

 protected:
  virtual std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) = 0;
  /// `bytes` is 0 where the buffer, and the bulk if there is one, are given back.
  virtual void do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) = 0;
  virtual std::optional<std::span<const std::byte>> do_receive(Deadline deadline) = 0;
  virtual void do_release() = 0;
  // Only of channels with a bulk_device.
  virtual Bulk do_acquire_bulk(std::size_t bytes, Deadline deadline);
  [[nodiscard]] virtual Bulk do_received_bulk() const { return {}; }

 private:
  std::size_t lent_ = 0;       // bytes of the buffer that the sender holds
  std::size_t lent_bulk_ = 0;  // and of the place beside it
  bool receiving_ = false;     // a received message was not yet released
  std::atomic<std::uint64_t> messages_sent_{0};
  std::atomic<std::uint64_t> bytes_sent_{0};
  std::atomic<std::uint64_t> messages_received_{0};
  std::atomic<std::uint64_t> bytes_received_{0};
};

/// Sends a copy of `message`.
void send(Channel& channel, std::span<const std::byte> message, Deadline deadline);

}  // namespace pipelive
