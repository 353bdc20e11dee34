#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "pipelive/kv/geometry.hpp"
#include "pipelive/kv/residency.hpp"
#include "pipelive/kv/spec.hpp"
#include "pipelive/memory/arena.hpp"

namespace pipelive {

/// What stands behind block ids that are not resident.
enum class HolePolicy : std::uint8_t {
  fault,    ///< nothing: a stray access is a segmentation fault; for tests
  scratch,  ///< one shared page, repeated; for production
};

struct KVPoolOptions {
  std::uint32_t num_layers = 0;       ///< of the whole model; addresses are reserved for all
  std::vector<std::uint32_t> layers;  ///< held from the start
  std::uint64_t max_blocks = 0;       ///< block ids that addresses are reserved for
  std::uint64_t capacity = 1;         ///< block ids resident from the start
  std::uint32_t stack = 1;            ///< neighbouring layers whose blocks lie side by side
  HolePolicy holes = HolePolicy::fault;
};

/// Copy block `from` over block `to`.
struct BlockMove {
  std::uint64_t from = 0;
  std::uint64_t to = 0;
  friend bool operator==(const BlockMove&, const BlockMove&) = default;
};

struct KVPoolStats {
  std::uint64_t capacity = 0;
  std::uint64_t max_blocks = 0;
  std::uint32_t layers_held = 0;
  std::uint64_t held_bytes = 0;      ///< physical memory behind blocks, scratch page included, and
                                     ///< what reclaim() would take away
  std::uint64_t resident_bytes = 0;  ///< capacity * held layers * block bytes
};

/// The KV blocks of the layers that a stage holds, behind addresses that never change.
///
/// Resident are the block ids [0, capacity) of the layers held. A block that becomes resident holds
/// zeros. Every operation is transactional: where it throws, capacity, layers, pages and the bytes
/// of all live blocks are as before (blocks that were the target of a move may differ: they held
/// nothing). Thread-safe; views may be used at any time while their blocks are resident.
///
/// Taking memory away (shrink, reclaim, drop_layers, close) waits for the host operations that hold
/// a Residency::Use, for the events it is given, and for the work that the streams noted with
/// Residency::note_stream (and the device's implicit ones) have been given before the call. It
/// fails with Error(busy) while one of these streams is being captured into a graph. Blocks that
/// are to go count as not resident while it waits; blocks that stay may be used all the time. All
/// else that reads or writes through raw addresses is the caller's to order.
///
/// HolePolicy::scratch: what stands behind an address changes in two steps, and between them there
/// is nothing. So grow and add_layers, too, wait for the noted streams; and from the call to its
/// return nothing may be launched that may touch an id which is not resident before it or after.
///
/// Moves are copies of the device. With a stream they are part of its work, after that of the noted
/// streams, and the call does not wait for them; without one they are over when the call returns.
/// They are refused with Error(busy) in a stream that is being captured.
class KVPool final : public BlockMemory, public std::enable_shared_from_this<KVPool> {
 public:
  /// Throws Error(invalid_argument) for options out of range, Error(over_budget) where the page
  /// pool is too small.
  [[nodiscard]] static std::shared_ptr<KVPool> create(const KVSpec& spec,
                                                      std::shared_ptr<PagePool> pages,
                                                      const KVPoolOptions& options);
  ~KVPool() override;
  KVPool(const KVPool&) = delete;
  KVPool& operator=(const KVPool&) = delete;

  [[nodiscard]] const KVSpec& spec() const noexcept { return spec_; }
  [[nodiscard]] const BlockLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] const Geometry& geometry() const noexcept { return geometry_; }
  [[nodiscard]] const std::shared_ptr<PagePool>& pages() const noexcept { return pages_; }
  [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return pages_->device(); }
  [[nodiscard]] HolePolicy holes() const noexcept { return holes_; }
  [[nodiscard]] std::uint64_t capacity() const noexcept {
    return capacity_.load(std::memory_order_acquire);
  }
  /// Ascending. Like stats(), as before or as after a change that is under way; never waits for it.
  [[nodiscard]] std::vector<std::uint32_t> layers() const;
  [[nodiscard]] KVPoolStats stats() const;

  /// Where a layer's blocks lie, whether or not the layer is held. Valid for the pool's life.
  [[nodiscard]] LayerMemory layer_memory(std::uint32_t layer) const;

  [[nodiscard]] const Residency& residency() const noexcept override { return residency_; }
  void check_open() const override;
  [[nodiscard]] bool is_resident(std::uint64_t block) const noexcept { return block < capacity(); }
  /// See Residency::check.
  template <typename T>
  void check_resident(std::uint32_t layer, std::span<const T> ids) const {
    residency_.check(layer, ids);
  }

  /// Maps the blocks of further layers, in whole stacks. Throws Error(invalid_argument) for layers
  /// that are held already or stacks that are not whole.
  void add_layers(std::span<const std::uint32_t> layers);
  /// Takes layers away, in whole stacks; `after` is waited for before anything is unmapped.
  void drop_layers(std::span<const std::uint32_t> layers,
                   std::span<const std::shared_ptr<Event>> after = {});

  /// Raises the capacity; equal is a no-op, less is refused.
  void grow(std::uint64_t capacity);
  /// Makes the `moves` and lowers the capacity; equal only makes the moves, more is refused.
  /// Refused as well, naming ids: an id of `live` at or above the new capacity that no move takes
  /// down; a move from an id that is not live; a move onto an id that is live, at or above the new
  /// capacity, 0, or the source or target of another move.
  void shrink(std::uint64_t capacity, std::span<const std::uint64_t> live,
              std::span<const BlockMove> moves, std::span<const std::shared_ptr<Event>> after = {},
              Stream stream = {});
  /// As shrink, but leaves the pages where they are and waits for nobody who uses them: what has to
  /// come between two steps. reclaim() does the rest.
  void lower(std::uint64_t capacity, std::span<const std::uint64_t> live,
             std::span<const BlockMove> moves, Stream stream = {});
  /// Takes away the pages that calls of lower() have left behind the capacity; without them it does
  /// nothing. Where it throws, it may be called again. grow and add_layers do so first.
  void reclaim();
  /// Copies blocks in all held layers. Ids are resident, not 0, and named only once.
  void move_blocks(std::span<const BlockMove> moves, Stream stream = {});

  /// Throws Error(busy) where there are noted streams and `consumer` is being captured.
  void order_consumer(Stream consumer) const override;

  /// Physical bytes for the ids [0, capacity) of the stacks that contain `layers`.
  [[nodiscard]] std::uint64_t bytes_needed(std::span<const std::uint32_t> layers,
                                           std::uint64_t capacity) const;
  /// The inverse of bytes_needed; see Geometry.
  [[nodiscard]] std::uint64_t blocks_that_fit(std::span<const std::uint32_t> layers,
                                              std::uint64_t budget_bytes) const;

  /// Returns all pages. The addresses stay reserved until the last view is gone. Operations throw
  /// Error(closed) from then on. May be called twice.
  void close();
  [[nodiscard]] bool closed() const noexcept { return closed_.load(std::memory_order_acquire); }

 private:
  // How long a resize waits for host operations and events that still use what is to go.
  static constexpr double kFenceSeconds = 30.0;

  KVPool(const KVSpec& spec, std::shared_ptr<PagePool> pages, const KVPoolOptions& options);
  struct Mapped {
    Arena* arena;
    std::size_t offset;
    std::size_t bytes;
  };
  struct Removed {
    Arena* arena;
    std::size_t offset;
    PageLease pages;
  };

  [[nodiscard]] std::vector<std::uint32_t> held_stacks() const;
  void check_usable_locked() const;
  void check_capacity(const char* call, std::uint64_t capacity) const;
  void check_moves(std::span<const BlockMove> moves, std::uint64_t target_limit) const;
  void check_live(std::uint64_t capacity, std::span<const std::uint64_t> live,
                  std::span<const BlockMove> moves) const;
  void lower_locked(std::uint64_t capacity, std::span<const std::uint64_t> live,
                    std::span<const BlockMove> moves, std::span<const std::shared_ptr<Event>> after,
                    Stream stream, Deadline deadline);
  void reclaim_locked(Stream stream, Deadline deadline);
  void set_mapped_locked(std::uint64_t blocks) noexcept;
  void copy_blocks_locked(std::span<const BlockMove> moves, Stream stream);
  [[nodiscard]] std::vector<Stream> users() const;
  void order_after_users(Stream stream) const;
  void wait_for_users(Stream stream, Deadline deadline) const;
  void wait_for_users_at_close() const;
  void wait_for_users_of_holes() const;
  void set_limits(const std::vector<std::uint32_t>& stacks, std::uint64_t limit) noexcept;
  void map_all(std::vector<Mapped> parts);
  std::vector<Removed> unmap_all(const std::vector<Mapped>& parts);
  void publish_locked(std::uint64_t capacity, const std::vector<std::uint32_t>& stacks,
                      bool held) noexcept;
  void forbid_use_locked(std::string reason) noexcept;

  const KVSpec spec_;
  const BlockLayout layout_;
  const Geometry geometry_;
  const HolePolicy holes_;
  const std::shared_ptr<PagePool> pages_;
  std::shared_ptr<ScratchPage> scratch_;
  std::shared_ptr<Event> moved_;  ///< of the last copies from where reclaim() takes pages away
  std::vector<std::unique_ptr<Arena>> arenas_;  ///< one per stack

  // A change may take long (pages are created, operations waited for), so what others ask about
  // has a lock of its own, held for an instant. Written with both, read with either.
  mutable std::mutex mutex_;
  mutable std::mutex state_mutex_;
  std::vector<bool> held_;  ///< per stack
  std::atomic<std::uint64_t> capacity_;
  std::uint64_t mapped_;  ///< ids below have pages in every stack held; the capacity or more
  std::string broken_;    ///< why nothing works any more: a failure whose undoing failed too
  std::atomic<bool> closed_{false};
  Residency residency_;
};

}  // namespace pipelive
