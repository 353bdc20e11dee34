#include "pipelive/cuda/nccl.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "nccl_pair.hpp"
#include "pipelive/cuda/device_turn.hpp"

namespace pipelive::cuda {
namespace {

using pipelive::test::shortly;
using pipelive::test::soon;
using test::FakeNccl;
using test::host_place;
using test::make_comms;
using ::testing::HasSubstr;

template <typename Work>
Error error_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {ErrorCode::device, ""};
}

TEST(NcclLibrary, IsFoundWithItsVersionAndPlace) {
  const FakeNccl fake;
  const std::string candidates[] = {"/nowhere/libnccl.so.2", PIPELIVE_FAKE_NCCL};
  const std::shared_ptr<const Nccl> nccl = Nccl::open(candidates);
  EXPECT_EQ(nccl->version(), 22703);
  EXPECT_EQ(nccl->path(), PIPELIVE_FAKE_NCCL);
  EXPECT_EQ(nccl_version_text(22703), "2.27.3");
  EXPECT_EQ(nccl_version_text(2708), "2.7.8");
}

TEST(NcclLibrary, WhatWasTriedIsNamed) {
  const std::string candidates[] = {"/nowhere/libnccl.so.2", PIPELIVE_FAKE_NCCL_OLD,
                                    PIPELIVE_FAKE_NCCL_PART};
  const NcclProbe probe = probe_nccl(candidates);
  EXPECT_FALSE(probe.version);
  EXPECT_THAT(probe.problem, HasSubstr("libnccl.so.2 is not loaded in this process"));
  EXPECT_THAT(probe.problem, HasSubstr("/nowhere/libnccl.so.2"));
  EXPECT_THAT(probe.problem, HasSubstr("is NCCL 2.17.5, 2.18.0 or later is needed"));
  EXPECT_THAT(probe.problem, HasSubstr("lacks ncclCommAbort"));
}

TEST(NcclLibrary, AbilitiesFollowTheVersion) {
  const FakeNccl fake;
  const std::string candidates[] = {PIPELIVE_FAKE_NCCL};
  EXPECT_TRUE(probe_nccl(candidates).launch_order);
  EXPECT_FALSE(probe_nccl(candidates).multi_rank_gpu);
  fake.set("version", 23004);
  EXPECT_TRUE(probe_nccl(candidates).multi_rank_gpu);
  fake.set("version", 21800);
  EXPECT_FALSE(probe_nccl(candidates).launch_order);
  fake.set("version", 0);
}

TEST(NcclComm, TwoRanksExchangeBytes) {
  const FakeNccl fake;
  {
    const auto [a, b] = make_comms(host_place(), host_place());
    std::vector<std::byte> out(100000, std::byte{7});
    std::vector<std::byte> in(out.size());
    auto sending = std::async(std::launch::async,
                              [&, &from = a] { from->send(out.data(), out.size(), 1, soon()); });
    b->receive(in.data(), in.size(), 0, soon());
    sending.get();
    EXPECT_EQ(in, out);
  }
  EXPECT_EQ(fake.violations(), 0);
  EXPECT_EQ(fake.count("alive"), 0);
}

TEST(NcclComm, OneRankTalksToItself) {
  const FakeNccl fake;
  const NcclComm::Place place = host_place();
  NcclComm comm(place, place.nccl->unique_id(), 0, 1, soon());
  std::vector<std::byte> out(5000, std::byte{3});
  std::vector<std::byte> in(out.size());
  for (int i = 0; i < 3; ++i) comm.exchange(out.data(), in.data(), out.size(), 0, soon());
  EXPECT_EQ(in, out);
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, ARankThatNeverComesIsADeadline) {
  const FakeNccl fake;
  const NcclComm::Place place = host_place();
  const Error error = error_of([&] { NcclComm(place, place.nccl->unique_id(), 0, 2, shortly()); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("rank 0 of 2"));
  EXPECT_EQ(fake.violations(), 0);
  EXPECT_EQ(fake.count("alive"), 0);
}

TEST(NcclComm, AFailureWhileComingUpIsReported) {
  const FakeNccl fake;
  fake.set("fail_init", 1);
  const NcclComm::Place place = host_place();
  const Error error = error_of([&] { NcclComm(place, place.nccl->unique_id(), 0, 1, soon()); });
  EXPECT_EQ(error.code(), ErrorCode::device);
  EXPECT_THAT(error.what(), HasSubstr("ncclCommInitRankConfig: ncclSystemError (2)"));
}

TEST(NcclComm, AStalledTransferEndsAtItsDeadlineAndEndsTheCommunicator) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  std::vector<std::byte> bytes(100);
  const Error error = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, shortly()); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("send of 100 bytes, rank 1"));
  const Error again = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, soon()); });
  EXPECT_EQ(again.code(), ErrorCode::timeout);
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, AnAsynchronousErrorAborts) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("async_error", 6);
  std::vector<std::byte> bytes(100);
  const Error error = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, soon()); });
  EXPECT_EQ(error.code(), ErrorCode::device);
  EXPECT_THAT(error.what(), HasSubstr("asynchronous error: ncclRemoteError (6)"));
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, AnErrorOnIssueAborts) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("fail_issue", 1);
  std::vector<std::byte> bytes(100);
  const Error error = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, soon()); });
  EXPECT_EQ(error.code(), ErrorCode::device);
  EXPECT_THAT(error.what(), HasSubstr("ncclSend: ncclSystemError (2)"));
}

TEST(NcclComm, AbortWakesATransfer) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("stall", 1);
  std::vector<std::byte> bytes(100);
  auto waiting = std::async(std::launch::async, [&, &a = a] {
    return error_of([&] { a->send(bytes.data(), 100, 1, soon()); });
  });
  a->abort();
  EXPECT_EQ(waiting.get().code(), ErrorCode::cancelled);
  a->abort();
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, AnAbortThatTakesItsTimeDoesNotHangTheCaller) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("slow_abort_ms", 300);
  std::vector<std::byte> bytes(100);
  EXPECT_EQ(error_of([&, &a = a] { a->send(bytes.data(), 100, 1, shortly()); }).code(),
            ErrorCode::timeout);
  fake.set("slow_abort_ms", 0);
}

// Two communicators between the same two devices, used in opposite orders, without the turns.
TEST(NcclComm, OppositeOrdersAreFoundAndDoNotHang) {
  const FakeNccl fake;
  const auto left = std::make_shared<NcclIssuer>(nullptr);
  const auto right = std::make_shared<NcclIssuer>(nullptr);
  const auto first = make_comms(host_place(left), host_place(right));
  const auto second = make_comms(host_place(left), host_place(right));
  std::vector<std::byte> bytes(4000);
  std::vector<std::byte> in(4000);
  const Deadline deadline = Deadline::after(std::chrono::milliseconds(200));
  // Each device first waits for what the other has queued behind its own.
  std::vector<std::future<ErrorCode>> ends;
  const auto start = [&](NcclComm& comm, bool sends) {
    ends.push_back(std::async(std::launch::async, [&, sends] {
      return error_of([&] {
               if (sends) {
                 comm.send(bytes.data(), bytes.size(), 1 - comm.rank(), deadline);
               } else {
                 comm.receive(in.data(), in.size(), 1 - comm.rank(), deadline);
               }
             })
          .code();
    }));
  };
  start(*first.a, true);   // left: first, never joined by right
  start(*second.b, true);  // right: second, never joined by left
  for (auto& end : ends) EXPECT_EQ(end.get(), ErrorCode::timeout);
  EXPECT_EQ(fake.violations(), 0);
}

TEST(DeviceTurn, IsOnePerDeviceAndNamesItsHolder) {
  const auto turn = DeviceTurn::of("cuda:7");
  EXPECT_EQ(turn, DeviceTurn::of("cuda:7"));
  EXPECT_NE(turn, DeviceTurn::of("cuda:6"));
  EXPECT_TRUE(turn->try_take("an all-reduce"));
  EXPECT_FALSE(turn->try_take("a patch"));
  const Error error = error_of([&] { turn->take("a patch", shortly()); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("an all-reduce"));
  auto waiting = std::async(std::launch::async, [&] { turn->take("a patch", soon()); });
  turn->give();
  waiting.get();
  EXPECT_EQ(turn->holder(), "a patch");
  turn->give();
  EXPECT_EQ(error_of([&] { turn->give(); }).code(), ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace pipelive::cuda
