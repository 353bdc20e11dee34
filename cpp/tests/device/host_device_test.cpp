#include "pipelive/device/host_device.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstring>
#include <fstream>
#include <sstream>

#include "device_test_tools.hpp"
#include "pipelive/device/fault_device.hpp"

namespace pipelive {
namespace {

using testing::accessible;
using testing::kPage;

struct MapsLine {
  std::uintptr_t begin;
  std::uintptr_t end;
};

/// The mappings of this process that touch the range.
std::vector<MapsLine> mappings(const std::byte* address, std::size_t bytes) {
  std::ifstream maps("/proc/self/maps");
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  std::vector<MapsLine> found;
  for (std::string line; std::getline(maps, line);) {
    MapsLine entry{};
    char dash = 0;
    std::istringstream(line) >> std::hex >> entry.begin >> dash >> entry.end;
    if (entry.begin < first + bytes && entry.end > first) found.push_back(entry);
  }
  return found;
}

/// "Rss" of the mappings in the range, in bytes.
std::size_t resident_bytes(const std::byte* address, std::size_t bytes) {
  std::ifstream smaps("/proc/self/smaps");
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  std::size_t total = 0;
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    std::istringstream header(line);
    if (header >> std::hex >> begin >> dash >> end && dash == '-') {
      inside = begin >= first && end <= first + bytes;
    } else if (inside && line.starts_with("Rss:")) {
      std::istringstream value(line.substr(4));
      std::size_t kib = 0;
      value >> kib;
      total += kib * 1024;
    }
  }
  return total;
}

TEST(HostDevice, HolesFaultAndReservationsCostNoMemory) {
  HostDevice device;
  std::byte* base = device.reserve(std::size_t{1} << 36, kPage);
  EXPECT_FALSE(accessible(base));
  EXPECT_EQ(device.resident_file_bytes(), 0u);
  const auto pages = device.create_pages(kPage, 1);
  device.map(base + kPage, kPage, pages);
  EXPECT_FALSE(accessible(base));
  EXPECT_TRUE(accessible(base + kPage));
  EXPECT_FALSE(accessible(base + 2 * kPage));
  device.unmap(base + kPage, kPage);
  EXPECT_FALSE(accessible(base + kPage));
  device.release(base, std::size_t{1} << 36);
  device.destroy_pages(kPage, pages);
}

TEST(HostDevice, PagesAreThereWhenCreatedAndGoneWhenDestroyed) {
  HostDevice device;
  const auto pages = device.create_pages(16 * kPage, 8);
  EXPECT_EQ(device.resident_file_bytes(), 128 * kPage);
  device.destroy_pages(16 * kPage, std::span(pages).subspan(2, 3));
  EXPECT_EQ(device.resident_file_bytes(), 80 * kPage);
  device.destroy_pages(16 * kPage, std::span(pages).first(2));
  device.destroy_pages(16 * kPage, std::span(pages).subspan(5));
  EXPECT_EQ(device.resident_file_bytes(), 0u);
}

TEST(HostDevice, MappedPagesCountInTheProcessUntilUnmapped) {
  HostDevice device;
  std::byte* base = device.reserve(64 * kPage, kPage);
  const auto pages = device.create_pages(kPage, 64);
  device.map(base, kPage, pages);
  device.fill(base, 1, 64 * kPage);
  EXPECT_EQ(resident_bytes(base, 64 * kPage), 64 * kPage);
  device.unmap(base + 32 * kPage, 32 * kPage);
  EXPECT_EQ(resident_bytes(base, 64 * kPage), 32 * kPage);
  device.unmap(base, 32 * kPage);
  device.destroy_pages(kPage, pages);
  device.release(base, 64 * kPage);
}

TEST(HostDevice, NeighbouringPagesAreOneMapping) {
  HostDevice device;
  std::byte* base = device.reserve(256 * kPage, kPage);
  const auto pages = device.create_pages(kPage, 256);
  device.map(base, kPage, std::span(pages).first(100));
  device.map(base + 100 * kPage, kPage, std::span(pages).subspan(100));
  EXPECT_EQ(mappings(base, 256 * kPage).size(), 1u);
  device.unmap(base, 256 * kPage);
  device.destroy_pages(kPage, pages);
  device.release(base, 256 * kPage);
}

TEST(HostDevice, FreedOffsetsAreUsedAgain) {
  HostDevice device;
  const auto first = device.create_pages(kPage, 8);
  device.destroy_pages(kPage, std::span(first).subspan(2, 4));
  const auto again = device.create_pages(kPage, 4);
  EXPECT_EQ(again, (std::vector<PageHandle>(first.begin() + 2, first.begin() + 6)));
  device.destroy_pages(kPage, std::span(first).first(2));
  device.destroy_pages(kPage, again);
  device.destroy_pages(kPage, std::span(first).subspan(6));
  // All of it is one extent again.
  EXPECT_EQ(device.create_pages(8 * kPage, 1), std::vector<PageHandle>{first[0]});
  device.destroy_pages(8 * kPage, std::vector<PageHandle>{first[0]});
}

TEST(HostDevice, ASecondProcessMapsAPage) {
  HostDevice device;
  std::byte* base = device.reserve(2 * kPage, kPage);
  const auto pages = device.create_pages(kPage, 2);
  device.map(base, kPage, pages);
  base[kPage] = std::byte{42};
  const ExportedPages exported = device.export_page(kPage, pages[1]);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // Only what is safe after fork; the result is the exit status.
    int status = 1;
    try {
      HostDevice other;
      const auto imported = other.import_pages(exported);
      if (imported->data()[0] == std::byte{42}) status = 0;
      imported->data()[1] = std::byte{43};
    } catch (const std::exception&) {
      status = 2;
    }
    ::_exit(status);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(base[kPage + 1], std::byte{43});
  device.unmap(base, 2 * kPage);
  device.destroy_pages(kPage, pages);
  device.release(base, 2 * kPage);
}

TEST(HostDevice, APeerCannotTruncateTheMemory) {
  HostDevice device;
  const auto pages = device.create_pages(kPage, 1);
  const ExportedPages exported = device.export_page(kPage, pages[0]);
  EXPECT_NE(::ftruncate(exported.fd.get(), 0), 0);
  EXPECT_EQ(errno, EPERM);
  device.destroy_pages(kPage, pages);
}

TEST(HostDevice, ImportRefusesWhatIsNotThere) {
  HostDevice device;
  const auto pages = device.create_pages(kPage, 1);
  ExportedPages exported = device.export_page(kPage, pages[0]);
  exported.bytes = 2 * kPage;
  EXPECT_ERROR(invalid_argument, "beyond the file", (void)device.import_pages(exported));
  exported.bytes = kPage;
  exported.offset = 1;
  EXPECT_CODE(invalid_argument, (void)device.import_pages(exported));
  EXPECT_CODE(invalid_argument, (void)device.import_pages(ExportedPages{}));
  device.destroy_pages(kPage, pages);
}

TEST(FaultDevice, FailsTheCallsItIsToldToFail) {
  const auto host = std::make_shared<HostDevice>();
  FaultDevice device(host);
  device.fail(DeviceCall::create_pages, 2);
  const auto pages = device.create_pages(kPage, 1);
  EXPECT_ERROR(device, "create_pages", (void)device.create_pages(kPage, 1));
  EXPECT_EQ(host->usage().page_bytes, kPage);
  device.destroy_pages(kPage, device.create_pages(kPage, 1));
  EXPECT_EQ(device.calls(DeviceCall::create_pages), 3u);

  device.fail_any(1);
  EXPECT_CODE(device, (void)device.record());
  device.fail(DeviceCall::destroy_pages, 1, 2);
  EXPECT_CODE(device, device.destroy_pages(kPage, pages));
  EXPECT_CODE(device, device.destroy_pages(kPage, pages));
  device.destroy_pages(kPage, pages);
  device.fail(DeviceCall::reserve, 1);
  device.disarm();
  device.release(device.reserve(kPage, kPage), kPage);
  EXPECT_EQ(host->usage(), DeviceUsage{});
}

TEST(FaultDevice, NeedsADevice) {
  EXPECT_CODE(invalid_argument, FaultDevice(nullptr));
}

}  // namespace
}  // namespace pipelive
