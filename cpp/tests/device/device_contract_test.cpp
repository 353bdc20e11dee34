// What every device promises. A further kind of device joins by one more DeviceCase.

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <thread>

#include "device/device_cases.hpp"

namespace pipelive {
namespace {

using testing::read;
using testing::write;

class DeviceContract : public testing::DeviceTest {};

TEST_P(DeviceContract, SaysWhatItIs) {
  EXPECT_FALSE(device_->info().name.empty());
  EXPECT_GT(page_, 0u);
  EXPECT_EQ(device_->usage(), DeviceUsage{});
}

TEST_P(DeviceContract, ReservesAlignedAddressesAndGivesThemBack) {
  for (const std::size_t alignment : {page_, 8 * page_, std::size_t{4} << 20}) {
    std::byte* base = device_->reserve(3 * page_, alignment);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(base) % alignment, 0u);
    EXPECT_EQ(device_->usage().reserved_bytes, 3 * page_);
    EXPECT_EQ(device_->usage().page_bytes, 0u);
    device_->release(base, 3 * page_);
    EXPECT_EQ(device_->usage().reserved_bytes, 0u);
  }
}

TEST_P(DeviceContract, NewPagesHoldZerosWhereTheDeviceSaysSoAndKeepWhatIsWritten) {
  std::byte* base = device_->reserve(4 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 2);
  ASSERT_EQ(pages.size(), 2u);
  device_->map(base + page_, page_, pages);
  if (device_->info().zeroed_pages) {
    EXPECT_EQ(read(*device_, base + page_, 2 * page_), std::vector<std::byte>(2 * page_));
  }
  const auto values = testing::pattern(2 * page_, 1);
  write(*device_, base + page_, values);
  EXPECT_EQ(read(*device_, base + page_, 2 * page_), values);
  EXPECT_EQ(device_->usage().mapped_bytes, 2 * page_);
  device_->unmap(base + page_, 2 * page_);
  // The pages keep their bytes while nothing maps them, and appear where they are mapped next.
  device_->map(base, page_, std::vector{pages[1]});
  EXPECT_TRUE(std::ranges::equal(read(*device_, base, page_), std::span(values).subspan(page_)));
  device_->unmap(base, page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 4 * page_);
}

TEST_P(DeviceContract, PagesMappedInAnyOrderAndUnmappedInPieces) {
  std::byte* base = device_->reserve(6 * page_, page_);
  std::vector<PageHandle> pages = device_->create_pages(page_, 6);
  std::swap(pages[0], pages[3]);
  std::swap(pages[5], pages[2]);
  device_->map(base, page_, pages);
  const auto values = testing::pattern(6 * page_, 2);
  write(*device_, base, values);
  device_->unmap(base + 2 * page_, 2 * page_);
  device_->unmap(base, page_);
  EXPECT_EQ(device_->usage().mapped_bytes, 3 * page_);
  device_->map(base + 2 * page_, page_, std::span(pages).subspan(2, 2));
  device_->map(base, page_, std::span(pages).first(1));
  EXPECT_EQ(read(*device_, base, 6 * page_), values);
  device_->unmap(base, 6 * page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 6 * page_);
}

TEST_P(DeviceContract, DestroyedPagesAreMadeAnew) {
  std::byte* base = device_->reserve(3 * page_, page_);
  for (int round = 0; round < 3; ++round) {
    const std::vector<PageHandle> pages = device_->create_pages(page_, 3);
    device_->map(base, page_, pages);
    if (device_->info().zeroed_pages) {
      EXPECT_EQ(read(*device_, base, 3 * page_), std::vector<std::byte>(3 * page_));
    }
    write(*device_, base, testing::pattern(3 * page_, 3));
    device_->unmap(base, 3 * page_);
    device_->destroy_pages(page_, pages);
    EXPECT_EQ(device_->usage().page_bytes, 0u);
  }
  device_->release(base, 3 * page_);
}

TEST_P(DeviceContract, OnePageMayStandBehindAWholeRange) {
  std::byte* base = device_->reserve(4 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 1);
  device_->map_repeated(base, 4 * page_, page_, pages[0]);
  write(*device_, base + page_, testing::pattern(page_, 4));
  EXPECT_EQ(read(*device_, base + 3 * page_, page_), testing::pattern(page_, 4));
  device_->unmap(base + page_, page_);
  device_->unmap(base, page_);
  device_->unmap(base + 2 * page_, 2 * page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 4 * page_);
}

TEST_P(DeviceContract, ReleaseUnmapsWhatIsStillMapped) {
  std::byte* base = device_->reserve(4 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 2);
  device_->map(base, page_, pages);
  device_->release(base, 4 * page_);
  EXPECT_EQ(device_->usage().mapped_bytes, 0u);
  device_->destroy_pages(page_, pages);
}

TEST_P(DeviceContract, FillsAndCopies) {
  std::byte* base = device_->reserve(2 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 2);
  device_->map(base, page_, pages);
  device_->fill(base, 0, 2 * page_);
  device_->fill(base + 5, 0xAB, page_);
  device_->copy(base + page_ + 100, base + 5, 50);
  device_->copy(base, base, 0);
  device_->fill(base, 1, 0);
  const auto event = device_->record();
  event->wait(Deadline::after_seconds(10));
  EXPECT_TRUE(event->done());
  auto expected = std::vector<std::byte>(2 * page_);
  std::fill_n(expected.begin() + 5, page_, std::byte{0xAB});
  std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(page_) + 100, 50, std::byte{0xAB});
  EXPECT_EQ(read(*device_, base, 2 * page_), expected);
  device_->unmap(base, 2 * page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 2 * page_);
}

TEST_P(DeviceContract, MakesManyCopiesOfAnySizeAtOnce) {
  const std::size_t half =
      (std::size_t{3} << 20) / page_ * page_;  // of the memory, copied to the other
  std::byte* base = device_->reserve(2 * half, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 2 * half / page_);
  device_->map(base, page_, pages);
  auto expected = testing::pattern(2 * half, 11);
  write(*device_, base, expected);
  std::vector<CopyJob> jobs;
  std::size_t at = 0;
  const auto add = [&](std::size_t bytes, std::size_t gap) {
    jobs.push_back({base + half + at, base + at, bytes});
    std::copy_n(expected.begin() + static_cast<std::ptrdiff_t>(at), bytes,
                expected.begin() + static_cast<std::ptrdiff_t>(half + at));
    at += bytes + gap;
  };
  for (std::size_t i = 0; i < 40; ++i) add(16 * (i + 1), 16 * (i % 3));
  add((std::size_t{64} << 10) + 16, 0);    // a little more than a piece of a kernel's work
  add((std::size_t{1} << 20) + 4096, 16);  // long
  add(7, 9);                               // of no vectors
  add(0, 0);
  ASSERT_LE(at, half);
  std::reverse(jobs.begin(), jobs.end());
  device_->copy_many(jobs);
  EXPECT_EQ(read(*device_, base, 2 * half), expected);
  for (const Stream stream : device_->implicit_streams()) {
    device_->copy_many(jobs, stream);
    device_->record(stream)->wait(Deadline::after_seconds(10));
  }
  device_->copy_many({});
  EXPECT_EQ(read(*device_, base, 2 * half), expected);
  device_->unmap(base, 2 * half);
  device_->destroy_pages(page_, pages);
  device_->release(base, 2 * half);
}

TEST_P(DeviceContract, RefusesWrongRangesAndChangesNothing) {
  std::byte* base = device_->reserve(4 * page_, page_);
  std::vector<PageHandle> pages = device_->create_pages(page_, 3);
  device_->map(base + page_, page_, std::span(pages).first(1));
  const DeviceUsage before = device_->usage();

  EXPECT_CODE(invalid_argument, (void)device_->reserve(0, page_));
  EXPECT_CODE(invalid_argument, (void)device_->reserve(page_ + 1, page_));
  EXPECT_CODE(invalid_argument, (void)device_->reserve(page_, 3 * page_));
  EXPECT_CODE(invalid_argument, (void)device_->create_pages(page_ + 1, 1));
  EXPECT_CODE(invalid_argument, (void)device_->create_pages(0, 1));
  // Onto something that is mapped, in front of it, over it; beyond the reservation.
  EXPECT_CODE(invalid_argument, device_->map(base + page_, page_, std::span(pages).subspan(1, 1)));
  EXPECT_CODE(invalid_argument, device_->map(base, page_, std::span(pages).subspan(1, 2)));
  EXPECT_CODE(invalid_argument, device_->map(base + 3 * page_, page_, std::span(pages).last(2)));
  EXPECT_CODE(invalid_argument, device_->map(base + 1, page_, std::span(pages).last(1)));
  EXPECT_CODE(invalid_argument,
              device_->map(base + 2 * page_, page_, std::vector<PageHandle>{kNoPage - 7}));
  // Not mapped, or only partly.
  EXPECT_CODE(invalid_argument, device_->unmap(base, page_));
  EXPECT_CODE(invalid_argument, device_->unmap(base, 2 * page_));
  EXPECT_CODE(invalid_argument, device_->unmap(base + page_, 2 * page_));
  EXPECT_CODE(invalid_argument, device_->unmap(base + page_ + 1, 1));
  EXPECT_CODE(invalid_argument,
              device_->destroy_pages(page_, std::vector<PageHandle>{pages[2], pages[2]}));
  EXPECT_CODE(invalid_argument, (void)device_->export_page(page_, kNoPage - 7));

  EXPECT_EQ(device_->usage(), before);
  device_->unmap(base + page_, page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 4 * page_);
}

TEST_P(DeviceContract, EmptyBatchesAreNothing) {
  std::byte* base = device_->reserve(page_, page_);
  EXPECT_TRUE(device_->create_pages(page_, 0).empty());
  device_->map(base, page_, {});
  device_->unmap(base, 0);
  device_->destroy_pages(page_, {});
  device_->release(base, page_);
}

TEST_P(DeviceContract, HandlesAreDistinctAndNeighboursWherePossible) {
  const std::vector<PageHandle> pages = device_->create_pages(page_, 16);
  EXPECT_EQ(std::set<PageHandle>(pages.begin(), pages.end()).size(), 16u);
  EXPECT_TRUE(std::ranges::is_sorted(pages));
  device_->destroy_pages(page_, pages);
}

TEST_P(DeviceContract, AnImpossibleAmountIsOutOfMemory) {
  EXPECT_CODE(out_of_memory, (void)device_->create_pages(page_, std::size_t{1} << 60));
  EXPECT_CODE(out_of_memory, (void)device_->create_pages(std::size_t{1} << 30, 1 << 12));
  EXPECT_CODE(out_of_memory, (void)device_->reserve(std::size_t{1} << 60, page_));
}

TEST_P(DeviceContract, AnExportedPageIsTheSameMemory) {
  std::byte* base = device_->reserve(2 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 2);
  device_->map(base, page_, pages);
  write(*device_, base + page_, testing::pattern(page_, 5));
  {
    const ExportedPages exported = device_->export_page(page_, pages[1]);
    const auto imported = device_->import_pages(exported);
    ASSERT_EQ(imported->bytes(), page_);
    EXPECT_EQ(read(*device_, imported->data(), page_), testing::pattern(page_, 5));
    write(*device_, imported->data(), testing::pattern(page_, 6));
  }
  EXPECT_EQ(read(*device_, base + page_, page_), testing::pattern(page_, 6));
  device_->unmap(base, 2 * page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 2 * page_);
}

TEST_P(DeviceContract, ARunOfExportedPagesIsMappedInOrder) {
  std::byte* base = device_->reserve(3 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 3);
  device_->map(base, page_, pages);
  const auto values = testing::pattern(3 * page_, 7);
  write(*device_, base, values);
  {
    std::vector<ExportedPages> exported;
    for (const PageHandle page : pages) exported.push_back(device_->export_page(page_, page));
    for (const PageAccess access : {PageAccess::read, PageAccess::read_write}) {
      const auto imported = device_->import_run(exported, access);
      ASSERT_EQ(imported->bytes(), 3 * page_);
      EXPECT_EQ(read(*device_, imported->data(), 3 * page_), values);
    }
    EXPECT_CODE(invalid_argument, (void)device_->import_run({}, PageAccess::read));
    exported[1].bytes = page_ + 1;
    EXPECT_CODE(invalid_argument, (void)device_->import_run(exported, PageAccess::read));
  }
  device_->unmap(base, 3 * page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, 3 * page_);
}

TEST_P(DeviceContract, AStreamMayComeAfterAnEvent) {
  std::byte* base = device_->reserve(page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 1);
  device_->map(base, page_, pages);
  device_->fill(base, 3, page_);
  const auto event = device_->record();
  device_->order_after({}, event);
  device_->order_after({}, nullptr);
  for (const Stream stream : device_->implicit_streams()) {
    device_->order_after(stream, event);
    device_->fill(base, 4, 16, stream);
    device_->order_after({}, device_->record(stream));
  }
  EXPECT_EQ(read(*device_, base + 16, 16), std::vector<std::byte>(16, std::byte{3}));
  device_->unmap(base, page_);
  device_->destroy_pages(page_, pages);
  device_->release(base, page_);
}

TEST_P(DeviceContract, HolesAreNotAccessible) {
  std::byte* base = device_->reserve(3 * page_, page_);
  const std::vector<PageHandle> pages = device_->create_pages(page_, 1);
  EXPECT_FALSE(accessible(base));
  device_->map(base + page_, page_, pages);
  EXPECT_FALSE(accessible(base));
  EXPECT_TRUE(accessible(base + page_));
  EXPECT_FALSE(accessible(base + 2 * page_));
  device_->unmap(base + page_, page_);
  EXPECT_FALSE(accessible(base + page_));
  device_->destroy_pages(page_, pages);
  device_->release(base, 3 * page_);
}

TEST_P(DeviceContract, ThreadsMayCallAtOnce) {
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number) {
    threads.emplace_back([this, number] {
      for (unsigned round = 0; round < 20; ++round) {
        std::byte* base = device_->reserve(4 * page_, page_);
        const std::vector<PageHandle> pages = device_->create_pages(page_, 4);
        device_->map(base, page_, pages);
        const auto values = testing::pattern(4 * page_, number * 100 + round);
        write(*device_, base, values);
        EXPECT_EQ(read(*device_, base, 4 * page_), values);
        device_->unmap(base, 4 * page_);
        device_->destroy_pages(page_, pages);
        device_->release(base, 4 * page_);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceContract, ::testing::ValuesIn(testing::device_cases()),
                         testing::case_name);

}  // namespace
}  // namespace pipelive
