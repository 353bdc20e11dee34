#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive {

class PagePool;

/// Pages drawn from a pool, given back with the object. Move-only.
class PageLease {
 public:
  PageLease() = default;
  PageLease(PageLease&& other) noexcept = default;
  PageLease& operator=(PageLease&& other) noexcept;
  PageLease(const PageLease&) = delete;
  PageLease& operator=(const PageLease&) = delete;
  ~PageLease() { give_back(); }

  [[nodiscard]] std::size_t size() const noexcept { return pages_.size(); }
  [[nodiscard]] bool empty() const noexcept { return pages_.empty(); }
  /// Ascending, so that neighbours are mapped in one call.
  [[nodiscard]] std::span<const PageHandle> pages() const noexcept { return pages_; }
  /// True where page number `index` of the lease may hold what an earlier user left in it.
  [[nodiscard]] bool dirty(std::size_t index) const { return dirty_.at(index); }
  /// All pages count as dirty from now on; to be called when they become writable.
  void mark_dirty() noexcept;
  /// Moves the pages from `index` on into a lease of their own.
  [[nodiscard]] PageLease split(std::size_t index);
  void give_back() noexcept;

 private:
  friend class PagePool;
  friend class Arena;
  std::shared_ptr<PagePool> pool_;
  std::vector<PageHandle> pages_;
  std::vector<bool> dirty_;
};

struct PagePoolOptions {
  std::size_t page_bytes = std::size_t{2} << 20;
  std::uint64_t budget_bytes = 0;  ///< rounded down to whole pages
  /// As many pages of zeros are kept ready by a background thread, within the budget; 0: no thread
  /// until `prepare` asks for one.
  std::size_t prepare_ahead = 0;
};

struct PagePoolStats {
  std::uint64_t page_bytes = 0;
  std::uint64_t budget_bytes = 0;
  std::uint64_t held_bytes = 0;      ///< physical memory, used or kept for reuse
  std::uint64_t used_bytes = 0;      ///< in leases
  std::uint64_t free_bytes = 0;      ///< kept for reuse
  std::uint64_t prepared_bytes = 0;  ///< the part of free_bytes that holds zeros
  std::uint64_t peak_held_bytes = 0;
  std::uint64_t peak_used_bytes = 0;
  std::uint64_t pages_created = 0;
  std::uint64_t pages_reused = 0;
  std::uint64_t prepare_failures = 0;  ///< background calls that the device refused
};

/// The only owner of a device's physical pages, under a budget: pages in use plus pages kept for
/// reuse never exceed it, not even for a moment. Thread-safe.
class PagePool : public std::enable_shared_from_this<PagePool> {
 public:
  /// Throws Error(invalid_argument) for page_bytes that the device cannot map or a budget of less
  /// than one page.
  [[nodiscard]] static std::shared_ptr<PagePool> create(std::shared_ptr<Device> device,
                                                        const PagePoolOptions& options);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return device_; }
  [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }
  [[nodiscard]] std::uint64_t budget_bytes() const noexcept { return budget_ * page_bytes_; }
  [[nodiscard]] PagePoolStats stats() const;

  /// Which free pages a user would rather have: pages of zeros cost others their preparation.
  enum class Prefer : std::uint8_t { clean, dirty };
  /// Draws `count` pages, kept ones first, then new ones. Throws Error(over_budget), with the
  /// numbers, or what the device throws; then nothing was drawn. Error(closed) after close().
  [[nodiscard]] PageLease take(std::size_t count, Prefer prefer = Prefer::clean);
  /// Throws Error(over_budget) where `count` more pages would not fit.
  void check_fits(std::size_t count) const;

  /// Asks the background thread for `count` free pages of zeros; it stops at the budget. A later
  /// call replaces the number. Returns at once.
  void prepare(std::size_t count);
  /// Waits until the thread has done what it can; throws Error(timeout) at the deadline.
  void wait_prepared(Deadline deadline);
  /// Returns free pages beyond `keep_bytes` to the device; the number of bytes returned.
  std::uint64_t trim(std::uint64_t keep_bytes = 0);
  /// No more pages are drawn; free pages return to the device now, pages in use when they are given
  /// back. May be called twice.
  void close();
  [[nodiscard]] bool closed() const;

 private:
  friend class PageLease;
  PagePool(std::shared_ptr<Device> device, const PagePoolOptions& options);
  void give_back(std::span<const PageHandle> pages, const std::vector<bool>& dirty) noexcept;
  void insert_free(std::span<const PageHandle> pages, bool dirty) noexcept;
  void reserve_lists(std::size_t pages);
  void start_thread_locked();
  void work();
  bool work_once(std::unique_lock<std::mutex>& lock);
  void scrub(PageHandle page);
  void destroy(std::vector<PageHandle> pages) noexcept;
  [[nodiscard]] std::size_t free_locked() const noexcept { return clean_.size() + dirty_.size(); }
  [[nodiscard]] std::size_t held_locked() const noexcept { return used_ + busy_ + free_locked(); }
  void note_peaks_locked() noexcept;
  void check_fits_locked(std::size_t count) const;

  const std::shared_ptr<Device> device_;
  const std::size_t page_bytes_;
  const std::uint64_t budget_;  ///< in pages
  const pid_t process_;

  mutable std::mutex mutex_;
  // On the heap so that a forked child can leave it alone, see the destructor.
  std::unique_ptr<std::condition_variable> changed_ = std::make_unique<std::condition_variable>();
  std::size_t used_ = 0;  ///< in leases, or being created for one
  std::size_t busy_ = 0;  ///< being created, scrubbed or destroyed by somebody, without the lock
  // Sorted downwards, so that the lowest handles are taken from the back. Their capacity always
  // covers every page held, so that giving back cannot fail.
  std::vector<PageHandle> clean_;
  std::vector<PageHandle> dirty_;
  bool unsorted_ = false;
  std::size_t wanted_ = 0;  ///< free pages of zeros that the thread works for
  bool stalled_ = false;    ///< the device refused the thread; until something changes
  bool closed_ = false;
  std::byte* window_ = nullptr;  ///< where the thread maps a page to scrub it
  std::uint64_t peak_held_ = 0;
  std::uint64_t peak_used_ = 0;
  std::uint64_t created_ = 0;
  std::uint64_t reused_ = 0;
  std::uint64_t prepare_failures_ = 0;
  std::thread thread_;
};

}  // namespace pipelive
