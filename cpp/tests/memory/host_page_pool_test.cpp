// What pools promise of host memory alone.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device/device_test_tools.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/memory/arena.hpp"
#include "pipelive/memory/page_pool.hpp"

namespace pipelive {
namespace {

using testing::kPage;

TEST(HostPagePool, AForkedChildLeavesItsParentsPagesAlone) {
  const auto host = std::make_shared<HostDevice>();
  auto pool = PagePool::create(host, {kPage, 8 * kPage, 2});
  pool->wait_prepared(Deadline::after_seconds(20));
  auto arena = std::make_unique<Arena>(pool, 4 * kPage);
  arena->map(0, 4 * kPage);
  pool->wait_prepared(Deadline::after_seconds(20));
  arena->base()[0] = std::byte{5};
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // Its destructors must neither hang nor punch holes into the shared file.
    const bool refused =
        testing::code_of([&] { (void)pool->take(4); }) == static_cast<int>(ErrorCode::device);
    arena.reset();
    pool.reset();
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(arena->base()[0], std::byte{5});
  EXPECT_EQ(host->resident_file_bytes(), pool->stats().held_bytes);
}

}  // namespace
}  // namespace pipelive
