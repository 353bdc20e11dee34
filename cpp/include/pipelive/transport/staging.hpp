#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "pipelive/device/device.hpp"

namespace pipelive {

/// How a staging buffer is cut: `pieces` places of `piece_bytes` each.
struct StagingShape {
  std::size_t piece_bytes = std::size_t{32} << 20;
  std::uint32_t pieces = 3;

  [[nodiscard]] std::size_t bytes() const noexcept { return piece_bytes * pieces; }
  friend bool operator==(const StagingShape&, const StagingShape&) = default;
};

/// Throws Error(invalid_argument) for a shape that is empty, too large, or whose pieces are not
/// multiples of 256 bytes.
void check_shape(const StagingShape& shape);

/// The streams whose work touches some memory, and what to do so that it outlives that work.
class StreamUsers {
 public:
  /// `owner` keeps the stream; it is kept itself.
  void note(Stream stream, std::shared_ptr<const void> owner) const;
  /// Calls `free` at once where all work that the streams have been given is done; else puts it
  /// aside until that is so, and looks again whenever staging is made or let go of. Never waits.
  void free_when_done(Device& device, std::function<void()> free) noexcept;
  /// What was put aside and is due. Returns how much is left.
  static std::size_t free_due() noexcept;

 private:
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<Stream, std::shared_ptr<const void>>> streams_;
};

/// Fixed pieces of a device's memory that payloads are packed into before they travel. One physical
/// allocation, so that one descriptor hands all of it to another process.
class Staging {
 public:
  /// Rounds the pieces up to what makes whole pages. Throws what the device throws.
  Staging(std::shared_ptr<Device> device, StagingShape shape);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return device_; }
  [[nodiscard]] const StagingShape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::byte* piece(std::uint32_t index) const noexcept {
    return address_ + index * shape_.piece_bytes;
  }
  [[nodiscard]] const StreamUsers& users() const noexcept { return users_; }
  /// For another process; it may map this for as long as it likes.
  [[nodiscard]] ExportedPages export_memory() const;
  /// Writes `sample` to the beginning and to the end of every piece, in the order of `stream`, and
  /// waits for that. Throws Error(invalid_argument) for one that is empty or more than half a
  /// piece, Error(timeout).
  void put_sample(std::span<const std::byte> sample, Stream stream,
                  std::shared_ptr<const void> stream_owner, Deadline deadline);

 private:
  std::shared_ptr<Device> device_;
  StagingShape shape_;
  std::byte* address_ = nullptr;
  PageHandle page_ = kNoPage;
  StreamUsers users_;
};

/// Another process's staging, mapped here; this end only reads it.
class PeerStaging {
 public:
  /// Nothing about `exported` and `shape` is believed: throws Error(protocol) where they contradict
  /// each other, and what the device throws where it cannot map them.
  PeerStaging(std::shared_ptr<Device> device, const ExportedPages& exported, StagingShape shape);
  ~PeerStaging();
  PeerStaging(const PeerStaging&) = delete;
  PeerStaging& operator=(const PeerStaging&) = delete;

  [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return device_; }
  [[nodiscard]] const StagingShape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::byte* piece(std::uint32_t index) const noexcept {
    return pages_->data() + index * shape_.piece_bytes;
  }
  [[nodiscard]] const StreamUsers& users() const noexcept { return users_; }
  /// Whether `sample` is read where the peer's put_sample has put it, through memory of this end's
  /// device, as payloads are. There are machines that map another GPU's memory without an error and
  /// then read other bytes (address translation between PCIe and the devices).
  [[nodiscard]] bool has_sample(std::span<const std::byte> sample, Stream stream,
                                std::shared_ptr<const void> stream_owner, Deadline deadline) const;
  /// Whether this end could write into it all the same, as its device has no read-only mappings.
  [[nodiscard]] bool writable() const noexcept { return pages_->writable(); }

 private:
  std::shared_ptr<Device> device_;
  StagingShape shape_;
  std::shared_ptr<ImportedPages> pages_;
  StreamUsers users_;
};

}  // namespace pipelive
