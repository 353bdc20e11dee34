#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

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
  /// For another process; it may map this for as long as it likes.
  [[nodiscard]] ExportedPages export_memory() const;

 private:
  std::shared_ptr<Device> device_;
  StagingShape shape_;
  std::byte* address_ = nullptr;
  PageHandle page_ = kNoPage;
};

/// Another process's staging, mapped here; this end only reads it.
class PeerStaging {
 public:
  /// Nothing about `exported` and `shape` is believed: throws Error(protocol) where they contradict
  /// each other, and what the device throws where it cannot map them.
  PeerStaging(Device& device, const ExportedPages& exported, StagingShape shape);

  [[nodiscard]] const StagingShape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::byte* piece(std::uint32_t index) const noexcept {
    return pages_->data() + index * shape_.piece_bytes;
  }

 private:
  StagingShape shape_;
  std::unique_ptr<ImportedPages> pages_;
};

}  // namespace pipelive
