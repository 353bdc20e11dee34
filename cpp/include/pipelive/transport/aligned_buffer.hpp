#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace pipelive {

/// Host memory, aligned to 64, that grows to the largest request and is never initialised.
class AlignedBuffer {
 public:
  /// At least `bytes`; what was there before is lost where it had to grow.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      constexpr std::size_t kStep = std::size_t{64} << 10;
      const std::size_t size = (bytes + kStep - 1) / kStep * kStep;
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(size, std::align_val_t{64})));
      size_ = size;
    }
    return memory_.get();
  }
  [[nodiscard]] std::byte* data() const noexcept { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const noexcept {
      ::operator delete(memory, std::align_val_t{64});
    }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace pipelive
