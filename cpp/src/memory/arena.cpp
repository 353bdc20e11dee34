#include "pipelive/memory/arena.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

// A scrub of host memory is done when fill returns; on a GPU it is a fast memset.
constexpr double kScrubSeconds = 60.0;
constexpr double kCopySeconds = 60.0;

// After a wait that came to its deadline: what it waited for may still run in the range.
void wait_once_more(Device& device, const std::exception& error) {
  const auto* const named = dynamic_cast<const Error*>(&error);
  if (named == nullptr || named->code() != ErrorCode::timeout) return;
  try {
    device.record()->wait(Deadline::after_seconds(kScrubSeconds));
  } catch (const std::exception&) {
    // It hangs; nothing that is done about it can be right.
  }
}

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  if (bytes > std::numeric_limits<std::size_t>::max() - unit) {
    throw Error(ErrorCode::invalid_argument,
                std::to_string(bytes) + " bytes are more than there are addresses");
  }
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

ScratchPage::ScratchPage(PagePool& pool) : lease_(pool.take(1)) {
  lease_.mark_dirty();
}

Arena::Arena(std::shared_ptr<PagePool> pool, std::size_t reserve_bytes, ArenaOptions options)
    : pool_(std::move(pool)),
      page_bytes_(pool_->page_bytes()),
      reserved_(round_up(reserve_bytes, page_bytes_)),
      scrub_(options.scrub),
      scratch_(std::move(options.scratch)) {
  if (reserve_bytes == 0) {
    throw Error(ErrorCode::invalid_argument, "reserve_bytes is 0, expected a positive number");
  }
  table_.assign(reserved_ / page_bytes_, kNoPage);
  base_ = pool_->device()->reserve(reserved_, page_bytes_);
  try {
    close_hole({0, table_.size()});
  } catch (...) {
    pool_->device()->release(base_, reserved_);
    throw;
  }
}

Arena::~Arena() {
  try {
    close();
  } catch (const std::exception&) {
    // The pages that could not be unmapped come free with the reservation, below.
  }
  pool_->device()->release(base_, reserved_);
  std::vector<PageHandle> left;
  for (const PageHandle page : table_) {
    if (page != kNoPage) left.push_back(page);
  }
  if (!left.empty()) {
    PageLease lease;
    lease.pool_ = pool_;
    lease.dirty_.assign(left.size(), true);
    lease.pages_ = std::move(left);
  }
}

std::size_t Arena::mapped_bytes() const {
  const std::lock_guard lock(mutex_);
  return mapped_pages_ * page_bytes_;
}

bool Arena::is_mapped(std::size_t offset, std::size_t bytes) const {
  if (offset > reserved_ || bytes > reserved_ - offset) return false;
  if (bytes == 0) return true;
  const std::lock_guard lock(mutex_);
  const std::size_t last = (offset + bytes - 1) / page_bytes_;
  for (std::size_t page = offset / page_bytes_; page <= last; ++page) {
    if (table_[page] == kNoPage) return false;
  }
  return true;
}

Arena::Range Arena::check_range(const char* call, std::size_t offset, std::size_t bytes) const {
  if (offset % page_bytes_ != 0) {
    throw Error(ErrorCode::invalid_argument,
                std::string(call) + ": offset is " + std::to_string(offset) +
                    ", expected a multiple of the page size " + std::to_string(page_bytes_));
  }
  if (offset > reserved_ || bytes > reserved_ - offset) {
    throw Error(ErrorCode::invalid_argument, std::string(call) + ": " + std::to_string(bytes) +
                                                 " bytes at offset " + std::to_string(offset) +
                                                 " leave the arena's " + std::to_string(reserved_));
  }
  return {offset / page_bytes_, round_up(bytes, page_bytes_) / page_bytes_};
}

void Arena::check_open() const {
  if (closed_) throw Error(ErrorCode::closed, "the arena is closed");
}

void Arena::close_hole(Range range) {
  if (scratch_ == nullptr || range.count == 0) return;
  pool_->device()->map_repeated(at(range.first), range.count * page_bytes_, page_bytes_,
                                scratch_->page());
}

void Arena::open_hole(Range range) {
  if (scratch_ == nullptr || range.count == 0) return;
  pool_->device()->unmap(at(range.first), range.count * page_bytes_);
}

void Arena::zero_dirty(Range range, const PageLease& pages) {
  Device& device = *pool_->device();
  bool any = false;
  for (std::size_t first = 0; first < pages.size();) {
    std::size_t last = first;
    while (last < pages.size() && pages.dirty(last)) ++last;
    if (last > first) {
      device.fill(at(range.first + first), 0, (last - first) * page_bytes_);
      any = true;
    }
    first = last + 1;
  }
  if (any) device.record()->wait(Deadline::after_seconds(kScrubSeconds));
}

void Arena::map(std::size_t offset, std::size_t bytes) {
  const Range range = check_range("map", offset, bytes);
  {
    // Checked before pages are created; map_locked checks again.
    const std::lock_guard lock(mutex_);
    check_open();
  }
  map(offset, pool_->take(range.count, scrub_ ? PagePool::Prefer::clean : PagePool::Prefer::dirty));
}

void Arena::map(std::size_t offset, PageLease&& pages) {
  const Range range = check_range("map", offset, pages.size() * page_bytes_);
  if (pages.empty()) return;
  if (pages.pool_ != pool_) {
    throw Error(ErrorCode::invalid_argument, "map: the pages belong to another pool");
  }
  const std::lock_guard lock(mutex_);
  check_open();
  map_locked(range, std::move(pages), scrub_);
}

void Arena::put_back(std::size_t offset, PageLease&& pages) {
  const Range range = check_range("put_back", offset, pages.size() * page_bytes_);
  if (pages.empty()) return;
  const std::lock_guard lock(mutex_);
  check_open();
  map_locked(range, std::move(pages), false);
}

void Arena::map_locked(Range range, PageLease&& pages, bool scrubbed) {
  for (std::size_t page = range.first; page < range.first + range.count; ++page) {
    if (table_[page] != kNoPage) {
      throw Error(
          ErrorCode::invalid_argument,
          "map: the page at offset " + std::to_string(page * page_bytes_) + " is mapped already");
    }
  }
  Device& device = *pool_->device();
  open_hole(range);
  try {
    device.map(at(range.first), page_bytes_, pages.pages());
  } catch (...) {
    close_hole(range);
    throw;
  }
  try {
    if (scrubbed) zero_dirty(range, pages);
  } catch (const std::exception& error) {
    pages.mark_dirty();
    wait_once_more(device, error);
    device.unmap(at(range.first), range.count * page_bytes_);
    close_hole(range);
    throw;
  }
  std::copy(pages.pages_.begin(), pages.pages_.end(),
            table_.begin() + static_cast<std::ptrdiff_t>(range.first));
  mapped_pages_ += range.count;
  // The table owns them now.
  pages.pages_.clear();
  pages.dirty_.clear();
  pages.pool_.reset();
}

std::vector<PageHandle> Arena::handles_locked(Range range) const {
  const auto first = table_.begin() + static_cast<std::ptrdiff_t>(range.first);
  return {first, first + static_cast<std::ptrdiff_t>(range.count)};
}

PageLease Arena::take_out_locked(Range range) {
  for (std::size_t page = range.first; page < range.first + range.count; ++page) {
    if (table_[page] == kNoPage) {
      throw Error(ErrorCode::invalid_argument,
                  "unmap: there is no page at offset " + std::to_string(page * page_bytes_));
    }
  }
  PageLease lease;
  if (range.count == 0) return lease;
  std::vector<PageHandle> handles = handles_locked(range);
  std::vector<bool> dirty(handles.size(), true);
  Device& device = *pool_->device();
  device.unmap(at(range.first), range.count * page_bytes_);
  try {
    close_hole(range);
  } catch (...) {
    device.map(at(range.first), page_bytes_, handles);
    throw;
  }
  std::fill_n(table_.begin() + static_cast<std::ptrdiff_t>(range.first), range.count, kNoPage);
  mapped_pages_ -= range.count;
  lease.pool_ = pool_;
  lease.pages_ = std::move(handles);
  lease.dirty_ = std::move(dirty);
  return lease;
}

PageLease Arena::take_out(std::size_t offset, std::size_t bytes) {
  const Range range = check_range("unmap", offset, bytes);
  const std::lock_guard lock(mutex_);
  check_open();
  return take_out_locked(range);
}

void Arena::unmap(std::size_t offset, std::size_t bytes) {
  take_out(offset, bytes).give_back();
}

void Arena::check_mapped(const char* call, std::size_t offset, std::size_t bytes) const {
  {
    const std::lock_guard lock(mutex_);
    check_open();
  }
  if (!is_mapped(offset, bytes)) {
    throw Error(ErrorCode::not_resident, std::string(call) + ": not all of the " +
                                             std::to_string(bytes) + " bytes at offset " +
                                             std::to_string(offset) + " are mapped");
  }
}

void Arena::write(std::size_t offset, std::span<const std::byte> bytes) {
  check_mapped("write", offset, bytes.size());
  if (bytes.empty()) return;
  Device& device = *pool_->device();
  device.copy(base_ + offset, bytes.data(), bytes.size());
  device.record()->wait(Deadline::after_seconds(kCopySeconds));
}

void Arena::read(std::size_t offset, std::span<std::byte> bytes) const {
  check_mapped("read", offset, bytes.size());
  if (bytes.empty()) return;
  Device& device = *pool_->device();
  device.copy(bytes.data(), base_ + offset, bytes.size());
  device.record()->wait(Deadline::after_seconds(kCopySeconds));
}

ExportedPages Arena::export_page(std::size_t offset) const {
  const Range range = check_range("export_page", offset, page_bytes_);
  const std::lock_guard lock(mutex_);
  check_open();
  if (table_[range.first] == kNoPage) {
    throw Error(ErrorCode::not_resident,
                "export_page: there is no page at offset " + std::to_string(offset));
  }
  return pool_->device()->export_page(page_bytes_, table_[range.first]);
}

void Arena::close() {
  const std::lock_guard lock(mutex_);
  if (closed_) return;
  for (std::size_t first = 0; first < table_.size();) {
    std::size_t last = first;
    while (last < table_.size() && table_[last] != kNoPage) ++last;
    if (last > first) take_out_locked({first, last - first});
    first = last + 1;
  }
  open_hole({0, table_.size()});
  scratch_.reset();
  closed_ = true;
}

bool Arena::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace pipelive
