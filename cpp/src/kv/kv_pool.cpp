#include "pipelive/kv/kv_pool.hpp"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr double kCopySeconds = 60.0;

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

Geometry make_geometry(const KVSpec& spec, const PagePool& pages, const KVPoolOptions& options) {
  spec.validate();
  Geometry geometry;
  geometry.block_bytes = spec.block_bytes();
  geometry.num_layers = options.num_layers;
  geometry.stack = options.stack;
  geometry.max_blocks = options.max_blocks;
  geometry.page_bytes = pages.page_bytes();
  geometry.extra_pages = options.holes == HolePolicy::scratch ? 1 : 0;
  geometry.validate();
  return geometry;
}

// What somebody used beyond every deadline when its pool went. To lose the memory is better than to
// take it away under a kernel, which would end all of the process's work on the device.
void keep_for_good(std::vector<std::unique_ptr<Arena>>& arenas) {
  static auto& mutex = *new std::mutex;
  static auto& kept = *new std::vector<std::unique_ptr<Arena>>;
  const std::lock_guard lock(mutex);
  std::move(arenas.begin(), arenas.end(), std::back_inserter(kept));
  arenas.clear();
}

}  // namespace

std::shared_ptr<KVPool> KVPool::create(const KVSpec& spec, std::shared_ptr<PagePool> pages,
                                       const KVPoolOptions& options) {
  if (pages == nullptr) fail("KVPool: pages is null, expected a page pool");
  std::shared_ptr<KVPool> pool(new KVPool(spec, std::move(pages), options));
  pool->check_capacity("capacity", options.capacity);
  if (!options.layers.empty()) pool->add_layers(options.layers);
  return pool;
}

KVPool::KVPool(const KVSpec& spec, std::shared_ptr<PagePool> pages, const KVPoolOptions& options)
    : spec_(spec),
      layout_(spec.layout()),
      geometry_(make_geometry(spec, *pages, options)),
      holes_(options.holes),
      pages_(std::move(pages)),
      held_(geometry_.num_stacks(), false),
      capacity_(options.capacity),
      mapped_(options.capacity),
      residency_(geometry_.num_layers) {
  if (holes_ == HolePolicy::scratch) scratch_ = std::make_shared<ScratchPage>(*pages_);
  device()->prepare_copies();
  arenas_.reserve(held_.size());
  for (std::uint32_t index = 0; index < held_.size(); ++index) {
    const std::size_t bytes = geometry_.pages_for(index, geometry_.max_blocks);
    arenas_.push_back(std::make_unique<Arena>(pages_, bytes * geometry_.page_bytes,
                                              ArenaOptions{true, scratch_}));
  }
}

KVPool::~KVPool() {
  try {
    close();
  } catch (const Error& error) {
    // The arenas try again, and release their addresses in any case.
    if (error.code() == ErrorCode::timeout) keep_for_good(arenas_);
  } catch (const std::exception&) {
    // As above.
  }
}

void KVPool::check_open() const {
  if (closed()) throw Error(ErrorCode::closed, "the KV pool is closed");
}

void KVPool::check_usable_locked() const {
  check_open();
  if (!broken_.empty()) throw Error(ErrorCode::device, "the KV pool is unusable: " + broken_);
}

void KVPool::check_capacity(const char* call, std::uint64_t capacity) const {
  if (capacity < 1 || capacity > geometry_.max_blocks) {
    fail(std::string(call) + ": capacity is " + std::to_string(capacity) + ", expected 1 to " +
         std::to_string(geometry_.max_blocks));
  }
}

std::vector<std::uint32_t> KVPool::held_stacks() const {
  std::vector<std::uint32_t> stacks;
  for (std::uint32_t index = 0; index < held_.size(); ++index) {
    if (held_[index]) stacks.push_back(index);
  }
  return stacks;
}

std::vector<std::uint32_t> KVPool::layers() const {
  const std::lock_guard lock(state_mutex_);
  std::vector<std::uint32_t> layers;
  for (const std::uint32_t index : held_stacks()) {
    for (std::uint32_t i = 0; i < geometry_.layers_in(index); ++i) {
      layers.push_back(geometry_.first_layer(index) + i);
    }
  }
  return layers;
}

KVPoolStats KVPool::stats() const {
  const std::lock_guard lock(state_mutex_);
  const std::vector<std::uint32_t> stacks = held_stacks();
  KVPoolStats stats;
  stats.capacity = capacity();
  stats.max_blocks = geometry_.max_blocks;
  for (const std::uint32_t index : stacks) stats.layers_held += geometry_.layers_in(index);
  stats.held_bytes = closed() ? 0 : geometry_.bytes_needed(stacks, mapped_);
  stats.resident_bytes = stats.capacity * stats.layers_held * geometry_.block_bytes;
  return stats;
}

LayerMemory KVPool::layer_memory(std::uint32_t layer) const {
  if (layer >= geometry_.num_layers) {
    fail("layer is " + std::to_string(layer) + ", expected 0 to " +
         std::to_string(geometry_.num_layers - 1));
  }
  const std::uint32_t index = geometry_.stack_of(layer);
  const std::size_t place = layer - geometry_.first_layer(index);
  return {arenas_[index]->base() + place * geometry_.block_bytes, geometry_.stride(index),
          geometry_.max_blocks};
}

// Makes a change known: the new capacity, and whether `stacks` are held from now on.
void KVPool::publish_locked(std::uint64_t capacity, const std::vector<std::uint32_t>& stacks,
                            bool held) noexcept {
  const std::lock_guard lock(state_mutex_);
  for (const std::uint32_t index : stacks) held_[index] = held;
  capacity_.store(capacity, std::memory_order_release);
  const std::uint64_t limit = closed() || !broken_.empty() ? 0 : capacity;
  for (std::uint32_t layer = 0; layer < geometry_.num_layers; ++layer) {
    residency_.set_limit(layer, held_[geometry_.stack_of(layer)] ? limit : 0);
  }
}

void KVPool::forbid_use_locked(std::string reason) noexcept {
  broken_ = std::move(reason);
  publish_locked(capacity(), {}, false);
}

void KVPool::check_moves(std::span<const BlockMove> moves, std::uint64_t target_limit) const {
  std::unordered_set<std::uint64_t> named;
  named.reserve(2 * moves.size());
  for (const BlockMove& move : moves) {
    const auto text = [&move] {
      return "move of block " + std::to_string(move.from) + " to " + std::to_string(move.to);
    };
    if (move.from == 0 || move.to == 0) fail(text() + ": block 0 never moves");
    if (move.from >= capacity()) {
      throw Error(ErrorCode::not_resident,
                  text() + ": resident are the ids below " + std::to_string(capacity()));
    }
    if (move.to >= target_limit) {
      fail(text() + ": expected a target below " + std::to_string(target_limit));
    }
    // Without chains the copies may be made in any order and a failure half-way loses nothing.
    if (!named.insert(move.from).second)
      fail(text() + ": " + std::to_string(move.from) + " is part of another move");
    if (!named.insert(move.to).second)
      fail(text() + ": " + std::to_string(move.to) + " is part of another move");
  }
}

void KVPool::check_live(std::uint64_t capacity, std::span<const std::uint64_t> live,
                        std::span<const BlockMove> moves) const {
  const std::unordered_set<std::uint64_t> alive(live.begin(), live.end());
  std::unordered_set<std::uint64_t> moved;
  for (const BlockMove& move : moves) {
    moved.insert(move.from);
    if (!alive.contains(move.from)) {
      fail("shrink: block " + std::to_string(move.from) + " is to move to " +
           std::to_string(move.to) + " and is not live");
    }
    if (alive.contains(move.to)) {
      fail("shrink: block " + std::to_string(move.from) + " is to move to " +
           std::to_string(move.to) + ", which is live");
    }
  }
  std::vector<std::uint64_t> stranded;
  for (const std::uint64_t id : alive) {
    if (id >= this->capacity()) {
      throw Error(ErrorCode::not_resident, "shrink: live block " + std::to_string(id) +
                                               " is not resident; resident are the ids below " +
                                               std::to_string(this->capacity()));
    }
    if (id >= capacity && !moved.contains(id)) stranded.push_back(id);
  }
  if (!stranded.empty()) {
    std::sort(stranded.begin(), stranded.end());
    throw Error(ErrorCode::busy, "shrink to " + std::to_string(capacity) + ": " +
                                     std::to_string(stranded.size()) +
                                     " live blocks stand in the way: " + list_some(stranded));
  }
}

void KVPool::order_consumer(Stream consumer) const {
  check_open();
  for (const Stream user : residency_.streams()) {
    if (user != consumer) device()->order_after(consumer, device()->record(user));
  }
}

void KVPool::copy_blocks_locked(std::span<const BlockMove> moves, Stream stream) {
  if (moves.empty()) return;
  order_after_users(stream);
  std::vector<BlockMove> sorted(moves.begin(), moves.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const BlockMove& a, const BlockMove& b) { return a.from < b.from; });
  std::vector<CopyJob> jobs;
  for (const std::uint32_t index : held_stacks()) {
    std::byte* base = arenas_[index]->base();
    const std::size_t stride = geometry_.stride(index);
    for (std::size_t first = 0; first < sorted.size();) {
      std::size_t last = first + 1;
      while (last < sorted.size() && sorted[last].from == sorted[last - 1].from + 1 &&
             sorted[last].to == sorted[last - 1].to + 1) {
        ++last;
      }
      jobs.push_back({base + sorted[first].to * stride, base + sorted[first].from * stride,
                      (last - first) * stride});
      first = last;
    }
  }
  device()->copy_many(jobs, stream);
  if (stream.handle == nullptr) {
    device()->record()->wait(Deadline::after_seconds(kCopySeconds));
  }
}

void KVPool::move_blocks(std::span<const BlockMove> moves, Stream stream) {
  const std::lock_guard lock(mutex_);
  check_usable_locked();
  check_moves(moves, capacity());
  copy_blocks_locked(moves, stream);
}

std::uint64_t KVPool::bytes_needed(std::span<const std::uint32_t> layers,
                                   std::uint64_t capacity) const {
  check_capacity("bytes_needed", capacity);
  return geometry_.bytes_needed(geometry_.stacks_of(layers, "layers", false), capacity);
}

std::uint64_t KVPool::blocks_that_fit(std::span<const std::uint32_t> layers,
                                      std::uint64_t budget_bytes) const {
  return geometry_.blocks_that_fit(geometry_.stacks_of(layers, "layers", false), budget_bytes);
}

void KVPool::close() {
  const std::lock_guard lock(mutex_);
  if (!closed()) {
    const Residency::Exclusive exclusive =
        residency_.exclude(Deadline::after_seconds(kFenceSeconds));
    wait_for_users_at_close();
    closed_.store(true, std::memory_order_release);
    publish_locked(capacity(), {}, false);
  }
  // Every arena is tried; one that fails is tried again by the next call, at last by its
  // destructor.
  std::exception_ptr failure;
  for (const auto& arena : arenas_) {
    try {
      arena->close();
    } catch (const std::exception&) {
      if (failure == nullptr) failure = std::current_exception();
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
  scratch_.reset();
}

}  // namespace pipelive
