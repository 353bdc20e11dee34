#include "pipelive/memory/page_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

// How long a taker waits for a page that the background thread has in its hands.
constexpr double kBusyPagesSeconds = 60.0;
// Pages that the thread creates at a time: few, so that a taker never waits long for them.
constexpr std::size_t kPrepareBatch = 4;

}  // namespace

PageLease& PageLease::operator=(PageLease&& other) noexcept {
  if (this != &other) {
    give_back();
    pool_ = std::move(other.pool_);
    pages_ = std::move(other.pages_);
    dirty_ = std::move(other.dirty_);
    other.pages_.clear();
    other.dirty_.clear();
  }
  return *this;
}

void PageLease::mark_dirty() noexcept {
  std::fill(dirty_.begin(), dirty_.end(), true);
}

PageLease PageLease::split(std::size_t index) {
  PageLease rest;
  if (index >= pages_.size()) return rest;
  rest.pool_ = pool_;
  rest.pages_.assign(pages_.begin() + static_cast<std::ptrdiff_t>(index), pages_.end());
  rest.dirty_.assign(dirty_.begin() + static_cast<std::ptrdiff_t>(index), dirty_.end());
  pages_.resize(index);
  dirty_.resize(index);
  return rest;
}

void PageLease::give_back() noexcept {
  if (pool_ != nullptr && !pages_.empty()) pool_->give_back(pages_, dirty_);
  pages_.clear();
  dirty_.clear();
  pool_.reset();
}

std::shared_ptr<PagePool> PagePool::create(std::shared_ptr<Device> device,
                                           const PagePoolOptions& options) {
  if (device == nullptr) {
    throw Error(ErrorCode::invalid_argument, "PagePool: device is null, expected a device");
  }
  const std::size_t unit = device->info().page_granularity;
  if (options.page_bytes == 0 || options.page_bytes % unit != 0 ||
      !std::has_single_bit(options.page_bytes)) {
    throw Error(ErrorCode::invalid_argument,
                "page_bytes is " + std::to_string(options.page_bytes) +
                    ", expected a power of two that is a multiple of " + std::to_string(unit));
  }
  if (options.budget_bytes < options.page_bytes) {
    throw Error(ErrorCode::invalid_argument, "budget is " + std::to_string(options.budget_bytes) +
                                                 " bytes, expected at least one page of " +
                                                 std::to_string(options.page_bytes));
  }
  std::shared_ptr<PagePool> pool(new PagePool(std::move(device), options));
  if (options.prepare_ahead > 0) pool->prepare(options.prepare_ahead);
  return pool;
}

PagePool::PagePool(std::shared_ptr<Device> device, const PagePoolOptions& options)
    : device_(std::move(device)),
      page_bytes_(options.page_bytes),
      budget_(options.budget_bytes / options.page_bytes),
      process_(::getpid()) {}

PagePool::~PagePool() {
  close();
  if (window_ != nullptr) device_->release(window_, page_bytes_);
  // The thread, which a forked child does not have, still counts as waiting there; to destroy a
  // condition variable is to wait for who waits on it.
  if (::getpid() != process_) static_cast<void>(changed_.release());
}

PagePoolStats PagePool::stats() const {
  const std::lock_guard lock(mutex_);
  PagePoolStats stats;
  stats.page_bytes = page_bytes_;
  stats.budget_bytes = budget_ * page_bytes_;
  stats.held_bytes = held_locked() * page_bytes_;
  stats.used_bytes = used_ * page_bytes_;
  stats.free_bytes = free_locked() * page_bytes_;
  stats.prepared_bytes = clean_.size() * page_bytes_;
  stats.peak_held_bytes = peak_held_ * page_bytes_;
  stats.peak_used_bytes = peak_used_ * page_bytes_;
  stats.pages_created = created_;
  stats.pages_reused = reused_;
  stats.prepare_failures = prepare_failures_;
  return stats;
}

void PagePool::note_peaks_locked() noexcept {
  peak_used_ = std::max<std::uint64_t>(peak_used_, used_);
  peak_held_ = std::max<std::uint64_t>(peak_held_, held_locked());
}

void PagePool::check_fits_locked(std::size_t count) const {
  if (count > budget_ || used_ > budget_ - count) {
    throw Error(ErrorCode::over_budget,
                std::to_string(count) + " more pages of " + std::to_string(page_bytes_) +
                    " bytes do not fit: " + std::to_string(used_) + " of the budget's " +
                    std::to_string(budget_) + " pages are in use");
  }
}

void PagePool::check_fits(std::size_t count) const {
  const std::lock_guard lock(mutex_);
  check_fits_locked(count);
}

void PagePool::reserve_lists(std::size_t pages) {
  // Doubling, since reserve() itself need not.
  const auto grow = [pages](std::vector<PageHandle>& list) {
    if (list.capacity() < pages) list.reserve(std::max(pages, 2 * list.capacity()));
  };
  grow(clean_);
  grow(dirty_);
}

PageLease PagePool::take(std::size_t count, Prefer prefer) {
  PageLease lease;
  lease.pages_.reserve(count);
  lease.dirty_.reserve(count);
  std::unique_lock lock(mutex_);
  const Deadline deadline = Deadline::after_seconds(kBusyPagesSeconds);
  std::size_t missing = 0;
  for (;;) {
    if (closed_) throw Error(ErrorCode::closed, "the page pool is closed");
    check_fits_locked(count);
    missing = count - std::min(count, free_locked());
    if (used_ + busy_ + count <= budget_ || missing == 0) break;
    // The rest of the budget is in the background thread's hands for a moment.
    if (changed_->wait_until(lock, deadline.at()) == std::cv_status::timeout) {
      throw Error(ErrorCode::timeout,
                  "the thread that prepares pages kept " + std::to_string(busy_) + " pages for " +
                      std::to_string(static_cast<int>(kBusyPagesSeconds)) + " seconds");
    }
  }
  reserve_lists(held_locked() + missing);
  if (unsorted_) {
    std::sort(clean_.begin(), clean_.end(), std::greater<>());
    std::sort(dirty_.begin(), dirty_.end(), std::greater<>());
    unsorted_ = false;
  }
  std::vector<std::pair<PageHandle, bool>> drawn;
  drawn.reserve(count);
  const auto draw = [&](std::vector<PageHandle>& list, bool dirty) {
    while (!list.empty() && drawn.size() < count) {
      drawn.emplace_back(list.back(), dirty);
      list.pop_back();
    }
  };
  const bool clean_first = prefer == Prefer::clean;
  draw(clean_first ? clean_ : dirty_, !clean_first);
  draw(clean_first ? dirty_ : clean_, clean_first);
  used_ += count;
  if (missing > 0) {
    lock.unlock();
    std::vector<PageHandle> made;
    try {
      made = device_->create_pages(page_bytes_, missing);
      const bool dirty = !device_->info().zeroed_pages;
      for (const PageHandle page : made) drawn.emplace_back(page, dirty);
    } catch (...) {
      // The lists have room for every page held, so putting back cannot fail.
      lock.lock();
      used_ -= count;
      for (const auto& [page, dirty] : drawn) (dirty ? dirty_ : clean_).push_back(page);
      unsorted_ = true;
      changed_->notify_all();
      throw;
    }
    lock.lock();
    created_ += missing;
  }
  reused_ += count - missing;
  note_peaks_locked();
  if (wanted_ > 0) changed_->notify_all();
  lock.unlock();
  std::sort(drawn.begin(), drawn.end());
  for (const auto& [page, dirty] : drawn) {
    lease.pages_.push_back(page);
    lease.dirty_.push_back(dirty);
  }
  lease.pool_ = shared_from_this();
  return lease;
}

void PagePool::give_back(std::span<const PageHandle> pages,
                         const std::vector<bool>& dirty) noexcept {
  std::unique_lock lock(mutex_);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    (dirty[i] ? dirty_ : clean_).push_back(pages[i]);
  }
  used_ -= pages.size();
  unsorted_ = true;
  stalled_ = false;
  changed_->notify_all();
  if (!closed_) return;
  lock.unlock();
  try {
    trim(0);
  } catch (const std::exception&) {
    // The pages stay held; the destructor tries again.
  }
}

std::uint64_t PagePool::trim(std::uint64_t keep_bytes) {
  std::vector<PageHandle> gone;
  std::unique_lock lock(mutex_);
  const std::size_t keep = keep_bytes / page_bytes_;
  if (free_locked() <= keep) return 0;
  const std::size_t count = free_locked() - keep;
  gone.reserve(count);
  std::sort(clean_.begin(), clean_.end(), std::greater<>());
  std::sort(dirty_.begin(), dirty_.end(), std::greater<>());
  unsorted_ = false;
  // Pages of zeros are worth more; of each kind the highest handles go.
  const std::size_t dirty_gone = std::min(count, dirty_.size());
  const std::size_t clean_gone = count - dirty_gone;
  const auto cut = [&gone](std::vector<PageHandle>& list, std::size_t n) {
    const auto end = list.begin() + static_cast<std::ptrdiff_t>(n);
    gone.insert(gone.end(), list.begin(), end);
    list.erase(list.begin(), end);
  };
  cut(dirty_, dirty_gone);
  cut(clean_, clean_gone);
  busy_ += count;
  lock.unlock();
  try {
    device_->destroy_pages(page_bytes_, gone);
  } catch (...) {
    lock.lock();
    busy_ -= count;
    dirty_.insert(dirty_.end(), gone.begin(),
                  gone.begin() + static_cast<std::ptrdiff_t>(dirty_gone));
    clean_.insert(clean_.end(), gone.begin() + static_cast<std::ptrdiff_t>(dirty_gone), gone.end());
    unsorted_ = true;
    changed_->notify_all();
    throw;
  }
  lock.lock();
  busy_ -= count;
  changed_->notify_all();
  return count * page_bytes_;
}

void PagePool::prepare(std::size_t count) {
  const std::lock_guard lock(mutex_);
  if (closed_) throw Error(ErrorCode::closed, "the page pool is closed");
  if (count > budget_) {
    throw Error(ErrorCode::over_budget, "prepare: count is " + std::to_string(count) +
                                            " pages, the budget has " + std::to_string(budget_));
  }
  wanted_ = count;
  stalled_ = false;
  if (wanted_ > 0 && !thread_.joinable()) thread_ = std::thread([this] { work(); });
  changed_->notify_all();
}

void PagePool::wait_prepared(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto idle = [this] {
    const bool can = dirty_.empty() && held_locked() >= budget_;
    return closed_ || stalled_ || clean_.size() >= wanted_ || (can && busy_ == 0);
  };
  if (!changed_->wait_until(lock, deadline.at(), idle)) {
    throw Error(ErrorCode::timeout, "pages to prepare: " + std::to_string(clean_.size()) + " of " +
                                        std::to_string(wanted_) + " are ready");
  }
}

void PagePool::work() {
  std::unique_lock lock(mutex_);
  while (!closed_) {
    if (stalled_ || !work_once(lock)) changed_->wait(lock);
  }
}

// One piece of work: scrub a page kept for reuse, else create a few. False where there is nothing
// to do.
bool PagePool::work_once(std::unique_lock<std::mutex>& lock) {
  if (clean_.size() >= wanted_) return false;
  const std::size_t room = budget_ - held_locked();
  const bool make = dirty_.empty();
  if (make && room == 0) return false;
  const std::size_t count =
      make ? std::min({room, wanted_ - clean_.size(), kPrepareBatch}) : std::size_t{1};
  std::vector<PageHandle> pages;
  try {
    if (make) {
      reserve_lists(held_locked() + count);
    } else {
      pages.push_back(dirty_.back());
      dirty_.pop_back();
    }
    busy_ += count;
  } catch (const std::bad_alloc&) {
    stalled_ = true;
    return true;
  }
  note_peaks_locked();
  lock.unlock();
  bool ok = true;
  try {
    if (make) {
      pages = device_->create_pages(page_bytes_, count);
    } else {
      scrub(pages.front());
    }
  } catch (const std::exception&) {
    ok = false;
  }
  lock.lock();
  busy_ -= count;
  if (ok) {
    // New pages that hold no zeros are scrubbed one by one in the rounds that follow.
    auto& list = make && !device_->info().zeroed_pages ? dirty_ : clean_;
    list.insert(list.end(), pages.begin(), pages.end());
    if (make) created_ += count;
  } else {
    dirty_.insert(dirty_.end(), pages.begin(), pages.end());
    stalled_ = true;
    ++prepare_failures_;
  }
  unsorted_ = true;
  changed_->notify_all();
  return true;
}

void PagePool::scrub(PageHandle page) {
  // Only the background thread comes here, so the window needs no lock.
  if (window_ == nullptr) window_ = device_->reserve(page_bytes_, page_bytes_);
  device_->map(window_, page_bytes_, std::span(&page, 1));
  try {
    device_->fill(window_, 0, page_bytes_);
    device_->record()->wait(Deadline::after_seconds(kBusyPagesSeconds));
    device_->unmap(window_, page_bytes_);
  } catch (...) {
    // Giving the window up takes the page out of it, and that cannot fail.
    device_->release(std::exchange(window_, nullptr), page_bytes_);
    throw;
  }
}

void PagePool::close() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    wanted_ = 0;
    thread.swap(thread_);
    changed_->notify_all();
  }
  if (thread.joinable()) {
    // A forked child has the object, but not the thread: there is nothing to wait for.
    if (::getpid() == process_) {
      thread.join();
    } else {
      thread.detach();
    }
  }
  try {
    trim(0);
  } catch (const std::exception&) {
    // Nothing else can be done with the pages; the device frees them when it goes.
  }
}

bool PagePool::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace pipelive
