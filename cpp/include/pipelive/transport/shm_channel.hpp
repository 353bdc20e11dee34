#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "pipelive/device/unique_fd.hpp"
#include "pipelive/transport/channel.hpp"

namespace pipelive {

struct ShmControl;

/// Two single-producer, single-consumer rings in one memfd, one for each direction; both ends map
/// it, so that a sender packs straight into the memory that the receiver reads.
///
/// Each ring is mapped twice in a row, so a message is contiguous wherever it begins. Waiting spins
/// for a moment and then sleeps on a futex in slices; between slices it looks at the Unix socket
/// over which the two met, so that a peer's death is seen however it died.
///
/// The peer is authenticated but not trusted: indices and lengths that it wrote are checked against
/// what this end knows by itself, and the memfd is sealed against being cut short under the
/// mapping.
class ShmChannel final : public Channel {
 public:
  static constexpr std::size_t kDefaultRingBytes = std::size_t{16} << 20;

  /// A sealed memfd for two rings of `ring_bytes`, rounded up to whole pages.
  [[nodiscard]] static UniqueFd create_memory(std::size_t ring_bytes);

  /// Takes both descriptors. `side` is 0 for the end that made the memory and 1 for the other.
  /// Throws Error(protocol) where the memfd is not sealed or its size is not that of two rings.
  ShmChannel(UniqueFd socket, UniqueFd memory, int side);
  ~ShmChannel() override;

  [[nodiscard]] std::string_view kind() const noexcept override { return "shm"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override;
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return true; }
  void cancel() noexcept override;
  void close() noexcept override;

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline deadline) override;
  void do_submit(std::size_t bytes, std::size_t bulk_bytes, Deadline deadline) override;
  std::optional<std::span<const std::byte>> do_receive(Deadline deadline) override;
  void do_release() override;

 private:
  enum class Local : int { open, closed, cancelled };

  template <typename Ready>
  bool wait(std::atomic<std::uint32_t>& signal, std::atomic<std::uint32_t>& waiting,
            Deadline deadline, const Ready& ready);
  void check_local() const;
  void check_peer();
  [[nodiscard]] bool socket_is_dead();
  void end(Local state) noexcept;

  UniqueFd socket_;
  int side_;
  std::size_t ring_bytes_ = 0;
  std::byte* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  ShmControl* control_ = nullptr;
  std::byte* out_ = nullptr;  // ring that this end fills, mapped twice
  std::byte* in_ = nullptr;
  // This end's own counters are kept here, where the peer cannot write.
  std::uint64_t head_ = 0;       // bytes produced
  std::uint64_t seen_tail_ = 0;  // what the peer had consumed when last looked
  std::uint64_t tail_ = 0;       // bytes consumed
  std::uint64_t seen_head_ = 0;
  std::uint64_t frame_ = 0;  // bytes of the frame being read
  std::mutex submit_mutex_;
  std::atomic<Local> local_{Local::open};
};

}  // namespace pipelive
