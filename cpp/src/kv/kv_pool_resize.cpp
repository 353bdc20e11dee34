// How a KV pool gets more memory and less: who may still use what is to go, and the steps of each.
#include <algorithm>
#include <exception>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/kv/kv_pool.hpp"

namespace pipelive {
namespace {

constexpr double kZeroSeconds = 60.0;

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

void wait_for(std::span<const std::shared_ptr<Event>> events, Deadline deadline) {
  for (const std::shared_ptr<Event>& event : events) {
    if (event != nullptr) event->wait(deadline);
  }
}

}  // namespace

std::vector<Stream> KVPool::users() const {
  std::vector<Stream> streams = residency_.streams();
  for (const Stream stream : device()->implicit_streams()) {
    if (std::find(streams.begin(), streams.end(), stream) == streams.end()) {
      streams.push_back(stream);
    }
  }
  return streams;
}

// All that the noted streams have been given so far comes before what `stream` is given next.
void KVPool::order_after_users(Stream stream) const {
  for (const Stream user : users()) {
    if (user != stream) device()->order_after(stream, device()->record(user));
  }
}

void KVPool::wait_for_users(Stream stream, Deadline deadline) const {
  std::vector<Stream> streams = users();
  if (stream.handle != nullptr &&
      std::find(streams.begin(), streams.end(), stream) == streams.end())
    streams.push_back(stream);
  std::vector<std::shared_ptr<Event>> events;
  events.reserve(streams.size());
  for (const Stream user : streams) events.push_back(device()->record(user));
  wait_for(events, deadline);
}

// A device that has failed for good has no work under way, and must not keep the pool open.
void KVPool::wait_for_users_at_close() const {
  try {
    wait_for_users({}, Deadline::after_seconds(kFenceSeconds));
  } catch (const Error& error) {
    if (error.code() != ErrorCode::device) throw;
  }
}

// The page that stands behind holes cannot be exchanged for others in one step, and what runs on a
// device does not wait for the second one.
void KVPool::wait_for_users_of_holes() const {
  if (scratch_ != nullptr) wait_for_users({}, Deadline::after_seconds(kFenceSeconds));
}

void KVPool::set_limits(const std::vector<std::uint32_t>& stacks, std::uint64_t limit) noexcept {
  for (const std::uint32_t index : stacks) {
    for (std::uint32_t i = 0; i < geometry_.layers_in(index); ++i) {
      residency_.set_limit(geometry_.first_layer(index) + i, limit);
    }
  }
}

// Draws all pages first, since running out is what fails in practice; then maps part by part and
// takes the parts out again where one fails.
void KVPool::map_all(std::vector<Mapped> parts) {
  std::erase_if(parts, [](const Mapped& part) { return part.bytes == 0; });
  std::size_t total = 0;
  for (const Mapped& part : parts) total += part.bytes / geometry_.page_bytes;
  PageLease lease = pages_->take(total, PagePool::Prefer::clean);
  std::size_t done = 0;
  try {
    for (; done < parts.size(); ++done) {
      PageLease rest = lease.split(parts[done].bytes / geometry_.page_bytes);
      parts[done].arena->map(parts[done].offset, std::move(lease));
      lease = std::move(rest);
    }
  } catch (...) {
    while (done-- > 0) {
      try {
        parts[done].arena->unmap(parts[done].offset, parts[done].bytes);
      } catch (const std::exception& error) {
        forbid_use_locked(std::string("undoing a failed grow failed: ") + error.what());
      }
    }
    throw;
  }
}

std::vector<KVPool::Removed> KVPool::unmap_all(const std::vector<Mapped>& parts) {
  std::vector<Removed> removed;
  removed.reserve(parts.size());
  try {
    for (const Mapped& part : parts) {
      if (part.bytes == 0) continue;
      removed.push_back({part.arena, part.offset, part.arena->take_out(part.offset, part.bytes)});
    }
  } catch (...) {
    for (Removed& part : removed) {
      try {
        part.arena->put_back(part.offset, std::move(part.pages));
      } catch (const std::exception& error) {
        forbid_use_locked(std::string("undoing a failed shrink failed: ") + error.what());
      }
    }
    throw;
  }
  return removed;
}

void KVPool::add_layers(std::span<const std::uint32_t> layers) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  const std::vector<std::uint32_t> stacks = geometry_.stacks_of(layers, "add_layers", true);
  std::vector<Mapped> parts;
  for (const std::uint32_t index : stacks) {
    if (held_[index]) {
      fail("add_layers: layer " + std::to_string(geometry_.first_layer(index)) +
           " is held already");
    }
    const std::size_t pages = geometry_.pages_for(index, capacity());
    parts.push_back({arenas_[index].get(), 0, pages * geometry_.page_bytes});
  }
  reclaim_locked({}, Deadline::after_seconds(kFenceSeconds));
  wait_for_users_of_holes();
  map_all(std::move(parts));
  publish_locked(capacity(), stacks, true);
}

void KVPool::drop_layers(std::span<const std::uint32_t> layers,
                         std::span<const std::shared_ptr<Event>> after) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  const std::vector<std::uint32_t> stacks = geometry_.stacks_of(layers, "drop_layers", true);
  std::vector<Mapped> parts;
  for (const std::uint32_t index : stacks) {
    if (!held_[index]) {
      fail("drop_layers: layer " + std::to_string(geometry_.first_layer(index)) + " is not held");
    }
    const std::size_t pages = geometry_.pages_for(index, mapped_);
    parts.push_back({arenas_[index].get(), 0, pages * geometry_.page_bytes});
  }
  const Deadline deadline = Deadline::after_seconds(kFenceSeconds);
  wait_for(after, deadline);
  // Nothing begins to use what is to go from here on; what has begun is waited for.
  set_limits(stacks, 0);
  std::vector<Removed> removed;
  try {
    residency_.drain(deadline);
    wait_for_users({}, deadline);
    removed = unmap_all(parts);
  } catch (...) {
    publish_locked(capacity(), {}, false);
    throw;
  }
  publish_locked(capacity(), stacks, false);
}

void KVPool::grow(std::uint64_t capacity) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  check_capacity("grow", capacity);
  const std::uint64_t before = this->capacity();
  if (capacity < before) {
    fail("grow: capacity is " + std::to_string(capacity) + ", expected at least the present " +
         std::to_string(before));
  }
  if (capacity == before) return;
  reclaim_locked({}, Deadline::after_seconds(kFenceSeconds));
  wait_for_users_of_holes();
  std::vector<Mapped> parts;
  const std::vector<std::uint32_t> stacks = held_stacks();
  bool zeroed = false;
  for (const std::uint32_t index : stacks) {
    const std::size_t old_bytes = geometry_.pages_for(index, before) * geometry_.page_bytes;
    const std::size_t new_bytes = geometry_.pages_for(index, capacity) * geometry_.page_bytes;
    parts.push_back({arenas_[index].get(), old_bytes, new_bytes - old_bytes});
    // The last page so far may hold what an id above the capacity left behind.
    const std::size_t used = before * geometry_.stride(index);
    if (used < old_bytes) {
      device()->fill(arenas_[index]->base() + used, 0, old_bytes - used);
      zeroed = true;
    }
  }
  if (zeroed) device()->record()->wait(Deadline::after_seconds(kZeroSeconds));
  map_all(std::move(parts));
  set_mapped_locked(capacity);
  publish_locked(capacity, {}, false);
}

void KVPool::lower_locked(std::uint64_t capacity, std::span<const std::uint64_t> live,
                          std::span<const BlockMove> moves,
                          std::span<const std::shared_ptr<Event>> after, Stream stream,
                          Deadline deadline) {
  check_capacity("shrink", capacity);
  if (capacity > this->capacity()) {
    fail("shrink: capacity is " + std::to_string(capacity) + ", expected at most the present " +
         std::to_string(this->capacity()));
  }
  check_moves(moves, capacity);
  check_live(capacity, live, moves);
  wait_for(after, deadline);
  if (!moves.empty()) {
    // A host operation must not write to a block while it is copied.
    const Residency::Exclusive exclusive = residency_.exclude(deadline);
    copy_blocks_locked(moves, stream);
    // Until then the pages that it copies from have to stay.
    if (stream.handle != nullptr) moved_ = device()->record(stream);
  }
  publish_locked(capacity, {}, false);
}

void KVPool::reclaim_locked(Stream stream, Deadline deadline) {
  if (mapped_ == capacity()) return;
  std::vector<Mapped> parts;
  for (const std::uint32_t index : held_stacks()) {
    const std::size_t old_bytes = geometry_.pages_for(index, mapped_) * geometry_.page_bytes;
    const std::size_t new_bytes = geometry_.pages_for(index, capacity()) * geometry_.page_bytes;
    parts.push_back({arenas_[index].get(), new_bytes, old_bytes - new_bytes});
  }
  residency_.drain(deadline);
  wait_for_users(stream, deadline);
  if (moved_ != nullptr) moved_->wait(deadline);
  moved_.reset();
  const std::vector<Removed> removed = unmap_all(parts);
  set_mapped_locked(capacity());
}

void KVPool::set_mapped_locked(std::uint64_t blocks) noexcept {
  const std::lock_guard lock(state_mutex_);
  mapped_ = blocks;
}

void KVPool::shrink(std::uint64_t capacity, std::span<const std::uint64_t> live,
                    std::span<const BlockMove> moves, std::span<const std::shared_ptr<Event>> after,
                    Stream stream) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  const std::uint64_t before = this->capacity();
  const Deadline deadline = Deadline::after_seconds(kFenceSeconds);
  lower_locked(capacity, live, moves, after, stream, deadline);
  try {
    reclaim_locked(stream, deadline);
  } catch (...) {
    publish_locked(before, {}, false);
    throw;
  }
}

void KVPool::lower(std::uint64_t capacity, std::span<const std::uint64_t> live,
                   std::span<const BlockMove> moves, Stream stream) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  lower_locked(capacity, live, moves, {}, stream, Deadline::after_seconds(kFenceSeconds));
}

void KVPool::reclaim() {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  reclaim_locked({}, Deadline::after_seconds(kFenceSeconds));
}

}  // namespace pipelive
