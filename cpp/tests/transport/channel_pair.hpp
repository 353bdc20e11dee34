#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pipelive/device/host_device.hpp"
#include "pipelive/transport/peer_channel.hpp"
#include "pipelive/transport/shm_channel.hpp"
#include "pipelive/transport/tcp_channel.hpp"

namespace pipelive::test {

enum class ChannelKind { shm, tcp, p2p, nccl };

inline std::string name_of(ChannelKind kind) {
  switch (kind) {
    case ChannelKind::shm:
      return "shm";
    case ChannelKind::tcp:
      return "tcp";
    case ChannelKind::p2p:
      return "p2p";
    case ChannelKind::nccl:
      return "nccl";
  }
  return "?";
}

/// Two connected stream sockets: Unix ones, or TCP over loopback.
struct SocketPair {
  UniqueFd a;
  UniqueFd b;
};

inline void require(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

inline SocketPair unix_pair() {
  int fds[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

inline SocketPair tcp_pair() {
  UniqueFd listening(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  require(bind(listening.get(), generic, size) == 0, "bind");
  require(listen(listening.get(), 1) == 0, "listen");
  require(getsockname(listening.get(), generic, &size) == 0, "getsockname");
  UniqueFd a(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  require(connect(a.get(), generic, size) == 0, "connect");
  UniqueFd b(accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
  require(b.valid(), "accept");
  return {std::move(a), std::move(b)};
}

/// Two ends of a channel in one process.
struct ChannelPair {
  std::shared_ptr<Channel> a;
  std::shared_ptr<Channel> b;
};

/// For tests that are not about slow peers: under a sanitizer, on a busy machine, all are slow.
inline TcpOptions patient() {
  TcpOptions options;
  options.progress_window = std::chrono::seconds(120);
  return options;
}

inline ChannelPair make_channels(ChannelKind kind, std::size_t ring_bytes,
                                 const TcpOptions& options);

/// The kinds that a suite runs over; the tests of the CUDA part run the same files over theirs.
#ifdef PIPELIVE_TEST_CHANNEL_KINDS
#define PIPELIVE_CHANNEL_KINDS ::testing::Values(PIPELIVE_TEST_CHANNEL_KINDS)
/// Defined there: two connected ends with a window of `window` bytes.
ChannelPair make_device_channels(ChannelKind kind, std::size_t window);
#else
#define PIPELIVE_CHANNEL_KINDS \
  ::testing::Values(ChannelKind::shm, ChannelKind::tcp, ChannelKind::p2p)
#endif

/// Staging of `from`, as the process of `to` would map it.
inline std::unique_ptr<PeerStaging> mapped(std::shared_ptr<Device> to, const Staging& from) {
  return std::make_unique<PeerStaging>(std::move(to), from.export_memory(), from.shape());
}

/// Both ends own staging, in the memory of `a` and `b`, and map the other's.
inline ChannelPair make_peers(const std::shared_ptr<Device>& a, const std::shared_ptr<Device>& b,
                              std::size_t window, const StagingShape& shape = {65536, 3}) {
  // The base has room for the window and for notes beside it.
  ChannelPair base = make_channels(ChannelKind::shm, window + 65536, {});
  PeerChannel::Options left;
  PeerChannel::Options right;
  left.device = a;
  right.device = b;
  left.own = std::make_shared<Staging>(a, shape);
  right.own = std::make_shared<Staging>(b, shape);
  left.peer = mapped(a, *right.own);
  right.peer = mapped(b, *left.own);
  left.window_bytes = right.window_bytes = window;
  return {std::make_shared<PeerChannel>(base.a, std::move(left)),
          std::make_shared<PeerChannel>(base.b, std::move(right))};
}

inline ChannelPair make_channels(ChannelKind kind, std::size_t ring_bytes = std::size_t{1} << 20,
                                 const TcpOptions& options = patient()) {
#ifdef PIPELIVE_TEST_CHANNEL_KINDS
  if (kind == ChannelKind::p2p || kind == ChannelKind::nccl) {
    return make_device_channels(kind, ring_bytes);
  }
#endif
  if (kind == ChannelKind::p2p) {
    return make_peers(std::make_shared<HostDevice>(), std::make_shared<HostDevice>(), ring_bytes);
  }
  if (kind == ChannelKind::tcp) {
    SocketPair sockets = tcp_pair();
    return {std::make_shared<TcpChannel>(std::move(sockets.a), options),
            std::make_shared<TcpChannel>(std::move(sockets.b), options)};
  }
  SocketPair sockets = unix_pair();
  UniqueFd memory = ShmChannel::create_memory(ring_bytes);
  UniqueFd other(fcntl(memory.get(), F_DUPFD_CLOEXEC, 0));
  return {std::make_shared<ShmChannel>(std::move(sockets.a), std::move(memory), 0),
          std::make_shared<ShmChannel>(std::move(sockets.b), std::move(other), 1)};
}

inline Deadline soon() {
  return Deadline::after(std::chrono::seconds(120));
}
inline Deadline shortly() {
  return Deadline::after(std::chrono::milliseconds(30));
}

}  // namespace pipelive::test
