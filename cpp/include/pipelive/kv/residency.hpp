#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>

#include "pipelive/base/deadline.hpp"

namespace pipelive {

/// Which block ids of which layers have memory behind them, and who is using them right now.
///
/// Of every layer the ids [0, limit) are resident; a layer that is not held has limit 0. Checks
/// read one atomic. An operation that touches block memory on the host holds a Use for as long as
/// it runs; memory is taken away only with all uses gone (and none can begin meanwhile), so that a
/// check that has passed stays true. Thread-safe.
class Residency {
 public:
  explicit Residency(std::uint32_t num_layers);
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  /// Keeps all that is resident mapped while it lives. Whoever holds one must not resize, drop or
  /// close the pool.
  class Use {
   public:
    Use() = default;
    Use(Use&& other) noexcept : residency_(std::exchange(other.residency_, nullptr)) {}
    Use& operator=(Use&& other) noexcept {
      if (this != &other) {
        end();
        residency_ = std::exchange(other.residency_, nullptr);
      }
      return *this;
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() { end(); }
    void end() noexcept;

   private:
    friend class Residency;
    explicit Use(const Residency* residency) : residency_(residency) {}
    const Residency* residency_ = nullptr;
  };

  /// Forbids uses while it lives.
  class Exclusive {
   public:
    Exclusive(Exclusive&& other) noexcept : residency_(std::exchange(other.residency_, nullptr)) {}
    Exclusive& operator=(Exclusive&&) = delete;
    Exclusive(const Exclusive&) = delete;
    Exclusive& operator=(const Exclusive&) = delete;
    ~Exclusive();

   private:
    friend class Residency;
    explicit Exclusive(Residency* residency) : residency_(residency) {}
    Residency* residency_;
  };

  [[nodiscard]] std::uint64_t limit(std::uint32_t layer) const noexcept {
    return layer < num_layers_ ? limits_[layer].load(std::memory_order_acquire) : 0;
  }
  void set_limit(std::uint32_t layer, std::uint64_t limit) noexcept {
    limits_[layer].store(limit, std::memory_order_release);
  }

  /// Throws Error(not_resident) naming the layer and the id, unless every id is resident in the
  /// layer (negative ids never are). An empty span passes where the layer is held.
  void check(std::uint32_t layer, std::span<const std::int32_t> ids) const;
  void check(std::uint32_t layer, std::span<const std::int64_t> ids) const;
  void check(std::uint32_t layer, std::span<const std::uint64_t> ids) const;
  /// The ids [begin, end).
  void check_range(std::uint32_t layer, std::uint64_t begin, std::uint64_t end) const;

  /// Waits where memory is being taken away; throws Error(timeout) after a minute of that.
  [[nodiscard]] Use use() const;
  /// Waits for the uses under way; throws Error(busy) at the deadline.
  [[nodiscard]] Exclusive exclude(Deadline deadline);

 private:
  void check_held(std::uint32_t layer, std::uint64_t limit) const;
  template <typename T>
  void check_ids(std::uint32_t layer, std::span<const T> ids) const;
  [[noreturn]] static void fail(std::uint32_t layer, const std::string& id, std::uint64_t limit);

  const std::uint32_t num_layers_;
  const std::unique_ptr<std::atomic<std::uint64_t>[]> limits_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable std::uint64_t uses_ = 0;
  bool excluded_ = false;
};

/// What a LayerView stands on: memory of blocks, and word of what is resident in it. A KVPool, or
/// tensors that an engine owns.
class BlockMemory {
 public:
  virtual ~BlockMemory() = default;
  [[nodiscard]] virtual const Residency& residency() const noexcept = 0;
  /// Throws Error(closed) where the memory is gone for good.
  virtual void check_open() const = 0;
};

}  // namespace pipelive
