#pragma once

#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "pipelive/cuda/device_turn.hpp"
#include "pipelive/cuda/nccl_comm.hpp"
#include "pipelive/transport/aligned_buffer.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/frame_link.hpp"
#include "pipelive/transport/staging.hpp"

namespace pipelive::cuda {

/// Payloads by NCCL between two devices, of one host or of two ("nccl"); messages and notes go over
/// another channel.
///
/// A message goes first and says what comes beside it. Then the two ends agree on the moment:
///
///     sender    offer ----------------->           as often as it takes
///     receiver         <---- accept, holding its device's turn; or reject, if it could not get it
///     sender    go, holding its own turn ->  or withdraw, if it could not get it
///     both issue, wait for completion, and give their turns back
///
/// Nobody waits for a turn while holding one, so two ends that offer to each other at once, and
/// engines whose own NCCL work holds the turns, hold a transfer up but never stop it for good. Work
/// that ignores the turns can; then the transfer ends at its limit, the communicator is aborted,
/// and both ends see the channel fail.
class NcclChannel final : public Channel {
 public:
  struct Options {
    std::shared_ptr<NcclComm> comm;    ///< of exactly the two ends
    std::shared_ptr<DeviceTurn> turn;  ///< of the communicator's device
    /// For sending and for receiving, of one piece each and of the same size at both ends.
    std::shared_ptr<Staging> out;
    std::shared_ptr<Staging> in;
    std::size_t window_bytes = std::size_t{8} << 20;  ///< the same at both ends
    /// How long a transfer may take once both ends have issued it.
    std::chrono::nanoseconds transfer_limit = std::chrono::seconds(10);
    /// How long an end that holds its turn waits for the other's word, which is in the middle of
    /// the handshake and answers at once.
    std::chrono::nanoseconds verdict_patience = std::chrono::seconds(2);
  };

  /// `base` carries messages and notes. Throws Error(invalid_argument), and what the device throws.
  NcclChannel(std::shared_ptr<Channel> base, Options options);
  ~NcclChannel() override;

  [[nodiscard]] std::string_view kind() const noexcept override { return "nccl"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override {
    return link_.max_message_bytes();
  }
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return false; }
  [[nodiscard]] const Device* bulk_device() const noexcept override { return comm_.device().get(); }
  [[nodiscard]] std::size_t max_bulk_bytes() const noexcept override {
    return options_.out->shape().piece_bytes;
  }
  void note_stream(Stream stream, std::shared_ptr<const void> owner) override;
  void cancel() noexcept override;
  void close() noexcept override;

  /// How often a transfer had to be offered again so far.
  [[nodiscard]] std::uint64_t retries();

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) override;
  Bulk do_acquire_bulk(std::size_t bytes, Deadline deadline) override;
  void do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) override;
  std::optional<std::span<const std::byte>> do_receive(Deadline deadline) override;
  [[nodiscard]] Bulk do_received_bulk() const override;
  void do_release() override;

 private:
  void take_note(const Note& note);
  void push(std::uint64_t number, std::size_t bytes, Deadline deadline);
  bool pull(const Note& message, Deadline deadline);
  void back_off(std::unique_lock<std::mutex>& held, std::uint32_t attempt, Deadline deadline);
  [[nodiscard]] std::string describe_tries(std::uint32_t attempt) const;
  [[noreturn]] void fail(const Error& error, const std::string& what);
  void wait_stream(Deadline deadline, const char* what);
  [[nodiscard]] int peer() const noexcept { return 1 - comm_.rank(); }

  Options options_;
  NcclComm& comm_;
  AlignedBuffer out_;
  bool lent_ = false;
  std::uint64_t next_number_ = 1;
  std::uint64_t expected_number_ = 1;  // of the next message with a payload from the peer
  std::size_t received_bytes_ = 0;
  std::minstd_rand jitter_;

  // Guarded by the link's mutex.
  std::optional<Note> answer_;   // accept or reject of this end's offer
  std::optional<Note> offer_;    // the peer's latest offer
  std::optional<Note> verdict_;  // go or withdraw of the peer's offer
  std::uint64_t offered_number_ = 0;
  std::uint32_t offered_attempt_ = 0;  // 0: this end offers nothing
  std::uint64_t retries_ = 0;
  FrameLink link_;  // last: its thread uses the rest
};

}  // namespace pipelive::cuda
