#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "pipelive/base/deadline.hpp"
#include "pipelive/device/unique_fd.hpp"

namespace pipelive {

enum class DeviceKind : std::uint8_t { host, cuda };

struct DeviceInfo {
  DeviceKind kind = DeviceKind::host;
  int index = 0;                     ///< the device's number among those of its kind
  std::string name;                  ///< "cpu", "cuda:0"
  std::size_t page_granularity = 0;  ///< page sizes must be multiples of this many bytes
  /// New pages hold zeros. Where they do not, whoever needs zeros fills the page once it is mapped.
  bool zeroed_pages = true;
};

/// What a device holds at the moment; for leak checks.
struct DeviceUsage {
  std::uint64_t reserved_bytes = 0;  ///< address space
  std::uint64_t page_bytes = 0;      ///< physical memory
  std::uint64_t mapped_bytes = 0;    ///< address space with pages behind it
  friend bool operator==(const DeviceUsage&, const DeviceUsage&) = default;
};

/// One physical page of a device; a value without ownership (the PagePool owns pages).
using PageHandle = std::uint64_t;
inline constexpr PageHandle kNoPage = ~PageHandle{0};

/// A queue of work on a device. A null handle is the device's own queue, which nobody else gives
/// work to; CUDA's default stream has the handle 1 (see cuda/device.hpp).
struct Stream {
  void* handle = nullptr;
  friend bool operator==(const Stream&, const Stream&) = default;
};

/// One of several copies, in bytes.
struct CopyJob {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  std::size_t bytes = 0;
};

/// A point in a stream's work. Thread-safe.
class Event {
 public:
  virtual ~Event() = default;
  /// True once all work before the event has completed; throws Error(device) if that work failed.
  [[nodiscard]] virtual bool done() const = 0;
  /// Waits for done(); throws Error(timeout) at the deadline.
  virtual void wait(Deadline deadline) const = 0;
};

/// A page (or a run of pages) handed to another process.
struct ExportedPages {
  UniqueFd fd;               ///< a duplicate that belongs to the holder
  std::uint64_t offset = 0;  ///< bytes into the file
  std::size_t bytes = 0;
};

enum class PageAccess : std::uint8_t { read, read_write };

/// Another process's pages mapped here; unmapped with the object.
class ImportedPages {
 public:
  virtual ~ImportedPages() = default;
  [[nodiscard]] virtual std::byte* data() const noexcept = 0;
  [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
  /// Whether this process could write into them: where that was asked for, or where the device has
  /// no read-only mappings.
  [[nodiscard]] virtual bool writable() const noexcept = 0;
};

/// Virtual memory, copies and events of one kind of memory.
///
/// Every call either does all that it was asked or throws and leaves everything as it was. Lengths
/// are in bytes. Calls may come from several threads at once, but two calls on the same addresses
/// or pages at the same time are the caller's mistake.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual const DeviceInfo& info() const noexcept = 0;
  [[nodiscard]] virtual DeviceUsage usage() const = 0;

  /// Reserves addresses with nothing behind them; an access faults. The start is a multiple of
  /// `alignment`, a power of two. `bytes` must be a positive multiple of the page granularity.
  [[nodiscard]] virtual std::byte* reserve(std::size_t bytes, std::size_t alignment) = 0;
  /// Gives a whole reservation back, as `reserve` returned it. What is still mapped in it is
  /// unmapped first; the pages are not destroyed.
  virtual void release(std::byte* address, std::size_t bytes) noexcept = 0;

  /// Creates `count` pages, physically there when the call returns; neighbouring handles as far as
  /// possible. They hold zeros where info().zeroed_pages says so. Throws Error(out_of_memory).
  [[nodiscard]] virtual std::vector<PageHandle> create_pages(std::size_t page_bytes,
                                                             std::size_t count) = 0;
  /// Returns pages to the operating system or the driver. They must not be mapped.
  virtual void destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) = 0;

  /// Maps `pages` one after the other at `address`, readable and writable. The range must be
  /// reserved and have nothing behind it. One system call per run of neighbouring handles.
  virtual void map(std::byte* address, std::size_t page_bytes,
                   std::span<const PageHandle> pages) = 0;
  /// Maps the one `page` again and again behind the whole range.
  virtual void map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                            PageHandle page) = 0;
  /// Takes the pages from behind the range, whose addresses stay reserved. Work in any stream that
  /// may still touch the range must be over; the device does not wait for it.
  virtual void unmap(std::byte* address, std::size_t bytes) = 0;

  /// Copies between mapped addresses in the order of `stream`; the ranges must not overlap.
  virtual void copy(std::byte* target, const std::byte* source, std::size_t bytes,
                    Stream stream = {}) = 0;
  /// Copies within memory of the device, in the order of `stream` and in any order among each
  /// other: no target overlaps anything else of the jobs. What this costs grows little with their
  /// number. Where it throws, some of the copies may have been made.
  virtual void copy_many(std::span<const CopyJob> jobs, Stream stream = {}) {
    for (const CopyJob& job : jobs) copy(job.to, job.from, job.bytes, stream);
  }
  /// Loads what copy_many needs, which may take as long as compiling it: for whoever makes the
  /// first call where steps wait for it. What cannot be loaded is done without.
  virtual void prepare_copies() {}
  /// Sets every byte, in the order of `stream`.
  virtual void fill(std::byte* target, int value, std::size_t bytes, Stream stream = {}) = 0;
  /// Marks the end of the work that `stream` has been given so far.
  [[nodiscard]] virtual std::shared_ptr<Event> record(Stream stream = {}) = 0;
  /// Work that `stream` is given from now on runs after `event`. Returns at once where the device
  /// can wait by itself.
  virtual void order_after(Stream stream, const std::shared_ptr<Event>& event) = 0;
  /// Queues that programs use without naming them; who waits for all users of some memory waits for
  /// these as well.
  [[nodiscard]] virtual std::vector<Stream> implicit_streams() const { return {}; }

  /// Lends a page to other processes. Pages must not be destroyed while they are lent.
  [[nodiscard]] virtual ExportedPages export_page(std::size_t page_bytes, PageHandle page) = 0;
  /// Maps what another process's `export_page` returned, one after the other.
  [[nodiscard]] virtual std::unique_ptr<ImportedPages> import_run(
      std::span<const ExportedPages> exported, PageAccess access) = 0;
  /// Maps one page, readable and writable.
  [[nodiscard]] std::unique_ptr<ImportedPages> import_pages(const ExportedPages& exported) {
    return import_run({&exported, 1}, PageAccess::read_write);
  }
};

}  // namespace pipelive
