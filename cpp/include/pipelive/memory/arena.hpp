#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "pipelive/memory/page_pool.hpp"

namespace pipelive {

/// One page that stands behind holes, so that a stray access hits neither a fault nor live data.
/// It counts against the pool's budget; arenas share it.
class ScratchPage {
 public:
  explicit ScratchPage(PagePool& pool);
  [[nodiscard]] PageHandle page() const noexcept { return lease_.pages()[0]; }

 private:
  PageLease lease_;
};

struct ArenaOptions {
  /// Pages are zeroed before they appear, where an earlier user may have left bytes in them.
  bool scrub = false;
  /// What is behind addresses without a page: null for nothing (an access faults).
  std::shared_ptr<ScratchPage> scratch;
};

/// A reserved address range and the pages mapped in it. Addresses never change; the pages belong to
/// the arena and return to their pool when they are unmapped or the arena goes. Thread-safe.
///
/// Whoever unmaps sees to it that nothing uses the addresses any more.
class Arena {
 public:
  /// Reserves `reserve_bytes`, rounded up to pages. Throws Error(invalid_argument) for 0.
  Arena(std::shared_ptr<PagePool> pool, std::size_t reserve_bytes, ArenaOptions options = {});
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] std::byte* base() const noexcept { return base_; }
  [[nodiscard]] std::size_t reserved_bytes() const noexcept { return reserved_; }
  [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }
  [[nodiscard]] const std::shared_ptr<PagePool>& pool() const noexcept { return pool_; }
  [[nodiscard]] std::size_t mapped_bytes() const;
  /// True where every byte of the range has a page behind it.
  [[nodiscard]] bool is_mapped(std::size_t offset, std::size_t bytes) const;

  /// Draws pages and maps them. `offset` is a multiple of the page size, `bytes` is rounded up to
  /// pages; none of the range may be mapped. On failure nothing has changed.
  void map(std::size_t offset, std::size_t bytes);
  /// Maps pages that were drawn before. On failure the lease still holds them.
  void map(std::size_t offset, PageLease&& pages);
  /// Unmaps the range, all of which must be mapped. The pages go back to the pool.
  void unmap(std::size_t offset, std::size_t bytes);
  /// As unmap, but hands the pages to the caller, who can map them again as they were.
  [[nodiscard]] PageLease take_out(std::size_t offset, std::size_t bytes);
  /// Undoes a take_out: maps the pages with the bytes that they hold. On failure the lease still
  /// holds them.
  void put_back(std::size_t offset, PageLease&& pages);

  /// Copies host bytes to mapped addresses of the arena, or the other way round; they are there
  /// when the call returns. Throws Error(not_resident) where not all of the range is mapped, and
  /// Error(timeout) where the device has not done it within a minute.
  void write(std::size_t offset, std::span<const std::byte> bytes);
  void read(std::size_t offset, std::span<std::byte> bytes) const;

  /// A lendable descriptor of the page at `offset`, for another process.
  [[nodiscard]] ExportedPages export_page(std::size_t offset) const;

  /// Unmaps everything and gives the pages back; only the addresses stay reserved, until the
  /// object goes. Every later call throws Error(closed). May be called twice.
  void close();
  [[nodiscard]] bool closed() const;

 private:
  struct Range {
    std::size_t first;  ///< page index
    std::size_t count;
  };
  [[nodiscard]] Range check_range(const char* call, std::size_t offset, std::size_t bytes) const;
  void check_open() const;
  void check_mapped(const char* call, std::size_t offset, std::size_t bytes) const;
  void map_locked(Range range, PageLease&& pages, bool scrubbed);
  void zero_dirty(Range range, const PageLease& pages);
  [[nodiscard]] std::byte* at(std::size_t page) const noexcept {
    return base_ + page * page_bytes_;
  }
  void close_hole(Range range);
  void open_hole(Range range);
  PageLease take_out_locked(Range range);
  [[nodiscard]] std::vector<PageHandle> handles_locked(Range range) const;

  const std::shared_ptr<PagePool> pool_;
  const std::size_t page_bytes_;
  const std::size_t reserved_;
  const bool scrub_;
  std::byte* base_ = nullptr;

  mutable std::mutex mutex_;
  std::vector<PageHandle> table_;  ///< the page behind each page of addresses, or kNoPage
  std::size_t mapped_pages_ = 0;
  std::shared_ptr<ScratchPage> scratch_;
  bool closed_ = false;
};

}  // namespace pipelive
