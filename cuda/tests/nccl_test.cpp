#include "pipelive/cuda/nccl.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>
#include <tuple>
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

// For what happens in another thread; a test that waits for ever is ended from outside.
template <typename Condition>
void wait_until(const Condition& condition) {
  while (!condition()) std::this_thread::yield();
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

TEST(NcclLibrary, AnEnvironmentThatMakesItBlockIsRefused) {
  const FakeNccl fake;
  const std::string candidates[] = {PIPELIVE_FAKE_NCCL};
  setenv("NCCL_COMM_BLOCKING", "1", 1);
  const NcclProbe probe = probe_nccl(candidates);
  setenv("NCCL_COMM_BLOCKING", "0", 1);
  const NcclProbe other = probe_nccl(candidates);
  unsetenv("NCCL_COMM_BLOCKING");
  EXPECT_FALSE(probe.version);
  EXPECT_THAT(probe.problem, HasSubstr("NCCL_COMM_BLOCKING is 1"));
  EXPECT_TRUE(other.version) << other.problem;
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
  wait_until([&] { return fake.count("alive") == 0; });
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, ARankThatGivesUpIsNotWaitedForToTheDeadline) {
  const FakeNccl fake;
  const NcclComm::Place place = host_place();
  const Error error = error_of([&] {
    NcclComm(place, place.nccl->unique_id(), 0, 2, Deadline::after(std::chrono::hours(1)),
             [] { return true; });
  });
  EXPECT_EQ(error.code(), ErrorCode::closed);
  EXPECT_THAT(error.what(), HasSubstr("the other end has gone"));
  wait_until([&] { return fake.count("alive") == 0; });
  EXPECT_EQ(fake.violations(), 0);
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

// What a peer that died or a network that broke shows as is a lost connection, which can be made
// again; what is wrong with this end's device is not.
TEST(NcclComm, AnAsynchronousErrorAborts) {
  const FakeNccl fake;
  for (const auto& [result, code, name] :
       {std::tuple(6, ErrorCode::closed, "ncclRemoteError (6)"),
        std::tuple(2, ErrorCode::closed, "ncclSystemError (2)"),
        std::tuple(3, ErrorCode::closed, "ncclInternalError (3)"),
        std::tuple(1, ErrorCode::device, "ncclUnhandledCudaError (1)")}) {
    const auto [a, b] = make_comms(host_place(), host_place());
    fake.set("async_error", result);
    std::vector<std::byte> bytes(100);
    const Error error = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, soon()); });
    EXPECT_EQ(error.code(), code);
    EXPECT_THAT(error.what(), HasSubstr(std::string("asynchronous error: ") + name));
    fake.set("async_error", 0);
  }
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, AnErrorOnIssueAborts) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("fail_issue", 1);
  std::vector<std::byte> bytes(100);
  const Error error = error_of([&, &a = a] { a->send(bytes.data(), 100, 1, soon()); });
  EXPECT_EQ(error.code(), ErrorCode::closed);
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

// The caller is told at its own limit. What NCCL may still touch is held until it has let go.
TEST(NcclComm, AnAbortThatTakesItsTimeHoldsTheMemoryAndNotTheCaller) {
  const FakeNccl fake;
  const auto [a, b] = make_comms(host_place(), host_place());
  fake.set("hold_abort", 1);
  auto bytes = std::make_shared<std::vector<std::byte>>(100);
  const std::weak_ptr<std::vector<std::byte>> held = bytes;
  const Error error = error_of([&, &a = a] { a->send(bytes->data(), 100, 1, shortly(), bytes); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  bytes.reset();
  wait_until([&] { return fake.count("aborting") != fake.count("aborted"); });
  EXPECT_FALSE(held.expired());
  fake.set("hold_abort", 0);
  wait_until([&] { return held.expired(); });
  EXPECT_EQ(fake.violations(), 0);
}

// ncclCommAbort and the start of a communicator wait for whatever runs on the device, here for a
// transfer that never completes and that only the same device's issuing thread can end.
TEST(NcclComm, OneThatEndsDoesNotKeepAStalledOneFromItsLimit) {
  const FakeNccl fake;
  const auto left = test::make_issuer();
  const auto right = test::make_issuer();
  auto idle = make_comms(host_place(left), host_place(right));
  const auto stalled = make_comms(host_place(left), host_place(right));
  fake.set("stall", 1);
  std::vector<std::byte> bytes(100);
  auto sending = std::async(std::launch::async, [&, &a = stalled.a] {
    return error_of([&] {
             a->send(bytes.data(), 100, 1, Deadline::after(std::chrono::milliseconds(300)));
           })
        .code();
  });
  wait_until([&] { return fake.count("pending") != 0; });
  idle.a.reset();
  EXPECT_EQ(sending.get(), ErrorCode::timeout);
  wait_until([&] { return fake.count("alive") == 2; });
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, OneThatStartsDoesNotKeepAStalledOneFromItsLimit) {
  const FakeNccl fake;
  const auto left = test::make_issuer();
  const auto right = test::make_issuer();
  const auto stalled = make_comms(host_place(left), host_place(right));
  fake.set("stall", 1);
  std::vector<std::byte> bytes(100);
  auto sending = std::async(std::launch::async, [&, &a = stalled.a] {
    return error_of([&] {
             a->send(bytes.data(), 100, 1, Deadline::after(std::chrono::milliseconds(300)));
           })
        .code();
  });
  wait_until([&] { return fake.count("pending") != 0; });
  const auto other = make_comms(host_place(left), host_place(right));
  EXPECT_EQ(sending.get(), ErrorCode::timeout);
  EXPECT_EQ(fake.violations(), 0);
}

TEST(NcclComm, AnIdleOneEndsWithTheTurnInHand) {
  const FakeNccl fake;
  const auto turn = std::make_shared<DeviceTurn>();
  auto pair = make_comms(host_place(nullptr, nullptr, turn), host_place());
  fake.set("hold_abort", 1);
  const int before = fake.count("aborting");
  pair.a->abort();
  wait_until([&] { return fake.count("aborting") != before; });
  EXPECT_EQ(turn->holder(), "an NCCL communicator that ends");
  fake.set("hold_abort", 0);
  wait_until([&] { return turn->holder().empty(); });
  EXPECT_EQ(fake.violations(), 0);
}

// Two communicators between the same two devices, used in opposite orders, without the turns.
TEST(NcclComm, OppositeOrdersAreFoundAndDoNotHang) {
  const FakeNccl fake;
  const auto left = test::make_issuer();
  const auto right = test::make_issuer();
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
