#pragma once

#include <memory>
#include <vector>

#include "pipelive/transport/aligned_buffer.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/frame_link.hpp"
#include "pipelive/transport/staging.hpp"

namespace pipelive {

/// Two processes of one host whose devices reach each other's memory ("p2p"): the receiver maps the
/// sender's staging and reads payloads straight from it; messages and notes go over another
/// channel.
///
/// A piece belongs to the sender until its message is submitted, then to the receiver until that
/// releases the message. The sender waits for its own stream before it tells, the receiver for its
/// own before it releases, so no event has to cross between processes. The receiver never writes to
/// the sender's memory, and the sender never to the receiver's: an end that was cancelled cannot
/// change a byte of the other.
///
/// What lies in a piece is gone with the sending end's object (not yet when it is closed).
class PeerChannel final : public Channel {
 public:
  struct Options {
    std::shared_ptr<Device> device;
    Stream stream;                                    ///< of this end's copies
    std::shared_ptr<const void> stream_owner;         ///< kept as long as the channel
    std::shared_ptr<Staging> own;                     ///< where this end sends from; may be null
    std::shared_ptr<const PeerStaging> peer;          ///< where the peer sends from; may be null
    std::size_t window_bytes = std::size_t{8} << 20;  ///< the same at both ends
  };

  /// `base` carries messages and notes. Throws Error(invalid_argument).
  PeerChannel(std::shared_ptr<Channel> base, Options options);
  ~PeerChannel() override;

  [[nodiscard]] std::string_view kind() const noexcept override { return "p2p"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override {
    return link_.max_message_bytes();
  }
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return false; }
  [[nodiscard]] const Device* bulk_device() const noexcept override {
    return options_.device.get();
  }
  [[nodiscard]] std::size_t max_bulk_bytes() const noexcept override {
    return options_.own ? options_.own->shape().piece_bytes : 0;
  }
  void note_stream(Stream stream, std::shared_ptr<const void> owner) override;
  void cancel() noexcept override { link_.cancel(); }
  void close() noexcept override { link_.close(); }

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) override;
  Bulk do_acquire_bulk(std::size_t bytes, Deadline deadline) override;
  void do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) override;
  std::optional<std::span<const std::byte>> do_receive(Deadline deadline) override;
  [[nodiscard]] Bulk do_received_bulk() const override;
  void do_release() override;

 private:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  void take_note(const Note& note);
  void wait_stream(Deadline deadline, const char* what);
  void free_lent();

  Options options_;
  AlignedBuffer out_;
  std::uint32_t lent_ = kNone;  // the piece being filled
  std::uint64_t next_number_ = 1;
  Note received_;
  std::vector<std::uint64_t> held_by_;  // piece -> message whose receiver has it; 0: free. Guarded
  FrameLink link_;                      // last: its thread uses the rest
};

}  // namespace pipelive
