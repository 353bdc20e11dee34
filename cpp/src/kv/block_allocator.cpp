#include "pipelive/kv/block_allocator.hpp"

#include <algorithm>
#include <limits>
#include <new>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

void require_between(const char* caller, const char* name, std::int64_t value, std::int64_t least,
                     std::int64_t most) {
  if (value < least || value > most) {
    refuse(std::string(caller) + ": " + name + " is " + std::to_string(value) + ", expected " +
           std::to_string(least) + " to " + std::to_string(most));
  }
}

std::int64_t checked_max_blocks(std::int64_t max_blocks, std::int64_t capacity) {
  require_between("BlockAllocator", "max_blocks", max_blocks, 1, BlockAllocator::kMaxBlocks);
  require_between("BlockAllocator", "capacity", capacity, 1, max_blocks);
  return max_blocks;
}

template <typename T>
T make(std::int64_t max_blocks) {
  try {
    return T(static_cast<std::size_t>(max_blocks));
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory,
                "BlockAllocator: no memory for " + std::to_string(max_blocks) + " blocks");
  }
}

std::string element(std::size_t index) {
  return "ids[" + std::to_string(index) + "]";
}

}  // namespace

BlockAllocator::BlockAllocator(std::int64_t max_blocks, std::int64_t capacity)
    : max_blocks_(checked_max_blocks(max_blocks, capacity)),
      capacity_(capacity),
      blocks_(make<std::vector<Block>>(max_blocks)),
      free_(make<IdSet>(max_blocks)) {
  at(0).state = State::live;
  at(0).refcount = 1;
  for (std::int64_t id = 1; id < capacity; ++id) set_free(id);
}

void BlockAllocator::require_known(const char* caller, std::int64_t id) const {
  require_between(caller, "id", id, 0, max_blocks_ - 1);
}

void BlockAllocator::refuse_id(const char* caller, std::int64_t id,
                               std::optional<std::size_t> index) const {
  const std::string is =
      std::string(caller) + ": " + (index ? element(*index) : "id") + " is " + std::to_string(id);
  if (id < 0 || id >= max_blocks_) {
    refuse(is + ", expected 1 to " + std::to_string(max_blocks_ - 1));
  }
  if (id == 0) refuse(is + ", the null block, which nobody owns");
  if (at(id).state == State::quarantined) {
    refuse(is + ", which was released already and is in quarantine");
  }
  refuse(is + ", which is not allocated");
}

void BlockAllocator::refuse_allocation(const char* caller, std::int64_t count) const {
  throw Error(ErrorCode::over_budget,
              std::string(caller) + ": " + std::to_string(count) + " blocks wanted, " +
                  std::to_string(free_.size()) + " free of " +
                  std::to_string(planned_capacity_.value_or(capacity_)) + " (" +
                  std::to_string(num_live_) + " live, " + std::to_string(num_quarantined_) +
                  " in quarantine" + (planned_capacity_ ? ", a shrink is planned)" : ")"));
}

std::int64_t BlockAllocator::take_lowest() noexcept {
  const auto id = static_cast<std::int64_t>(free_.lowest());
  free_.erase(static_cast<std::uint64_t>(id));
  Block& block = at(id);
  block.state = State::live;
  block.refcount = 1;
  ++block.generation;
  ++num_live_;
  return id;
}

// Where an id without references goes: which state that is depends on the capacities alone.
void BlockAllocator::set_free(std::int64_t id) noexcept {
  if (id >= capacity_) {
    at(id).state = State::absent;
  } else if (planned_capacity_ && id >= *planned_capacity_) {
    at(id).state = State::withheld;
  } else {
    at(id).state = State::free;
    free_.insert(static_cast<std::uint64_t>(id));
  }
}

void BlockAllocator::quarantine(std::uint32_t& list, std::int64_t id) noexcept {
  at(id).state = State::quarantined;
  at(id).next = list;
  list = static_cast<std::uint32_t>(id);
  ++num_quarantined_;
}

std::vector<std::int64_t> BlockAllocator::allocate(std::int64_t count) {
  if (count < 0) {
    refuse("BlockAllocator.allocate: count is " + std::to_string(count) + ", expected at least 0");
  }
  const std::lock_guard lock(mutex_);
  if (static_cast<std::uint64_t>(count) > free_.size()) {
    refuse_allocation("BlockAllocator.allocate", count);
  }
  std::vector<std::int64_t> ids(static_cast<std::size_t>(count));
  for (std::int64_t& id : ids) id = take_lowest();
  return ids;
}

void BlockAllocator::share(std::span<const std::int64_t> ids) {
  const std::lock_guard lock(mutex_);
  std::size_t done = 0;
  try {
    for (; done < ids.size(); ++done) {
      require_live("BlockAllocator.share", ids[done], done);
      if (at(ids[done]).refcount == std::numeric_limits<std::uint32_t>::max()) {
        refuse("BlockAllocator.share: " + element(done) + " is " + std::to_string(ids[done]) +
               ", which has 2^32 - 1 references already");
      }
      ++at(ids[done]).refcount;
    }
  } catch (...) {
    for (std::size_t i = 0; i < done; ++i) --at(ids[i]).refcount;
    throw;
  }
}

void BlockAllocator::release(std::span<const std::int64_t> ids,
                             std::optional<std::int64_t> after_seq) {
  if (after_seq && *after_seq < 0) {
    refuse("BlockAllocator.release: after_seq is " + std::to_string(*after_seq) +
           ", expected at least 0");
  }
  const std::lock_guard lock(mutex_);
  const bool wait = after_seq && *after_seq > retired_through_;
  std::size_t done = 0;
  std::uint32_t* list = nullptr;
  try {
    for (; done < ids.size(); ++done) {
      require_live("BlockAllocator.release", ids[done], done);
      if (at(ids[done]).refcount == 0) {
        refuse("BlockAllocator.release: " + element(done) + " is " + std::to_string(ids[done]) +
               ", listed more often than it has references");
      }
      --at(ids[done]).refcount;
    }
    if (wait && !ids.empty()) list = &quarantine_.try_emplace(*after_seq, 0).first->second;
  } catch (...) {
    for (std::size_t i = 0; i < done; ++i) ++at(ids[i]).refcount;
    throw;
  }
  for (const std::int64_t id : ids) {
    if (at(id).refcount != 0 || at(id).state != State::live) continue;
    --num_live_;
    if (wait) {
      quarantine(*list, id);
    } else {
      set_free(id);
    }
  }
}

void BlockAllocator::retire(std::int64_t seq) {
  const std::lock_guard lock(mutex_);
  retired_through_ = std::max(retired_through_, seq);
  while (!quarantine_.empty() && quarantine_.begin()->first <= seq) {
    for (std::int64_t id = quarantine_.begin()->second; id != 0;) {
      const std::int64_t next = at(id).next;
      --num_quarantined_;
      set_free(id);
      id = next;
    }
    quarantine_.erase(quarantine_.begin());
  }
}

BlockAllocator::Writable BlockAllocator::writable(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  require_live("BlockAllocator.writable", id);
  if (at(id).refcount == 1) return {id, std::nullopt};
  if (free_.size() == 0) refuse_allocation("BlockAllocator.writable", 1);
  --at(id).refcount;
  return {take_lowest(), id};
}

std::uint64_t BlockAllocator::generation(std::int64_t id) const {
  require_known("BlockAllocator.generation", id);
  const std::lock_guard lock(mutex_);
  return at(id).generation;
}

std::uint32_t BlockAllocator::refcount(std::int64_t id) const {
  require_known("BlockAllocator.refcount", id);
  const std::lock_guard lock(mutex_);
  return at(id).refcount;
}

std::vector<std::int64_t> BlockAllocator::ids_in(State state, std::int64_t count) const {
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(count));
  for (std::int64_t id = 0; static_cast<std::int64_t>(ids.size()) < count; ++id) {
    if (at(id).state == state) ids.push_back(id);
  }
  return ids;
}

std::vector<std::int64_t> BlockAllocator::live() const {
  const std::lock_guard lock(mutex_);
  return ids_in(State::live, num_live_);
}

std::vector<std::int64_t> BlockAllocator::quarantined() const {
  const std::lock_guard lock(mutex_);
  return ids_in(State::quarantined, num_quarantined_);
}

std::int64_t BlockAllocator::num_free() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(free_.size());
}

std::int64_t BlockAllocator::num_live() const {
  const std::lock_guard lock(mutex_);
  return num_live_;
}

std::int64_t BlockAllocator::num_quarantined() const {
  const std::lock_guard lock(mutex_);
  return num_quarantined_;
}

std::int64_t BlockAllocator::capacity() const {
  const std::lock_guard lock(mutex_);
  return capacity_;
}

std::optional<std::int64_t> BlockAllocator::planned_capacity() const {
  const std::lock_guard lock(mutex_);
  return planned_capacity_;
}

void BlockAllocator::raise_capacity(std::int64_t capacity) {
  const std::lock_guard lock(mutex_);
  require_between("BlockAllocator.raise_capacity", "capacity", capacity, capacity_, max_blocks_);
  if (planned_capacity_) {
    throw Error(ErrorCode::busy, "BlockAllocator.raise_capacity: a shrink to " +
                                     std::to_string(*planned_capacity_) + " blocks is planned");
  }
  const std::int64_t before = capacity_;
  capacity_ = capacity;
  for (std::int64_t id = before; id < capacity; ++id) {
    // An id that an earlier shrink left in quarantine comes free when its step retires.
    if (at(id).state == State::absent) set_free(id);
  }
}

std::vector<IdMove> BlockAllocator::plan_shrink(std::int64_t capacity) {
  const std::lock_guard lock(mutex_);
  require_between("BlockAllocator.plan_shrink", "capacity", capacity, 1, capacity_);
  std::vector<IdMove> moves;
  std::int64_t quarantined_below = 0;
  std::int64_t free_below = 0;  // counting what an earlier plan withholds
  for (std::int64_t id = 0; id < capacity; ++id) {
    const State state = at(id).state;
    quarantined_below += state == State::quarantined ? 1 : 0;
    free_below += state == State::free || state == State::withheld ? 1 : 0;
  }
  for (std::int64_t id = capacity; id < capacity_; ++id) {
    if (at(id).state == State::live) moves.push_back({id, 0});
  }
  if (static_cast<std::int64_t>(moves.size()) > free_below) {
    throw Error(ErrorCode::over_budget,
                "BlockAllocator.plan_shrink: " + std::to_string(num_live_) +
                    " live blocks (the null block included) and " +
                    std::to_string(quarantined_below) +
                    " in quarantine below the new capacity do not fit a capacity of " +
                    std::to_string(capacity) + " blocks");
  }
  std::vector<IdMove> planned = moves;  // the last allocation: nothing fails from here on
  drop_plan();
  for (std::size_t i = 0; i < planned.size(); ++i) {
    const std::uint64_t target = free_.lowest();
    free_.erase(target);
    planned[i].to = moves[i].to = static_cast<std::int64_t>(target);
    at(planned[i].to).state = State::withheld;
  }
  for (std::int64_t id = capacity; id < capacity_; ++id) {
    if (at(id).state != State::free) continue;
    free_.erase(static_cast<std::uint64_t>(id));
    at(id).state = State::withheld;
  }
  planned_capacity_ = capacity;
  planned_moves_ = std::move(planned);
  return moves;
}

void BlockAllocator::require_quarantine_allows(std::int64_t capacity,
                                               std::optional<std::int64_t> after_seq) const {
  const auto first = after_seq ? quarantine_.upper_bound(*after_seq) : quarantine_.begin();
  for (auto list = first; list != quarantine_.end(); ++list) {
    for (std::int64_t id = list->second; id != 0; id = at(id).next) {
      if (id < capacity || id >= capacity_) continue;
      throw Error(ErrorCode::busy,
                  "BlockAllocator.apply_shrink: block " + std::to_string(id) +
                      ", past the new capacity " + std::to_string(capacity) +
                      ", is in quarantine until step " + std::to_string(list->first) +
                      " has retired" +
                      (after_seq ? ", later than after_seq " + std::to_string(*after_seq) : ""));
    }
  }
}

void BlockAllocator::apply_shrink(std::int64_t capacity, std::span<const IdMove> moves,
                                  std::optional<std::int64_t> after_seq) {
  if (after_seq && *after_seq < 0) {
    refuse("BlockAllocator.apply_shrink: after_seq is " + std::to_string(*after_seq) +
           ", expected at least 0");
  }
  std::vector<IdMove> sorted(moves.begin(), moves.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const IdMove& a, const IdMove& b) { return a.from < b.from; });
  const std::lock_guard lock(mutex_);
  if (!planned_capacity_ || capacity < *planned_capacity_ || capacity > capacity_) {
    refuse("BlockAllocator.apply_shrink: capacity is " + std::to_string(capacity) + ", expected " +
           (planned_capacity_ ? std::to_string(*planned_capacity_) + ", which is planned, to " +
                                    std::to_string(capacity_)
                              : std::string("a planned shrink, and none is")));
  }
  // The plan's moves are in the order of the ids that they leave.
  const auto part = std::partition_point(planned_moves_.begin(), planned_moves_.end(),
                                         [&](const IdMove& move) { return move.from < capacity; });
  if (!std::equal(sorted.begin(), sorted.end(), part, planned_moves_.end())) {
    const auto [given, planned] =
        std::mismatch(sorted.begin(), sorted.end(), part, planned_moves_.end());
    const auto text = [](const IdMove& move) {
      return std::to_string(move.from) + " -> " + std::to_string(move.to);
    };
    refuse("BlockAllocator.apply_shrink: moves has " +
           (given == sorted.end() ? std::string("nothing more") : text(*given)) +
           " where the plan has " +
           (planned == planned_moves_.end() ? std::string("nothing more") : text(*planned)));
  }
  require_quarantine_allows(capacity, after_seq);
  const bool wait = after_seq && *after_seq > retired_through_;
  std::uint32_t* list = nullptr;
  if (wait && !sorted.empty()) list = &quarantine_.try_emplace(*after_seq, 0).first->second;

  for (std::int64_t id = capacity; id < capacity_; ++id) {
    if (at(id).state == State::withheld) at(id).state = State::absent;
  }
  capacity_ = capacity;
  planned_moves_.erase(part, planned_moves_.end());
  drop_plan();  // what is left of it
  for (const IdMove& move : sorted) {
    Block& source = at(move.from);
    Block& target = at(move.to);
    if (source.state != State::live) {  // released since the plan was made
      set_free(move.to);
      continue;
    }
    target.state = State::live;
    target.refcount = source.refcount;
    ++target.generation;
    source.refcount = 0;
    if (wait) {
      quarantine(*list, move.from);
    } else {
      set_free(move.from);
    }
  }
}

void BlockAllocator::cancel_shrink() {
  const std::lock_guard lock(mutex_);
  drop_plan();
}

void BlockAllocator::drop_plan() noexcept {
  if (!planned_capacity_) return;
  const std::int64_t first = *planned_capacity_;
  planned_capacity_.reset();
  for (const IdMove& move : planned_moves_) set_free(move.to);
  planned_moves_.clear();
  for (std::int64_t id = first; id < capacity_; ++id) {
    if (at(id).state == State::withheld) set_free(id);
  }
}

}  // namespace pipelive
