#pragma once

#include <future>
#include <memory>
#include <utility>

#include "fake_nccl.hpp"
#include "pipelive/cuda/nccl_channel.hpp"
#include "transport/channel_pair.hpp"

namespace pipelive::cuda::test {

using pipelive::test::soon;

struct CommPair {
  std::shared_ptr<NcclComm> a;
  std::shared_ptr<NcclComm> b;
};

inline CommPair make_comms(NcclComm::Place a, NcclComm::Place b, Deadline deadline = soon()) {
  const NcclUniqueId id = a.nccl->unique_id();
  auto other = std::async(std::launch::async, [&] {
    return std::make_shared<NcclComm>(std::move(b), id, 1, 2, deadline);
  });
  auto one = std::make_shared<NcclComm>(std::move(a), id, 0, 2, deadline);
  return {std::move(one), other.get()};
}

/// What an end of a nccl channel is made of.
struct NcclEnd {
  std::shared_ptr<NcclIssuer> issuer = make_issuer();
  std::shared_ptr<DeviceTurn> turn = std::make_shared<DeviceTurn>();
  std::shared_ptr<StreamDevice> device = std::make_shared<StreamDevice>();
};

struct NcclPair {
  std::shared_ptr<NcclChannel> a;
  std::shared_ptr<NcclChannel> b;
};

// What is ordered through shared memory, ThreadSanitizer does not see where both ends lie in one
// process.
#if defined(__SANITIZE_THREAD__)
inline constexpr auto kBaseKind = pipelive::test::ChannelKind::tcp;
#else
inline constexpr auto kBaseKind = pipelive::test::ChannelKind::shm;
#endif

inline NcclPair make_nccl(const NcclEnd& a, const NcclEnd& b,
                          std::size_t window = std::size_t{1} << 20,
                          std::chrono::nanoseconds limit = std::chrono::seconds(10)) {
  const pipelive::test::ChannelPair base = make_channels(kBaseKind, window + 65536, {});
  const CommPair comms =
      make_comms(host_place(a.issuer, a.device, a.turn), host_place(b.issuer, b.device, b.turn));
  const auto options = [&](const std::shared_ptr<NcclComm>& comm,
                           const std::shared_ptr<DeviceTurn>& turn) {
    NcclChannel::Options made;
    made.comm = comm;
    made.turn = turn;
    made.out = std::make_shared<Staging>(comm->device(), StagingShape{65536, 1});
    made.in = std::make_shared<Staging>(comm->device(), StagingShape{65536, 1});
    made.window_bytes = window;
    made.transfer_limit = limit;
    return made;
  };
  return {std::make_shared<NcclChannel>(base.a, options(comms.a, a.turn)),
          std::make_shared<NcclChannel>(base.b, options(comms.b, b.turn))};
}

}  // namespace pipelive::cuda::test
