// Address ranges of a GPU, its physical pages, and which page lies where.
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "device_text.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

// What the driver can address at most; larger requests need not be put to it.
constexpr std::size_t kAddressable = std::size_t{1} << 47;
// From so many pages on they are compared with what is free first. Fewer are not worth the
// question, which some drivers take long to answer.
constexpr std::size_t kManyPages = 16;

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

std::byte* address_of(DevicePointer pointer) noexcept {
  return reinterpret_cast<std::byte*>(pointer);
}

}  // namespace

void CudaDevice::check_page_bytes(std::size_t page_bytes) const {
  if (page_bytes == 0 || page_bytes % info_.page_granularity != 0) {
    refuse("page_bytes is " + std::to_string(page_bytes) + ", expected a positive multiple of " +
           std::to_string(info_.page_granularity));
  }
}

std::byte* CudaDevice::reserve(std::size_t bytes, std::size_t alignment) {
  if (bytes == 0 || bytes % info_.page_granularity != 0) {
    refuse("reserve: bytes is " + std::to_string(bytes) + ", expected a positive multiple of " +
           std::to_string(info_.page_granularity));
  }
  if (!std::has_single_bit(alignment)) {
    refuse("reserve: alignment is " + std::to_string(alignment) + ", expected a power of two");
  }
  check_process("reserve");
  alignment = std::max(alignment, info_.page_granularity);
  if (bytes > kAddressable || alignment > kAddressable) {
    throw Error(ErrorCode::out_of_memory, "reserve: " + bytes_text(bytes) + " of addresses");
  }
  const CallScope scope(*context_);
  const DriverApi& api = driver().api();
  const auto reserve_raw = [&](std::size_t size, std::size_t wanted) {
    DevicePointer start = 0;
    driver().check(api.mem_address_reserve(&start, size, wanted, 0, 0),
                   "cuMemAddressReserve(" + bytes_text(size) + ")");
    return start;
  };
  Reservation reservation;
  reservation.bytes = bytes;
  reservation.start_bytes = bytes;
  reservation.start = reserve_raw(bytes, alignment);
  if (reservation.start % alignment != 0) {
    // The driver takes the alignment for a wish: reserve enough to choose the start ourselves.
    api.mem_address_free(reservation.start, reservation.start_bytes);
    reservation.start_bytes = bytes + alignment;
    reservation.start = reserve_raw(reservation.start_bytes, info_.page_granularity);
  }
  std::byte* address = address_of((reservation.start + alignment - 1) / alignment * alignment);
  try {
    const std::lock_guard lock(mutex_);
    reservations_.emplace(address, reservation);
    usage_.reserved_bytes += bytes;
  } catch (...) {
    api.mem_address_free(reservation.start, reservation.start_bytes);
    throw;
  }
  return address;
}

void CudaDevice::release(std::byte* address, std::size_t bytes) noexcept {
  if (::getpid() != process_) return;
  try {
    const CallScope scope(*context_);
    const DriverApi& api = driver().api();
    const std::lock_guard lock(mutex_);
    const auto found = reservations_.find(address);
    if (found == reservations_.end() || found->second.bytes != bytes) return;
    Reservation& reservation = found->second;
    for (auto first = reservation.mapped.begin(); first != reservation.mapped.end();) {
      auto last = first;
      std::size_t end = first->first;
      for (; last != reservation.mapped.end() && last->first == end; ++last) {
        end += last->second.bytes;
      }
      api.mem_unmap(pointer(address) + first->first, end - first->first);
      first = last;
    }
    forget_mappings(reservation, 0, bytes);
    api.mem_address_free(reservation.start, reservation.start_bytes);
    usage_.reserved_bytes -= bytes;
    reservations_.erase(found);
  } catch (const std::exception&) {
    // The context is gone, and its mappings with it.
  }
}

// The mappings of a range, all of them whole, are gone.
void CudaDevice::forget_mappings(Reservation& reservation, std::size_t offset,
                                 std::size_t bytes) noexcept {
  const auto first = reservation.mapped.lower_bound(offset);
  const auto last = reservation.mapped.lower_bound(offset + bytes);
  for (auto at = first; at != last; ++at) {
    usage_.mapped_bytes -= at->second.bytes;
    const auto page = pages_.find(at->second.page);
    if (page != pages_.end()) --page->second.mappings;
  }
  reservation.mapped.erase(first, last);
}

std::vector<PageHandle> CudaDevice::create_pages(std::size_t page_bytes, std::size_t count) {
  check_page_bytes(page_bytes);
  check_process("create_pages");
  std::vector<PageHandle> pages;
  if (count == 0) return pages;
  const CallScope scope(*context_);
  const DriverApi& api = driver().api();
  const auto refuse = [&](std::size_t free) {
    throw Error(ErrorCode::out_of_memory, "create_pages: " + std::to_string(count) + " pages of " +
                                              bytes_text(page_bytes) + " on " + info_.name +
                                              ", which has " + bytes_text(total_bytes_) +
                                              " in all and " + bytes_text(free) + " free");
  };
  if (count > total_bytes_ / page_bytes) refuse(memory().free);
  if (count >= kManyPages) {
    // Not by trying: until the pages that were too many are given back, the rest of the process,
    // such as a model that allocates, would find no memory.
    if (const std::size_t free = memory().free; count > free / page_bytes) refuse(free);
  }
  std::vector<AllocationHandle> made;
  made.reserve(count);
  pages.reserve(count);
  const auto undo = [&]() noexcept {
    for (const AllocationHandle allocation : made) api.mem_release(allocation);
  };
  for (std::size_t i = 0; i < count; ++i) {
    AllocationHandle allocation = 0;
    const Result result = api.mem_create(&allocation, page_bytes, &properties_, 0);
    if (result != kSuccess) {
      undo();
      if (result == kOutOfMemory) refuse(memory().free);
      driver().fail(result, "cuMemCreate(" + bytes_text(page_bytes) + ")");
    }
    made.push_back(allocation);
  }
  const std::lock_guard lock(mutex_);
  try {
    for (const AllocationHandle allocation : made) {
      pages_.emplace(next_page_ + pages.size(), Page{allocation, page_bytes, 0});
      pages.push_back(next_page_ + pages.size());
    }
  } catch (...) {
    for (const PageHandle page : pages) pages_.erase(page);
    undo();
    throw;
  }
  next_page_ += count;
  usage_.page_bytes += count * page_bytes;
  return pages;
}

CudaDevice::Page& CudaDevice::find_page(const char* call, std::size_t page_bytes, PageHandle page) {
  const auto found = pages_.find(page);
  if (found == pages_.end() || found->second.bytes != page_bytes) {
    refuse(std::string(call) + ": " + std::to_string(page) + " is no page of " +
           bytes_text(page_bytes) + " of " + info_.name);
  }
  return found->second;
}

void CudaDevice::destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) {
  check_page_bytes(page_bytes);
  check_process("destroy_pages");
  if (pages.empty()) return;
  std::vector<PageHandle> sorted(pages.begin(), pages.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    refuse("destroy_pages: page " + std::to_string(*twice) + " is named twice");
  }
  std::vector<AllocationHandle> allocations;
  allocations.reserve(sorted.size());
  {
    const std::lock_guard lock(mutex_);
    for (const PageHandle page : sorted) {
      const Page& known = find_page("destroy_pages", page_bytes, page);
      if (known.mappings > 0) {
        refuse("destroy_pages: page " + std::to_string(page) + " is mapped");
      }
      allocations.push_back(known.allocation);
    }
  }
  const CallScope scope(*context_);
  const DriverApi& api = driver().api();
  for (std::size_t i = 0; i < allocations.size(); ++i) {
    const Result result = api.mem_release(allocations[i]);
    if (result == kSuccess) continue;
    const std::lock_guard lock(mutex_);
    for (std::size_t j = 0; j < i; ++j) {
      AllocationHandle again = 0;
      if (api.mem_create(&again, page_bytes, &properties_, 0) == kSuccess) {
        pages_.at(sorted[j]).allocation = again;
      } else {
        pages_.erase(sorted[j]);
        usage_.page_bytes -= page_bytes;
      }
    }
    driver().fail(result, "cuMemRelease");
  }
  const std::lock_guard lock(mutex_);
  for (const PageHandle page : sorted) pages_.erase(page);
  usage_.page_bytes -= sorted.size() * page_bytes;
}

std::pair<CudaDevice::Reservation*, std::size_t> CudaDevice::find(std::byte* address,
                                                                  std::size_t bytes,
                                                                  const char* call) {
  const auto above = reservations_.upper_bound(address);
  if (above != reservations_.begin()) {
    const auto found = std::prev(above);
    const auto offset = static_cast<std::size_t>(address - found->first);
    if (offset < found->second.bytes && bytes <= found->second.bytes - offset && bytes > 0) {
      return {&found->second, offset};
    }
  }
  refuse(std::string(call) + ": " + bytes_text(bytes) + " at that address are in no reservation");
}

void CudaDevice::set_access(DevicePointer start, std::size_t bytes, MemoryAccess access) const {
  AccessDescriptor descriptor;
  descriptor.location = {MemoryLocationType::device, context_->device()};
  descriptor.access = access;
  driver().check(driver().api().mem_set_access(start, bytes, &descriptor, 1),
                 "cuMemSetAccess(" + bytes_text(bytes) + ")");
}

void CudaDevice::map(std::byte* address, std::size_t page_bytes,
                     std::span<const PageHandle> pages) {
  check_page_bytes(page_bytes);
  check_process("map");
  if (pages.empty()) return;
  const std::size_t total = pages.size() * page_bytes;
  std::vector<AllocationHandle> allocations;
  allocations.reserve(pages.size());
  std::size_t offset = 0;
  {
    // The range is taken in the books first, so that the driver can be called without the lock.
    const std::lock_guard lock(mutex_);
    const auto [reservation, start] = find(address, total, "map");
    offset = start;
    auto& mapped = reservation->mapped;
    const auto above = mapped.upper_bound(offset);
    const bool before = above != mapped.begin() &&
                        std::prev(above)->first + std::prev(above)->second.bytes > offset;
    const bool after = above != mapped.end() && above->first < offset + total;
    if (before || after || offset % info_.page_granularity != 0) {
      refuse("map: the range at offset " + std::to_string(offset) + " of " + bytes_text(total) +
             " already has pages behind it or is not aligned");
    }
    for (const PageHandle page : pages) {
      allocations.push_back(find_page("map", page_bytes, page).allocation);
    }
    std::map<std::size_t, Mapping> added;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      added.emplace_hint(added.end(), offset + i * page_bytes, Mapping{page_bytes, pages[i]});
    }
    mapped.merge(added);
    for (const PageHandle page : pages) ++pages_.at(page).mappings;
    usage_.mapped_bytes += total;
  }
  const DevicePointer start = pointer(address);
  std::size_t done = 0;
  try {
    const CallScope scope(*context_);
    const DriverApi& api = driver().api();
    try {
      for (; done < allocations.size(); ++done) {
        driver().check(api.mem_map(start + done * page_bytes, page_bytes, 0, allocations[done], 0),
                       "cuMemMap");
      }
      set_access(start, total, MemoryAccess::read_write);
    } catch (...) {
      if (done > 0) api.mem_unmap(start, done * page_bytes);
      throw;
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    forget_mappings(*find(address, total, "map").first, offset, total);
    throw;
  }
}

void CudaDevice::map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                              PageHandle page) {
  check_page_bytes(page_bytes);
  if (bytes % page_bytes != 0) {
    refuse("map_repeated: bytes is " + std::to_string(bytes) + ", expected a multiple of " +
           std::to_string(page_bytes));
  }
  map(address, page_bytes, std::vector<PageHandle>(bytes / page_bytes, page));
}

void CudaDevice::unmap(std::byte* address, std::size_t bytes) {
  if (bytes == 0) return;
  check_process("unmap");
  std::size_t offset = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto [reservation, start] = find(address, bytes, "unmap");
    offset = start;
    const auto& mapped = reservation->mapped;
    std::size_t end = offset;
    for (auto at = mapped.find(offset);
         at != mapped.end() && at->first == end && end < offset + bytes; ++at) {
      end += at->second.bytes;
    }
    if (end != offset + bytes) {
      refuse("unmap: " + bytes_text(bytes) + " at offset " + std::to_string(offset) +
             " are not whole pages that are mapped");
    }
  }
  {
    const CallScope scope(*context_);
    driver().check(driver().api().mem_unmap(pointer(address), bytes),
                   "cuMemUnmap(" + bytes_text(bytes) + ")");
  }
  const std::lock_guard lock(mutex_);
  forget_mappings(*find(address, bytes, "unmap").first, offset, bytes);
}

}  // namespace pipelive::cuda
