#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive {

/// Which block ids of which layers have memory behind them, and who is using them right now.
///
/// Of every layer the ids [0, limit) are resident; a layer that is not held has limit 0. Checks
/// read one atomic.
///
/// Two kinds of users must be gone before memory is taken away. An operation of the host holds a
/// Use, taken before it checks ids: to take memory away is to lower the limits and then to `drain`
/// the uses that may have seen them as they were, so that uses that begin later never wait. Work in
/// a device's streams outlives the host's call: `note_stream` names, once, a stream that may touch
/// blocks, and whoever takes memory away records an event there and waits for it. So a step costs
/// neither a lock that a resize holds nor an event. Thread-safe.
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
    Use(Use&& other) noexcept
        : residency_(std::exchange(other.residency_, nullptr)), phase_(other.phase_) {}
    Use& operator=(Use&& other) noexcept {
      if (this != &other) {
        end();
        residency_ = std::exchange(other.residency_, nullptr);
        phase_ = other.phase_;
      }
      return *this;
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() { end(); }
    void end() noexcept;

   private:
    friend class Residency;
    Use(const Residency* residency, unsigned phase) : residency_(residency), phase_(phase) {}
    const Residency* residency_ = nullptr;
    unsigned phase_ = 0;
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

  /// Waits only for who holds an Exclusive; throws Error(timeout) after a minute of that.
  [[nodiscard]] Use use() const;
  /// Waits for the uses that began before the call; those that begin later go on. Throws
  /// Error(busy) at the deadline.
  void drain(Deadline deadline);
  /// Waits for the uses under way, and lets none begin; throws Error(busy) at the deadline.
  [[nodiscard]] Exclusive exclude(Deadline deadline);

  /// Work in `stream` may touch blocks from now on. Cheap where the stream is known already. The
  /// stream must exist until it is forgotten or the memory is gone; `owner` is kept until then.
  void note_stream(Stream stream, std::shared_ptr<void> owner = nullptr) const;
  /// No work in `stream` touches blocks any more. A stream that was not noted is no error.
  void forget_stream(Stream stream) const;
  [[nodiscard]] std::vector<Stream> streams() const;

 private:
  void check_held(std::uint32_t layer, std::uint64_t limit) const;
  template <typename T>
  void check_ids(std::uint32_t layer, std::span<const T> ids) const;
  [[noreturn]] static void fail(std::uint32_t layer, const std::string& id, std::uint64_t limit);

  const std::uint32_t num_layers_;
  const std::unique_ptr<std::atomic<std::uint64_t>[]> limits_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  // Uses are counted by the phase they began in; a drain begins a phase and waits for the other.
  mutable std::uint64_t uses_[2] = {0, 0};
  unsigned phase_ = 0;
  bool draining_ = false;
  bool excluded_ = false;
  struct NotedStream {
    Stream stream;
    std::shared_ptr<void> owner;
  };
  mutable std::mutex streams_mutex_;
  mutable std::vector<NotedStream> streams_;
};

/// What a LayerView stands on: memory of blocks, and word of what is resident in it. A KVPool, or
/// tensors that an engine owns.
class BlockMemory {
 public:
  virtual ~BlockMemory() = default;
  [[nodiscard]] virtual const Residency& residency() const noexcept = 0;
  /// Throws Error(closed) where the memory is gone for good.
  virtual void check_open() const = 0;
  /// Makes `consumer` wait for the work that the noted streams have been given so far: for memory
  /// that is handed to somebody else's stream. Nothing where the memory's owner orders that.
  virtual void order_consumer(Stream /*consumer*/) const {}
};

}  // namespace pipelive
