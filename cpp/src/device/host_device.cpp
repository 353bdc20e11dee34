#include "pipelive/device/host_device.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

std::string bytes_text(std::uint64_t bytes) {
  return std::to_string(bytes) + " bytes";
}

// How long host work waits for an event of another device that it is to come after.
constexpr double kForeignEventSeconds = 60.0;

/// Host work is done when the call returns.
class CompletedEvent final : public Event {
 public:
  [[nodiscard]] bool done() const override { return true; }
  void wait(Deadline /*deadline*/) const override {}
};

class HostImportedPages final : public ImportedPages {
 public:
  HostImportedPages(std::byte* data, std::size_t bytes, bool writable)
      : data_(data), bytes_(bytes), writable_(writable) {}
  HostImportedPages(const HostImportedPages&) = delete;
  HostImportedPages& operator=(const HostImportedPages&) = delete;
  ~HostImportedPages() override { ::munmap(data_, bytes_); }
  [[nodiscard]] std::byte* data() const noexcept override { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }
  [[nodiscard]] bool writable() const noexcept override { return writable_; }

 private:
  std::byte* data_;
  std::size_t bytes_;
  bool writable_;
};

int retry_fallocate(int fd, int mode, std::uint64_t offset, std::uint64_t bytes) {
  while (::fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

/// What the system could still give without swapping; nothing where it does not say.
std::optional<std::uint64_t> available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;) {
    std::uint64_t kib = 0;
    if (word == "MemAvailable:" && file >> kib) return kib * 1024;
  }
  return std::nullopt;
}

// The kernel would rather kill a process than refuse it pages of a memory file, so what plainly
// cannot be had is refused here.
void check_memory(std::size_t page_bytes, std::size_t count) {
  constexpr std::uint64_t small = std::uint64_t{64} << 20;
  const bool absurd = count > (std::uint64_t{1} << 46) / page_bytes;
  if (!absurd && count * page_bytes < small) return;
  const std::uint64_t available = available_memory().value_or(std::uint64_t{1} << 46);
  if (absurd || count * page_bytes > available) {
    throw Error(ErrorCode::out_of_memory, "create_pages: " + std::to_string(count) + " pages of " +
                                              bytes_text(page_bytes) + ", the system has " +
                                              bytes_text(available) + " available");
  }
}

// A page table filled here, in bulk, costs a quarter of what it costs fault by fault later, in the
// thread that writes the first token. Only a matter of speed, so old kernels may refuse.
void populate(std::byte* address, std::size_t bytes) noexcept {
#ifdef MADV_POPULATE_READ
  ::madvise(address, bytes, MADV_POPULATE_READ);
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

/// Puts an inaccessible mapping over the range, so that its addresses stay ours.
bool cover(std::byte* address, std::size_t bytes) noexcept {
  return ::mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                -1, 0) != MAP_FAILED;
}

}  // namespace

HostDevice::HostDevice() : file_(::memfd_create("pipelive_kv", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
  if (!file_.valid()) throw_errno("memfd_create", errno);
  // A process that we lend pages to must not be able to cut the file short under our feet.
  if (::fcntl(file_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
    throw_errno("fcntl(F_ADD_SEALS)", errno);
  }
  info_.kind = DeviceKind::host;
  info_.name = "cpu";
  info_.page_granularity = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

HostDevice::~HostDevice() {
  for (const auto& [address, reservation] : reservations_) ::munmap(address, reservation.bytes);
}

DeviceUsage HostDevice::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

std::uint64_t HostDevice::resident_file_bytes() const {
  struct stat status{};
  if (::fstat(file_.get(), &status) != 0) throw_errno("fstat of the memory file", errno);
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// A forked child shares the file with its parent, but not what this object knows of it: a page that
// one of them destroys or hands out would be taken from under the other.
void HostDevice::check_process(const char* call) const {
  if (::getpid() != process_) {
    throw Error(ErrorCode::device, std::string(call) + ": the memory belongs to process " +
                                       std::to_string(process_) + ", this is a fork of it");
  }
}

void HostDevice::check_page_bytes(std::size_t page_bytes) const {
  if (page_bytes == 0 || page_bytes % info_.page_granularity != 0) {
    fail("page_bytes is " + std::to_string(page_bytes) + ", expected a positive multiple of " +
         std::to_string(info_.page_granularity));
  }
}

std::byte* HostDevice::reserve(std::size_t bytes, std::size_t alignment) {
  if (bytes == 0 || bytes % info_.page_granularity != 0) {
    fail("reserve: bytes is " + std::to_string(bytes) + ", expected a positive multiple of " +
         std::to_string(info_.page_granularity));
  }
  if (!std::has_single_bit(alignment)) {
    fail("reserve: alignment is " + std::to_string(alignment) + ", expected a power of two");
  }
  alignment = std::max(alignment, info_.page_granularity);
  const std::size_t slack = alignment - info_.page_granularity;
  if (bytes > std::numeric_limits<std::size_t>::max() / 2 - slack) {
    throw Error(ErrorCode::out_of_memory, "reserve: " + bytes_text(bytes) + " of addresses");
  }
  void* raw =
      ::mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw_errno("mmap of " + bytes_text(bytes + slack) + " reserved", errno);
  auto* start = static_cast<std::byte*>(raw);
  const auto number = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t skip = (alignment - number % alignment) % alignment;
  if (skip > 0) ::munmap(start, skip);
  if (slack > skip) ::munmap(start + skip + bytes, slack - skip);
  std::byte* address = start + skip;
  try {
    const std::lock_guard lock(mutex_);
    reservations_[address].bytes = bytes;
    usage_.reserved_bytes += bytes;
  } catch (...) {
    ::munmap(address, bytes);
    throw;
  }
  return address;
}

void HostDevice::release(std::byte* address, std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second.bytes != bytes) return;
  for (const auto& [start, end] : found->second.mapped) usage_.mapped_bytes -= end - start;
  usage_.reserved_bytes -= bytes;
  ::munmap(address, bytes);
  reservations_.erase(found);
}

std::vector<PageHandle> HostDevice::create_pages(std::size_t page_bytes, std::size_t count) {
  check_page_bytes(page_bytes);
  check_process("create_pages");
  check_memory(page_bytes, count);
  std::vector<PageHandle> pages;
  pages.reserve(count);
  struct Extent {
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  std::vector<Extent> extents;
  {
    const std::lock_guard lock(mutex_);
    // Freed extents first, lowest offset first, then fresh offsets.
    std::uint64_t missing = count;
    for (const auto& [offset, bytes] : free_extents_) {
      if (missing == 0) break;
      const std::uint64_t fits = std::min<std::uint64_t>(bytes / page_bytes, missing);
      if (fits == 0) continue;
      extents.push_back({offset, fits * page_bytes});
      missing -= fits;
    }
    for (const Extent& extent : extents) {
      const auto node = free_extents_.find(extent.offset);
      const std::uint64_t rest = node->second - extent.bytes;
      free_extents_.erase(node);
      if (rest > 0) free_extents_.emplace(extent.offset + extent.bytes, rest);
    }
    if (missing > 0) {
      extents.push_back({file_end_, missing * page_bytes});
      file_end_ += missing * page_bytes;
    }
  }
  // Without the lock: allocating and zeroing is the slow part.
  int error = 0;
  for (const Extent& extent : extents) {
    error = retry_fallocate(file_.get(), 0, extent.offset, extent.bytes);
    if (error != 0) break;
  }
  const std::lock_guard lock(mutex_);
  if (error != 0) {
    for (const Extent& extent : extents) {
      retry_fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, extent.offset,
                      extent.bytes);
      give_extent(extent.offset, extent.bytes);
    }
    throw_errno("fallocate of " + bytes_text(count * page_bytes) + " of pages", error);
  }
  for (const Extent& extent : extents) {
    for (std::uint64_t at = 0; at < extent.bytes; at += page_bytes) {
      pages.push_back(extent.offset + at);
    }
  }
  usage_.page_bytes += count * page_bytes;
  return pages;
}

void HostDevice::give_extent(std::uint64_t offset, std::uint64_t bytes) {
  auto next = free_extents_.lower_bound(offset);
  if (next != free_extents_.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = free_extents_.erase(next);
  }
  if (next != free_extents_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  free_extents_.emplace(offset, bytes);
}

void HostDevice::destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) {
  check_page_bytes(page_bytes);
  check_process("destroy_pages");
  std::vector<PageHandle> sorted(pages.begin(), pages.end());
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i] == sorted[i - 1]) {
      fail("destroy_pages: page " + std::to_string(sorted[i]) + " is named twice");
    }
  }
  const std::lock_guard lock(mutex_);
  for (const PageHandle page : sorted) {
    if (page % info_.page_granularity != 0 || page >= file_end_) {
      fail("destroy_pages: " + std::to_string(page) + " is no page of this device");
    }
  }
  for (std::size_t first = 0; first < sorted.size();) {
    std::size_t last = first + 1;
    while (last < sorted.size() && sorted[last] == sorted[last - 1] + page_bytes) ++last;
    const std::uint64_t bytes = (last - first) * page_bytes;
    const int error = retry_fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                      sorted[first], bytes);
    if (error != 0) {
      // A hole that was punched can be filled again, but only a page of zeros comes back, and that
      // is what a page on its way out may become.
      for (std::size_t i = 0; i < first; ++i) {
        retry_fallocate(file_.get(), 0, sorted[i], page_bytes);
      }
      throw_errno("fallocate(punch hole) of " + bytes_text(bytes), error);
    }
    first = last;
  }
  for (const PageHandle page : sorted) give_extent(page, page_bytes);
  usage_.page_bytes -= sorted.size() * page_bytes;
}

std::pair<HostDevice::Reservation*, std::size_t> HostDevice::find(std::byte* address,
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
  fail(std::string(call) + ": " + bytes_text(bytes) + " at that address are in no reservation");
}

void HostDevice::map(std::byte* address, std::size_t page_bytes,
                     std::span<const PageHandle> pages) {
  check_page_bytes(page_bytes);
  if (pages.empty()) return;
  map_runs(address, page_bytes, pages);
  populate(address, pages.size() * page_bytes);
}

void HostDevice::map_runs(std::byte* address, std::size_t page_bytes,
                          std::span<const PageHandle> pages) {
  const std::size_t total = pages.size() * page_bytes;
  const std::lock_guard lock(mutex_);
  const auto [reservation, offset] = find(address, total, "map");
  auto& mapped = reservation->mapped;
  const auto above = mapped.upper_bound(offset);
  const bool before = above != mapped.begin() && std::prev(above)->second > offset;
  const bool after = above != mapped.end() && above->first < offset + total;
  if (before || after || offset % info_.page_granularity != 0) {
    fail("map: the range at offset " + std::to_string(offset) + " of " + bytes_text(total) +
         " already has pages behind it or is not aligned");
  }
  for (const PageHandle page : pages) {
    if (page % info_.page_granularity != 0 || page >= file_end_) {
      fail("map: " + std::to_string(page) + " is no page of this device");
    }
  }
  const auto run = mapped.emplace(offset, offset + total).first;
  for (std::size_t first = 0; first < pages.size();) {
    std::size_t last = first + 1;
    while (last < pages.size() && pages[last] == pages[last - 1] + page_bytes) ++last;
    std::byte* at = address + first * page_bytes;
    const std::size_t bytes = (last - first) * page_bytes;
    if (::mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_.get(),
               static_cast<off_t>(pages[first])) == MAP_FAILED) {
      const int error = errno;
      cover(address, total);
      mapped.erase(run);
      throw_errno("mmap of " + bytes_text(bytes) + " of pages (a process has at most " +
                      "vm.max_map_count mappings)",
                  error);
    }
    first = last;
  }
  usage_.mapped_bytes += total;
}

void HostDevice::map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                              PageHandle page) {
  check_page_bytes(page_bytes);
  if (bytes % page_bytes != 0) {
    fail("map_repeated: bytes is " + std::to_string(bytes) + ", expected a multiple of " +
         std::to_string(page_bytes));
  }
  // The repeats are not neighbours in the file, so each is a mapping of its own.
  const std::vector<PageHandle> pages(bytes / page_bytes, page);
  if (!pages.empty()) map_runs(address, page_bytes, pages);
}

void HostDevice::unmap(std::byte* address, std::size_t bytes) {
  if (bytes == 0) return;
  const std::lock_guard lock(mutex_);
  const auto [reservation, offset] = find(address, bytes, "unmap");
  if (offset % info_.page_granularity != 0 || bytes % info_.page_granularity != 0) {
    fail("unmap: " + bytes_text(bytes) + " at offset " + std::to_string(offset) +
         " are not aligned to pages");
  }
  auto& mapped = reservation->mapped;
  const std::size_t end = offset + bytes;
  // Runs are split where the range cuts them; the new nodes are made before anything changes.
  std::map<std::size_t, std::size_t> kept;
  std::uint64_t covered = 0;
  auto first = mapped.upper_bound(offset);
  if (first != mapped.begin() && std::prev(first)->second > offset) --first;
  auto last = first;
  for (; last != mapped.end() && last->first < end; ++last) {
    covered += std::min(last->second, end) - std::max(last->first, offset);
    if (last->first < offset) kept.emplace(last->first, offset);
    if (last->second > end) kept.emplace(end, last->second);
  }
  if (covered != bytes) {
    fail("unmap: of " + bytes_text(bytes) + " at offset " + std::to_string(offset) + " only " +
         std::to_string(covered) + " have pages behind them");
  }
  if (!cover(address, bytes)) throw_errno("mmap of " + bytes_text(bytes) + " as a hole", errno);
  mapped.erase(first, last);
  mapped.merge(kept);
  usage_.mapped_bytes -= bytes;
}

void HostDevice::copy(std::byte* target, const std::byte* source, std::size_t bytes,
                      Stream /*stream*/) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

void HostDevice::fill(std::byte* target, int value, std::size_t bytes, Stream /*stream*/) {
  if (bytes > 0) std::memset(target, value, bytes);
}

std::shared_ptr<Event> HostDevice::record(Stream /*stream*/) {
  return std::make_shared<CompletedEvent>();
}

void HostDevice::order_after(Stream /*stream*/, const std::shared_ptr<Event>& event) {
  // The work of the host is what its threads do next. An event of another device may be pending.
  if (event != nullptr) event->wait(Deadline::after_seconds(kForeignEventSeconds));
}

ExportedPages HostDevice::export_page(std::size_t page_bytes, PageHandle page) {
  check_page_bytes(page_bytes);
  {
    const std::lock_guard lock(mutex_);
    if (page % info_.page_granularity != 0 || page >= file_end_) {
      fail("export_page: " + std::to_string(page) + " is no page of this device");
    }
  }
  UniqueFd fd(::fcntl(file_.get(), F_DUPFD_CLOEXEC, 0));
  if (!fd.valid()) throw_errno("fcntl(F_DUPFD_CLOEXEC)", errno);
  return {std::move(fd), page, page_bytes};
}

std::unique_ptr<ImportedPages> HostDevice::import_run(std::span<const ExportedPages> exported,
                                                      PageAccess access) {
  if (exported.empty()) fail("import_pages: there are no pages to map");
  std::size_t total = 0;
  for (const ExportedPages& part : exported) {
    if (!part.fd.valid() || part.bytes == 0 || part.bytes % info_.page_granularity != 0 ||
        part.offset % info_.page_granularity != 0) {
      fail("import_pages: " + bytes_text(part.bytes) + " at offset " + std::to_string(part.offset) +
           " are no exported pages");
    }
    struct stat status{};
    if (::fstat(part.fd.get(), &status) != 0) throw_errno("fstat of exported pages", errno);
    // Who shares the file could cut it short, and reading what is mapped would end this process.
    const int seals = ::fcntl(part.fd.get(), F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
      fail("import_pages: the file is not sealed against being cut short, as exported pages are");
    }
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (part.offset > size || part.bytes > size - part.offset) {
      fail("import_pages: " + bytes_text(part.bytes) + " at offset " + std::to_string(part.offset) +
           " lie beyond the file's " + bytes_text(size));
    }
    total += part.bytes;
  }
  void* raw = ::mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw_errno("mmap of addresses for exported pages", errno);
  // From here on the object unmaps the whole range, whatever is behind it.
  auto imported = std::make_unique<HostImportedPages>(static_cast<std::byte*>(raw), total,
                                                      access != PageAccess::read);
  const int protection = access == PageAccess::read ? PROT_READ : PROT_READ | PROT_WRITE;
  std::byte* at = imported->data();
  for (const ExportedPages& part : exported) {
    if (::mmap(at, part.bytes, protection, MAP_SHARED | MAP_FIXED, part.fd.get(),
               static_cast<off_t>(part.offset)) == MAP_FAILED) {
      throw_errno("mmap of exported pages", errno);
    }
    at += part.bytes;
  }
  return imported;
}

}  // namespace pipelive
