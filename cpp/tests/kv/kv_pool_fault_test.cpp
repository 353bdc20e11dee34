// KVPool when the device fails in the middle.

#include <gtest/gtest.h>

#include <tuple>

#include "device/fault_tools.hpp"
#include "kv/kv_pool_fixture.hpp"

namespace pipelive {
namespace {

using testing::KVPoolFixture;
using Layers = std::vector<std::uint32_t>;
using Ids = std::vector<std::uint64_t>;
using Moves = std::vector<BlockMove>;

// What any failing device call leaves behind: everything as it was.
using FaultCase = std::tuple<testing::DeviceCase, HolePolicy>;

class KVPoolFaultTest : public KVPoolFixture, public ::testing::WithParamInterface<FaultCase> {
 protected:
  [[nodiscard]] const testing::DeviceCase& device_case() const override {
    return std::get<0>(GetParam());
  }
  [[nodiscard]] HolePolicy holes() const { return std::get<1>(GetParam()); }
  void SetUp() override {
    KVPoolFixture::SetUp();
    if (IsSkipped()) return;
    open({0, 1, 4, 5}, 30, 2, holes());
    for (const std::uint64_t block : {0, 1, 8, 29}) put(block);
    before_ = device_->usage();
    used_ = pages_->stats().used_bytes;
  }
  void check() {
    EXPECT_EQ(pool_->capacity(), 30u);
    EXPECT_EQ(pool_->layers(), (Layers{0, 1, 4, 5}));
    EXPECT_EQ(pages_->stats().used_bytes, used_);
    EXPECT_EQ(device_->usage().mapped_bytes, before_.mapped_bytes);
    EXPECT_EQ(device_->usage().reserved_bytes, before_.reserved_bytes);
    EXPECT_EQ(device_->usage().page_bytes, pages_->stats().held_bytes);
    for (const std::uint64_t block : {0, 1, 8, 29}) EXPECT_TRUE(holds(block, block));
    pool_->residency().check_range(4, 0, 30);
    EXPECT_CODE(not_resident, pool_->residency().check_range(4, 0, 31));
    EXPECT_CODE(not_resident, pool_->residency().check_range(2, 0, 1));
  }
  // So that pages must be created and used ones scrubbed.
  void mix_pages() {
    pages_->trim();
    PageLease dirty = pages_->take(3);
    dirty.mark_dirty();
  }

  DeviceUsage before_;
  std::uint64_t used_ = 0;
};

TEST_P(KVPoolFaultTest, Grow) {
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        pool_->grow(95);
      },
      [&] { pool_->shrink(30, Ids{0, 1, 8, 29}, {}); }, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::map], 2u);
  EXPECT_GE(failures[DeviceCall::fill], 3u);
  EXPECT_EQ(failures[DeviceCall::unmap], holes() == HolePolicy::scratch ? 2u : 0u);
}

TEST_P(KVPoolFaultTest, Shrink) {
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->shrink(9, Ids{0, 1, 8, 29}, Moves{{29, 3}}); },
      [&] {
        pool_->grow(30);
        pool_->move_blocks(Moves{{3, 29}});
      },
      [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::copy], 2u);
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
  EXPECT_EQ(failures[DeviceCall::map_repeated], holes() == HolePolicy::scratch ? 2u : 0u);
  check();
}

TEST_P(KVPoolFaultTest, Reclaim) {
  // Until it succeeds the pages are there, and nothing but the capacity has changed.
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        if (pool_->capacity() == 30) pool_->lower(9, Ids{0, 1, 8}, {});
        pool_->reclaim();
      },
      [&] {
        EXPECT_LT(pages_->stats().used_bytes, used_);
        pool_->grow(30);
      },
      [&] {
        EXPECT_EQ(pool_->capacity(), 9u);
        EXPECT_EQ(pages_->stats().used_bytes, used_);
        EXPECT_EQ(device_->usage().mapped_bytes, before_.mapped_bytes);
        for (const std::uint64_t block : {0, 1, 8}) EXPECT_TRUE(holds(block, block));
      });
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
}

TEST_P(KVPoolFaultTest, AddLayers) {
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        pool_->add_layers(Layers{2, 3, 6});
      },
      [&] { pool_->drop_layers(Layers{2, 3, 6}); }, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::map], 2u);
  EXPECT_GE(failures[DeviceCall::create_pages], 1u);
}

TEST_P(KVPoolFaultTest, DropLayers) {
  const auto restore = [&] {
    pool_->add_layers(Layers{0, 1, 4, 5});
    for (const std::uint64_t block : {0, 1, 8, 29}) put(block);
  };
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->drop_layers(Layers{0, 1, 4, 5}); }, restore, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
}

TEST_P(KVPoolFaultTest, MoveBlocks) {
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->move_blocks(Moves{{1, 12}, {8, 20}}); }, [] {}, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::copy], 4u);
  // Once for each stream that must be done before, once for the copies.
  const std::size_t streams = device_->implicit_streams().size();
  EXPECT_EQ(failures[DeviceCall::record], 1u + streams);
  EXPECT_EQ(failures[DeviceCall::order_after], streams);
}

TEST_P(KVPoolFaultTest, Create) {
  std::shared_ptr<KVPool> other;
  KVPoolOptions options;
  options.num_layers = 4;
  options.layers = {0, 1};
  options.max_blocks = 40;
  options.capacity = 20;
  options.holes = holes();
  const auto check_gone = [&] {
    EXPECT_EQ(other, nullptr);
    check();
  };
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        other = KVPool::create(spec_, pages_, options);
      },
      [&] { other.reset(); }, check_gone);
  EXPECT_EQ(failures[DeviceCall::reserve], 4u);
  EXPECT_EQ(failures[DeviceCall::map], 2u);
}

INSTANTIATE_TEST_SUITE_P(Holes, KVPoolFaultTest,
                         ::testing::Combine(::testing::ValuesIn(testing::device_cases()),
                                            ::testing::Values(HolePolicy::fault,
                                                              HolePolicy::scratch)),
                         [](const auto& suite) {
                           const bool fault = std::get<1>(suite.param) == HolePolicy::fault;
                           return std::get<0>(suite.param).name + (fault ? "_fault" : "_scratch");
                         });

}  // namespace
}  // namespace pipelive
