#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "pipelive/kv/id_set.hpp"

namespace pipelive {

/// One block's new place in a shrink.
struct IdMove {
  std::int64_t from = 0;
  std::int64_t to = 0;
  friend bool operator==(const IdMove&, const IdMove&) = default;
};

/// The block ids of a pipeline: who holds which, and which may be handed out. Bookkeeping only; the
/// memory belongs to the stages' pools, which follow.
///
/// Ids are handed out lowest first, so that the high ones, and with them whole pages, come free. Id
/// 0 is the null block: always live, never handed out, shared or released. An id is *live* while it
/// has references; each request that uses a block holds one, and so does a prefix cache that keeps
/// a block nobody uses. An id released with `after_seq` is in *quarantine* until that step has
/// retired: it is not live and needs no copy, but is neither handed out nor counted as free.
///
/// Shrinking takes two calls. plan_shrink() says which live ids must move where; from then on no id
/// at or above the planned capacity is handed out, nor a target of a move. apply_shrink() carries
/// the plan out; blocks released in between simply do not move. cancel_shrink() drops the plan.
///
/// Thread-safe. Every operation that throws leaves the allocator as it was. Bad values are
/// Error(invalid_argument); running out of ids is Error(over_budget).
class BlockAllocator {
 public:
  /// Ids stay below 2^31, so that they fit block tables of 32-bit integers.
  static constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 1;

  /// Ids are below `max_blocks` for ever and below `capacity` until that changes; the null block
  /// counts. Throws Error(invalid_argument) or Error(out_of_memory).
  BlockAllocator(std::int64_t max_blocks, std::int64_t capacity);
  BlockAllocator(const BlockAllocator&) = delete;
  BlockAllocator& operator=(const BlockAllocator&) = delete;

  /// The `count` lowest free ids, ascending, one reference each. Throws Error(over_budget) where
  /// fewer are free.
  [[nodiscard]] std::vector<std::int64_t> allocate(std::int64_t count);

  /// One more reference to each of the live ids; an id listed twice gets two.
  void share(std::span<const std::int64_t> ids);

  /// One reference less to each of the live ids. An id that loses its last is free at once, or,
  /// with `after_seq` (the last step that was scheduled while it was live), when that step has
  /// retired.
  void release(std::span<const std::int64_t> ids,
               std::optional<std::int64_t> after_seq = std::nullopt);

  /// Says that every step up to `seq` has retired on every stage. Lower numbers than before change
  /// nothing.
  void retire(std::int64_t seq);

  struct Writable {
    std::int64_t id = 0;                    ///< the block to write to
    std::optional<std::int64_t> copy_from;  ///< the block whose bytes must be copied to it first
  };
  /// Copy on write: `id` itself where the caller holds the only reference, and otherwise a new id,
  /// to which the caller's reference passes. Throws Error(over_budget) where no id is free.
  [[nodiscard]] Writable writable(std::int64_t id);

  /// How often the id has been handed out, as a new block or as the target of a move.
  [[nodiscard]] std::uint64_t generation(std::int64_t id) const;
  /// References to the id; 1 for the null block.
  [[nodiscard]] std::uint32_t refcount(std::int64_t id) const;

  /// Ids with references, ascending, the null block first.
  [[nodiscard]] std::vector<std::int64_t> live() const;
  /// Ids in quarantine, ascending.
  [[nodiscard]] std::vector<std::int64_t> quarantined() const;
  /// Ids that allocate() can hand out now.
  [[nodiscard]] std::int64_t num_free() const;
  /// Ids with references, the null block included.
  [[nodiscard]] std::int64_t num_live() const;
  [[nodiscard]] std::int64_t num_quarantined() const;
  [[nodiscard]] std::int64_t capacity() const;
  [[nodiscard]] std::int64_t max_blocks() const noexcept { return max_blocks_; }

  /// Makes the ids up to `capacity` available. Throws Error(busy) while a shrink is planned.
  void raise_capacity(std::int64_t capacity);

  /// Plans a shrink to `capacity`, at most the present one: the live ids that are too high,
  /// ascending, move to the lowest free ids, ascending. Throws Error(over_budget), naming the
  /// counts, where the live ids do not fit beside those in quarantine below `capacity`.
  /// Replaces a plan made before; planning the same capacity again succeeds.
  [[nodiscard]] std::vector<IdMove> plan_shrink(std::int64_t capacity);

  /// Carries the planned shrink out, or its upper part: `capacity` is the planned one or higher, up
  /// to the present one, and `moves` must be those of the plan from ids at or above it, in any
  /// order. What the plan has beyond is dropped. A target takes over
  /// the references of its source.
  ///
  /// Without `after_seq`: no step is in flight; throws Error(busy) while an id at or above
  /// `capacity` is in quarantine. With `after_seq`, the last step scheduled before the shrink: the
  /// ids moved away are in quarantine until that step has retired, and throws Error(busy) where a
  /// higher id waits for a later one. The caller unmaps the ids only when that step is complete.
  void apply_shrink(std::int64_t capacity, std::span<const IdMove> moves,
                    std::optional<std::int64_t> after_seq = std::nullopt);

  /// Drops the planned shrink; without one it does nothing.
  void cancel_shrink();

  /// The capacity of the planned shrink.
  [[nodiscard]] std::optional<std::int64_t> planned_capacity() const;

 private:
  enum class State : std::uint8_t {
    absent,    // at or above the capacity
    free,      // in free_
    withheld,  // free, but at or above the planned capacity, or the target of a planned move
    live,
    quarantined,  // in a list of quarantine_
  };
  struct Block {
    std::uint64_t generation = 0;
    std::uint32_t refcount = 0;
    std::uint32_t next = 0;  // the next id of a quarantine list; 0 ends it
    State state = State::absent;
  };

  Block& at(std::int64_t id) { return blocks_[static_cast<std::size_t>(id)]; }
  [[nodiscard]] const Block& at(std::int64_t id) const {
    return blocks_[static_cast<std::size_t>(id)];
  }
  void require_known(const char* caller, std::int64_t id) const;
  void require_live(const char* caller, std::int64_t id,
                    std::optional<std::size_t> index = std::nullopt) const {
    if (id <= 0 || id >= max_blocks_ || at(id).state != State::live) refuse_id(caller, id, index);
  }
  [[noreturn]] void refuse_id(const char* caller, std::int64_t id,
                              std::optional<std::size_t> index) const;
  [[nodiscard]] std::vector<std::int64_t> ids_in(State state, std::int64_t count) const;
  void drop_plan() noexcept;
  [[noreturn]] void refuse_allocation(const char* caller, std::int64_t count) const;
  std::int64_t take_lowest() noexcept;
  void set_free(std::int64_t id) noexcept;
  void quarantine(std::uint32_t& list, std::int64_t id) noexcept;
  void require_quarantine_allows(std::int64_t capacity,
                                 std::optional<std::int64_t> after_seq) const;

  const std::int64_t max_blocks_;

  mutable std::mutex mutex_;  // guards all that follows
  std::int64_t capacity_;
  std::vector<Block> blocks_;
  IdSet free_;
  std::int64_t num_live_ = 1;
  std::int64_t num_quarantined_ = 0;
  std::int64_t retired_through_ = -1;
  std::map<std::int64_t, std::uint32_t> quarantine_;  // step -> the first id of its list
  std::optional<std::int64_t> planned_capacity_;
  std::vector<IdMove> planned_moves_;
};

}  // namespace pipelive
