#include "pipelive/attention/thread_pool.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <stdexcept>
#include <thread>
#include <vector>

namespace pipelive {
namespace {

TEST(ThreadPool, DoesEveryItemOnce) {
  ThreadPool pool;
  for (const unsigned threads : {1u, 2u, 5u, 3u}) {
    for (const std::size_t items : {0u, 1u, 2u, 1000u}) {
      std::vector<std::atomic<int>> done(items);
      pool.run(threads, items, [&](std::size_t item) { ++done[item]; });
      for (const std::atomic<int>& count : done) EXPECT_EQ(count, 1);
    }
  }
}

TEST(ThreadPool, StartsNoMoreWorkersThanItNeeds) {
  ThreadPool pool;
  EXPECT_EQ(pool.workers(), 0u);
  pool.run(1, 100, [](std::size_t) {});
  pool.run(8, 1, [](std::size_t) {});
  EXPECT_EQ(pool.workers(), 0u);
  pool.run(3, 100, [](std::size_t) {});
  EXPECT_EQ(pool.workers(), 2u);
  pool.run(8, 2, [](std::size_t) {});
  EXPECT_EQ(pool.workers(), 2u);
}

TEST(ThreadPool, UsesTheThreadsItIsGiven) {
  ThreadPool pool;
  // Each of four calls waits for the other three, so that no thread can take two.
  std::barrier all_here(4);
  pool.run(4, 4, [&](std::size_t) { all_here.arrive_and_wait(); });
}

TEST(ThreadPool, ThrowsWhatAnItemThrew) {
  ThreadPool pool;
  for (const unsigned threads : {1u, 4u}) {
    std::atomic<int> calls = 0;
    EXPECT_THROW(pool.run(threads, 1000,
                          [&](std::size_t item) {
                            ++calls;
                            if (item == 3) throw std::runtime_error("three");
                          }),
                 std::runtime_error);
    EXPECT_LT(calls, 1001);
    std::atomic<int> after = 0;
    pool.run(threads, 10, [&](std::size_t) { ++after; });
    EXPECT_EQ(after, 10);
  }
}

TEST(ThreadPool, JobsOfSeveralThreadsDoNotMix) {
  ThreadPool pool;
  std::vector<std::thread> callers;
  std::atomic<int> wrong = 0;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<int> mine = 0;
        pool.run(3, 50, [&](std::size_t) { ++mine; });
        if (mine != 50) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPool, AStoppedPoolLeavesTheWorkToTheCaller) {
  ThreadPool pool;
  pool.run(3, 100, [](std::size_t) {});
  pool.stop();
  EXPECT_EQ(pool.workers(), 0u);
  int done = 0;
  pool.run(3, 100, [&](std::size_t) { ++done; });
  EXPECT_EQ(done, 100);
  EXPECT_EQ(pool.workers(), 0u);
}

TEST(ThreadPool, AForkedChildHasAPoolOfItsOwn) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the thread sanitizer does not follow a fork of a process with threads";
#elif defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the child has no thread that would let go of the sanitizer's own locks";
#endif
  std::atomic<int> done = 0;
  ThreadPool::process().run(3, 100, [&](std::size_t) { ++done; });
  ASSERT_EQ(done, 100);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int> mine = 0;
    std::barrier both(2);
    ThreadPool::process().run(2, 2, [&](std::size_t) {
      both.arrive_and_wait();
      ++mine;
    });
    _exit(mine == 2 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace pipelive
