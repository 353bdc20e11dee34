#include "pipelive/kv/layer_view.hpp"

#include <gtest/gtest.h>

#include <numeric>

#include "device/device_test_tools.hpp"
#include "pipelive/device/host_device.hpp"

namespace pipelive {
namespace {

using testing::kPage;

std::shared_ptr<KVPool> make_pool(const KVSpec& spec, std::uint32_t stack) {
  const auto pages =
      PagePool::create(std::make_shared<HostDevice>(), {kPage, std::uint64_t{1} << 20, 0});
  KVPoolOptions options;
  options.num_layers = 5;
  options.layers = {0, 1, 2, 3, 4};
  options.max_blocks = 9;
  options.capacity = 9;
  options.stack = stack;
  return KVPool::create(spec, pages, options);
}

// The strides of the view and the fragments of the layout describe the same bytes.
void expect_consistent(const LayerView& view) {
  const auto& spec = view.spec();
  const auto& strides = view.strides();
  const std::size_t item = size_of(spec.dtype);
  for (std::int64_t block = 0; block < view.shape()[0]; ++block) {
    for (std::int64_t head = 0; head < spec.num_kv_heads; ++head) {
      for (std::int64_t kv = 0; kv < 2; ++kv) {
        for (std::int64_t token = 0; token < spec.block_size; ++token) {
          const auto by_strides = static_cast<std::size_t>(block * strides[0] + head * strides[1] +
                                                           kv * strides[2] + token * strides[3]) *
                                  item;
          const auto fragment = static_cast<std::size_t>(head * 2 + kv);
          const std::size_t by_layout =
              static_cast<std::size_t>(block) * view.memory().block_stride +
              view.layout().fragment_offsets[fragment] +
              static_cast<std::size_t>(token) * view.layout().token_stride;
          ASSERT_EQ(by_strides, by_layout);
        }
      }
    }
  }
  EXPECT_EQ(strides[4], 1);
}

TEST(LayerView, StridesSayWhatTheLayoutSays) {
  for (const BlockOrder order : {BlockOrder::hnd, BlockOrder::nhd}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const std::uint32_t stack : {1u, 2u, 5u}) {
        const KVSpec spec{3, 8, dtype, 4, order};
        const auto pool = make_pool(spec, stack);
        const LayerView view(pool, 3);
        EXPECT_EQ(view.shape(), (std::array<std::int64_t, 5>{9, 3, 2, 4, 8}));
        EXPECT_EQ(view.resident_blocks(), 9u);
        expect_consistent(view);
      }
    }
  }
}

TEST(LayerView, RefusesALayerBeyondTheModel) {
  const auto pool = make_pool({2, 4, DType::float16, 4, BlockOrder::hnd}, 1);
  EXPECT_CODE(invalid_argument, LayerView(pool, 5));
}

class AdoptedPoolTest : public ::testing::Test {
 protected:
  static constexpr KVSpec kSpec{2, 4, DType::float32, 3, BlockOrder::hnd};
  static constexpr std::int64_t kBlocks = 6;

  /// An engine's tensor [2, block, token, head, dim], seen in the canonical order of axes.
  AdoptedTensor engine_tensor(std::uint32_t layer) {
    const auto memory = std::make_shared<std::vector<float>>(2 * kBlocks * 3 * 2 * 4);
    std::iota(memory->begin(), memory->end(), static_cast<float>(layer * 1000));
    AdoptedTensor tensor;
    tensor.layer = layer;
    tensor.data = reinterpret_cast<std::byte*>(memory->data());
    tensor.shape = {kBlocks, 2, 2, 3, 4};
    tensor.strides = {3 * 2 * 4, 4, kBlocks * 3 * 2 * 4, 2 * 4, 1};
    tensor.owner = memory;
    return tensor;
  }
  static std::shared_ptr<AdoptedPool> adopt(std::vector<AdoptedTensor> tensors) {
    return AdoptedPool::create(kSpec, 4, std::move(tensors), DeviceKind::host, 0);
  }
};

TEST_F(AdoptedPoolTest, ViewsDescribeTheEnginesMemory) {
  const AdoptedTensor tensor = engine_tensor(2);
  const auto pool = adopt({tensor, engine_tensor(1)});
  EXPECT_EQ(pool->layers(), (std::vector<std::uint32_t>{1, 2}));
  const LayerView view = pool->layer(2);
  EXPECT_EQ(view.memory().base, tensor.data);
  EXPECT_EQ(view.strides(), tensor.strides);
  expect_consistent(view);
  view.check_resident_range(0, kBlocks);
  EXPECT_CODE(not_resident, view.check_resident_range(0, kBlocks + 1));
  EXPECT_CODE(invalid_argument, (void)pool->layer(0));
}

TEST_F(AdoptedPoolTest, RefusesTensorsThatDoNotFit) {
  const auto with = [this](auto change) {
    AdoptedTensor tensor = engine_tensor(1);
    change(tensor);
    (void)adopt({tensor});
  };
  with([](AdoptedTensor&) {});
  EXPECT_ERROR(invalid_argument, "expected [blocks, 2, 2, 3, 4]",
               with([](AdoptedTensor& t) { t.shape[3] = 4; }));
  EXPECT_CODE(invalid_argument, with([](AdoptedTensor& t) { t.shape[0] = 0; }));
  EXPECT_ERROR(invalid_argument, "expected 1 for the last axis",
               with([](AdoptedTensor& t) { t.strides[4] = 2; }));
  EXPECT_ERROR(invalid_argument, "do not share memory",
               with([](AdoptedTensor& t) { t.strides[0] = 0; }));
  EXPECT_ERROR(invalid_argument, "do not share memory",
               with([](AdoptedTensor& t) { t.strides[3] = -8; }));
  EXPECT_ERROR(invalid_argument, "do not share memory",
               with([](AdoptedTensor& t) { t.strides[1] = 3; }));
  EXPECT_CODE(invalid_argument, with([](AdoptedTensor& t) { t.data = nullptr; }));
  EXPECT_ERROR(invalid_argument, "layer 4", with([](AdoptedTensor& t) { t.layer = 4; }));
  EXPECT_ERROR(invalid_argument, "named twice", (void)adopt({engine_tensor(1), engine_tensor(1)}));
  AdoptedTensor longer = engine_tensor(2);
  longer.shape[0] = 3;
  EXPECT_ERROR(invalid_argument, "the others have 6", (void)adopt({engine_tensor(1), longer}));
  EXPECT_CODE(invalid_argument, (void)adopt({}));
}

TEST_F(AdoptedPoolTest, ClosedPoolsRefuseAndViewsKeepTheMemory) {
  AdoptedTensor tensor = engine_tensor(0);
  const std::weak_ptr<void> memory = tensor.owner;
  auto pool = adopt({std::move(tensor)});
  tensor.owner.reset();
  {
    const LayerView view = pool->layer(0);
    pool->close();
    EXPECT_CODE(closed, view.check_resident_range(0, 1));
    pool.reset();
    EXPECT_FALSE(memory.expired());
  }
  EXPECT_TRUE(memory.expired());
}

}  // namespace
}  // namespace pipelive
