// Moves of blocks on a CUDA device, and streams that are being captured; on the fake driver.
#include <gtest/gtest.h>

#include <vector>

#include "cuda_device_fixture.hpp"

namespace pipelive::cuda {
namespace {

TEST_F(CudaDeviceTest, ACapturedStreamIsNotOrderedBehindAnother) {
  OwnStream stream(device().context());
  OwnStream other(device().context());
  const auto event = device().record(other.stream());
  fake_.capture(stream.stream(), true);
  EXPECT_ERROR(busy, "captured into a CUDA graph", device().order_after(stream.stream(), event));
  EXPECT_TRUE(fake_.captures(stream.stream()));
  fake_.capture(stream.stream(), false);
  device().order_after(stream.stream(), event);
}

TEST_F(CudaPoolTest, AConsumerThatIsBeingCapturedIsRefusedAndItsCaptureGoesOn) {
  open();
  OwnStream producer(device().context());
  OwnStream consumer(device().context());
  fake_.capture(consumer.stream(), true);
  pool_->order_consumer(consumer.stream());  // behind nobody
  pool_->residency().note_stream(producer.stream());
  EXPECT_CODE(busy, pool_->order_consumer(consumer.stream()));
  EXPECT_TRUE(fake_.captures(consumer.stream()));
  fake_.capture(consumer.stream(), false);
  pool_->order_consumer(consumer.stream());
  pool_->residency().forget_stream(producer.stream());
}

TEST_F(CudaPoolTest, MovesAreNoPartOfAGraph) {
  open();
  OwnStream stream(device().context());
  fake_.capture(stream.stream(), true);
  const std::vector<BlockMove> moves{{29, 3}};
  const std::vector<std::uint64_t> live{29};
  EXPECT_CODE(busy, pool_->move_blocks(moves, stream.stream()));
  EXPECT_CODE(busy, pool_->shrink(4, live, moves, {}, stream.stream()));
  EXPECT_EQ(pool_->capacity(), 30u);
  EXPECT_EQ(fake_.count("cuMemcpyAsync"), 0u);
  EXPECT_TRUE(fake_.captures(stream.stream()));
  fake_.capture(stream.stream(), false);
  pool_->shrink(4, live, moves, {}, stream.stream());
}

// A call of the driver takes microseconds, and a move is one in every layer.
TEST_F(CudaPoolTest, ScatteredMovesAreOneLaunch) {
  FakeDriver().symbol<FakeDriverSlotKernels>("fake_driver_slot_kernels")();
  const auto image = [](const KernelFile& file, const DeviceLimits&) {
    EXPECT_EQ(file.name, "copy_many");
    return std::vector<std::byte>(4);
  };
  device_ = std::make_shared<CudaDevice>(Driver::open(PIPELIVE_FAKE_DRIVER), 0, image);
  open();
  const std::uint64_t loaded = fake_.count("cuModuleLoadData");
  EXPECT_GT(loaded, 0u);
  OwnStream stream(device().context());
  std::vector<BlockMove> moves;
  std::vector<BlockMove> back;
  for (std::uint64_t block = 1; block < 15; ++block) {
    moves.push_back({block, 30 - block});
    back.push_back({30 - block, block});
  }
  const auto calls = [&](const char* name) { return fake_.count(name); };
  const std::vector<std::byte> values = pattern(spec_.block_bytes(), 8);
  write(device(), at(1, moves[2].from), values);
  const std::uint64_t copies = calls("cuMemcpyAsync");
  for (int round = 0; round < 3; ++round) {
    pool_->move_blocks(moves, stream.stream());
    pool_->move_blocks(back, stream.stream());
  }
  pool_->move_blocks(moves, stream.stream());
  EXPECT_EQ(calls("cuLaunchKernel"), 7u);
  EXPECT_EQ(calls("cuMemcpyHtoDAsync"), 7u);
  EXPECT_EQ(calls("cuMemcpyAsync"), copies);
  EXPECT_EQ(calls("cuMemHostAlloc"), 1u);
  EXPECT_EQ(read(device(), at(1, moves[2].to), values.size()), values);
  // While a table is read, another call has one of its own.
  fake_.hold(stream.stream(), true);
  pool_->move_blocks(back, stream.stream());
  pool_->move_blocks(moves, stream.stream());
  EXPECT_EQ(calls("cuMemHostAlloc"), 2u);
  fake_.hold(stream.stream(), false);
  EXPECT_EQ(read(device(), at(1, moves[2].to), values.size()), values);
  EXPECT_EQ(fake_.count("cuModuleLoadData"), loaded);  // no step waits for that
}

TEST_F(CudaPoolTest, WithoutAKernelMovesAreCopiesOneByOne) {
  int asked = 0;
  const auto none = [&](const KernelFile&, const DeviceLimits&) -> std::vector<std::byte> {
    ++asked;
    throw Error(ErrorCode::device, "no kernels");
  };
  device_ = std::make_shared<CudaDevice>(Driver::open(PIPELIVE_FAKE_DRIVER), 0, none);
  open();
  std::vector<BlockMove> moves;
  for (std::uint64_t block = 1; block < 15; ++block) moves.push_back({block, 30 - block});
  const std::vector<std::byte> values = pattern(spec_.block_bytes(), 8);
  write(device(), at(0, 3), values);
  const std::uint64_t copies = fake_.count("cuMemcpyAsync");
  pool_->move_blocks(moves);
  EXPECT_EQ(fake_.count("cuMemcpyAsync"), copies + 2 * moves.size());
  EXPECT_EQ(fake_.count("cuLaunchKernel"), 0u);
  EXPECT_EQ(read(device(), at(0, 27), values.size()), values);
  pool_->move_blocks(moves);
  EXPECT_EQ(asked, 1);
}

TEST_F(CudaPoolTest, MovesAreOrderedBehindWritersAndOnTheirStream) {
  open();
  OwnStream compute(device().context());
  OwnStream copies(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.hold(compute.stream(), true);
  const auto values = pattern(spec_.block_bytes(), 5);
  device().copy(at(0, 29), values.data(), values.size(), compute.stream());
  // On a stream: the call returns at once, the copy comes after what compute had to write.
  pool_->move_blocks(std::vector<BlockMove>{{29, 3}}, copies.stream());
  EXPECT_TRUE(fake_.pending(copies.stream()));
  fake_.hold(compute.stream(), false);
  EXPECT_FALSE(fake_.pending(copies.stream()));
  EXPECT_EQ(read(device(), at(0, 3), values.size()), values);
  // Without one it is over when the call returns.
  pool_->move_blocks(std::vector<BlockMove>{{3, 7}});
  EXPECT_EQ(read(device(), at(0, 7), values.size()), values);
  // And a shrink unmaps only after its own moves.
  pool_->shrink(4, std::vector<std::uint64_t>{7}, std::vector<BlockMove>{{7, 2}}, {},
                copies.stream());
  EXPECT_EQ(read(device(), at(0, 2), values.size()), values);
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaDeviceTest, ACapturedStreamCannotBeWaitedFor) {
  OwnStream stream(device().context());
  fake_.capture(stream.stream(), true);
  EXPECT_ERROR(busy, "captured into a CUDA graph", (void)device().record(stream.stream()));
  fake_.capture(stream.stream(), false);
  EXPECT_TRUE(device().record(stream.stream())->done());
}

TEST_F(CudaPoolTest, ACaptureRefusesTheGrowOverScratchAndChangesNothing) {
  open(HolePolicy::scratch);
  OwnStream compute(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.capture(compute.stream(), true);
  EXPECT_CODE(busy, pool_->grow(40));
  EXPECT_EQ(pool_->capacity(), 30u);
  fake_.capture(compute.stream(), false);
  pool_->grow(40);
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaPoolTest, ACaptureRefusesTheShrinkAndChangesNothing) {
  open();
  OwnStream compute(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.capture(compute.stream(), true);
  EXPECT_CODE(busy, pool_->shrink(4, {}, {}));
  EXPECT_EQ(pool_->capacity(), 30u);
  pool_->residency().check_range(1, 0, 30);
  EXPECT_TRUE(testing::accessible(at(1, 29)));
  fake_.capture(compute.stream(), false);
  pool_->shrink(4, {}, {});
  pool_->residency().forget_stream(compute.stream());
}

}  // namespace
}  // namespace pipelive::cuda
