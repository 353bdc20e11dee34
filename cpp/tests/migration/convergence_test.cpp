#include "pipelive/migration/convergence.hpp"

#include <gtest/gtest.h>

#include <future>
#include <limits>

#include "pipelive/base/error.hpp"
#include "pipelive/migration/rate_limit.hpp"

namespace pipelive {
namespace {

TEST(BandwidthEstimate, StartsFromTheAssumptionAndLearns) {
  BandwidthEstimate estimate({0.001, 0.0, 0.5, 1e9});
  EXPECT_DOUBLE_EQ(estimate.bytes_per_second(), 1e9);
  EXPECT_DOUBLE_EQ(estimate.predict(0, 0), 0.001);
  EXPECT_DOUBLE_EQ(estimate.predict(1'000'000, 0), 0.002);
  for (int i = 0; i < 20; ++i) estimate.observe(2'000'000, 0, 0.001);
  EXPECT_NEAR(estimate.bytes_per_second(), 2e9, 1);
}

TEST(BandwidthEstimate, SmallRoundsHardlyMoveIt) {
  BandwidthEstimate estimate({0.001, 0.0, 0.7, 1e9});
  estimate.observe(1'000'000'000, 1000, 1.0);
  estimate.observe(1000, 1, 0.0001);  // 10 MB/s taken by itself
  EXPECT_GT(estimate.bytes_per_second(), 0.99e9);
}

TEST(BandwidthEstimate, RecordsAreAccountedApart) {
  BandwidthEstimate estimate({0.0, 1e-6, 0.7, 1e9});
  estimate.observe(1'000'000, 1000, 0.002);
  EXPECT_NEAR(estimate.bytes_per_second(), 1e9, 1);
  EXPECT_NEAR(estimate.predict(1'000'000, 1000), 0.002, 1e-9);
  // Records never explain all of the time.
  estimate.observe(1'000'000, 1'000'000'000, 0.001);
  EXPECT_LT(estimate.bytes_per_second(), 1e12);
}

TEST(BandwidthEstimate, RefusesNonsense) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(BandwidthEstimate({-1, 0, 0.5, 1}), Error);
  EXPECT_THROW(BandwidthEstimate({0, nan, 0.5, 1}), Error);
  EXPECT_THROW(BandwidthEstimate({0, 0, 1.0, 1}), Error);
  EXPECT_THROW(BandwidthEstimate({0, 0, 0.5, 0}), Error);
  BandwidthEstimate estimate;
  EXPECT_THROW(estimate.observe(1, 1, nan), Error);
  EXPECT_THROW(estimate.observe(1, 1, -0.5), Error);
  estimate.observe(1, 1, 0.0);
  EXPECT_GT(estimate.predict(1, 1), 0.0);
}

TEST(RateLimit, LetsABurstPassAndThenHolds) {
  const auto now = [] { return Deadline::after(std::chrono::nanoseconds(0)); };
  RateLimit limit(1.0, 1000);
  limit.charge(600, now());
  limit.charge(400, now());
  EXPECT_THROW(limit.charge(100, now()), Error);
  limit.set(0);
  limit.charge(1'000'000, now());
  EXPECT_THROW(limit.set(-1), Error);
  EXPECT_THROW(RateLimit(std::numeric_limits<double>::infinity(), 1), Error);
}

TEST(RateLimit, AMessageLargerThanTheBucketPassesAFullBucket) {
  const auto now = [] { return Deadline::after(std::chrono::nanoseconds(0)); };
  RateLimit limit(1.0, 1000);
  limit.charge(5000, now());
  EXPECT_THROW(limit.charge(1, now()), Error);
}

TEST(RateLimit, KeepsTheAverage) {
  RateLimit limit(1e6, 1000);
  const auto begin = Deadline::Clock::now();
  for (int i = 0; i < 50; ++i) limit.charge(1000, Deadline::after(std::chrono::seconds(20)));
  // 49 charges beyond the first bucket at a millisecond each; slower machines take longer.
  EXPECT_GE(Deadline::Clock::now() - begin, std::chrono::milliseconds(48));
}

TEST(RateLimit, CancelWakes) {
  RateLimit limit(1e-6, 1);
  limit.charge(1, Deadline::after(std::chrono::seconds(1)));
  auto waiting = std::async(std::launch::async, [&] {
    try {
      limit.charge(1, Deadline::after(std::chrono::seconds(60)));
    } catch (const Error& error) {
      return error.code();
    }
    return ErrorCode::device;
  });
  limit.cancel();
  EXPECT_EQ(waiting.get(), ErrorCode::cancelled);
}

}  // namespace
}  // namespace pipelive
