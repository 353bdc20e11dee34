#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "pipelive/device/unique_fd.hpp"
#include "pipelive/transport/aligned_buffer.hpp"
#include "pipelive/transport/channel.hpp"

namespace pipelive {

struct TcpOptions {
  std::size_t max_message_bytes = std::size_t{64} << 20;
  /// Inside a message, this many bytes (or what is left of it) must pass in each `progress_window`,
  /// or the message fails with timeout however far off the deadline is: a peer that drips bytes
  /// does not hold this end for ever.
  std::size_t progress_bytes = std::size_t{64} << 10;
  std::chrono::nanoseconds progress_window = std::chrono::seconds(5);
};

/// Messages over a connected stream socket, each behind an 8-byte length; the lent buffers are this
/// end's own memory. A message that was cut off by a deadline while it was *sent* leaves the
/// channel unusable; one that was cut off while it was *received* is continued by the next receive.
class TcpChannel final : public Channel {
 public:
  /// Takes the descriptor, a connected stream socket; throws Error(device) where it is not one.
  explicit TcpChannel(UniqueFd socket, TcpOptions options = {});
  ~TcpChannel() override;

  [[nodiscard]] std::string_view kind() const noexcept override { return "tcp"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override {
    return options_.max_message_bytes;
  }
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return false; }
  void cancel() noexcept override;
  void close() noexcept override;

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) override;
  void do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) override;
  std::optional<std::span<const std::byte>> do_receive(Deadline deadline) override;
  void do_release() override;

 private:
  enum class Local : int { open, closed, cancelled };

  // Holds a message to the progress rule.
  class Progress {
   public:
    Progress() = default;
    void start(const TcpOptions& options);
    void add(std::size_t bytes, std::size_t left, const TcpOptions& options);
    [[nodiscard]] Deadline::Clock::time_point at() const { return at_; }

   private:
    Deadline::Clock::time_point at_{};
    std::size_t needed_ = 0;
    std::size_t passed_ = 0;
  };

  enum class Wake { ready, deadline, stalled };

  Wake wait(short events, Deadline deadline, const Progress* progress);
  void check_local() const;
  void end(Local state) noexcept;
  [[noreturn]] void fail_peer(const char* call, int error);

  UniqueFd socket_;
  UniqueFd wakeup_;  // eventfd: readable once this end was closed or cancelled
  TcpOptions options_;
  AlignedBuffer send_buffer_;
  AlignedBuffer receive_buffer_;
  bool send_failed_ = false;
  // The message being received; it survives a deadline.
  std::uint64_t head_word_ = 0;
  std::size_t head_got_ = 0;
  std::size_t body_got_ = 0;
  Progress receive_progress_;
  std::atomic<Local> local_{Local::open};
};

}  // namespace pipelive
