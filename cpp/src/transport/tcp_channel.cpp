#include "pipelive/transport/tcp_channel.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kHead = 8;

// The upper half is the complement of the lower, so that stray bytes are not taken for a length.
std::uint64_t encode_length(std::size_t bytes) {
  const auto low = static_cast<std::uint32_t>(bytes);
  return (static_cast<std::uint64_t>(~low) << 32) | low;
}

}  // namespace

void TcpChannel::Progress::start(const TcpOptions& options) {
  at_ = Deadline::Clock::now() + options.progress_window;
  needed_ = options.progress_bytes;
  passed_ = 0;
}

void TcpChannel::Progress::add(std::size_t bytes, std::size_t left, const TcpOptions& options) {
  passed_ += bytes;
  if (left == 0 || passed_ >= needed_) start(options);
}

TcpChannel::TcpChannel(UniqueFd socket, TcpOptions options)
    : socket_(std::move(socket)), options_(options) {
  constexpr std::size_t kLargest = std::size_t{1} << 31;
  if (options_.max_message_bytes == 0 || options_.max_message_bytes > kLargest) {
    throw Error(ErrorCode::invalid_argument, "max_message_bytes is " +
                                                 std::to_string(options_.max_message_bytes) +
                                                 ", expected 1 to " + std::to_string(kLargest));
  }
  const int flags = fcntl(socket_.get(), F_GETFL);
  if (flags < 0 || fcntl(socket_.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
    throw_errno("fcntl(O_NONBLOCK) on a channel's socket", errno);
  }
  const int one = 1;
  // A stream socket of another family has no such option and needs none.
  static_cast<void>(setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
  wakeup_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wakeup_.valid()) throw_errno("eventfd", errno);
}

TcpChannel::~TcpChannel() {
  close();
}

void TcpChannel::check_local() const {
  switch (local_.load(std::memory_order_acquire)) {
    case Local::open:
      return;
    case Local::closed:
      throw Error(ErrorCode::closed, "the tcp channel was closed here");
    case Local::cancelled:
      throw Error(ErrorCode::cancelled, "the tcp channel was cancelled");
  }
}

void TcpChannel::fail_peer(const char* call, int error) {
  check_local();
  throw Error(ErrorCode::closed, std::string("the peer of the tcp channel has gone: ") + call +
                                     ": " + std::strerror(error));
}

TcpChannel::Wake TcpChannel::wait(short events, Deadline deadline, const Progress* progress) {
  while (true) {
    check_local();
    const auto now = Deadline::Clock::now();
    const bool stalls = progress != nullptr && progress->at() < deadline.at();
    const auto until = stalls ? progress->at() : deadline.at();
    const auto left = std::max(until - now, Deadline::Clock::duration::zero());
    // Rounded up, so that the wait does not spin through its last millisecond.
    const auto millis = std::chrono::ceil<std::chrono::milliseconds>(left).count();
    pollfd pollers[2] = {{socket_.get(), events, 0}, {wakeup_.get(), POLLIN, 0}};
    const int ready = poll(pollers, 2, static_cast<int>(std::min<long long>(millis, 1000)));
    if (ready < 0 && errno != EINTR) throw_errno("poll on a channel's socket", errno);
    check_local();
    // Errors and hang-ups are named by the read or write that follows.
    if (ready > 0 && pollers[0].revents != 0) return Wake::ready;
    if (Deadline::Clock::now() >= until) return stalls ? Wake::stalled : Wake::deadline;
  }
}

std::span<std::byte> TcpChannel::do_acquire(std::size_t bytes, Deadline /*deadline*/) {
  check_local();
  if (send_failed_) {
    throw Error(ErrorCode::closed, "the tcp channel stopped in the middle of an earlier message");
  }
  return {send_buffer_.reserve(bytes), bytes};
}

void TcpChannel::do_submit(std::size_t bytes, std::size_t /*bulk_bytes*/, Deadline deadline) {
  check_local();
  const std::uint64_t head = encode_length(bytes);
  std::byte* const body = send_buffer_.reserve(bytes);
  const std::size_t total = kHead + bytes;
  std::size_t sent = 0;
  Progress progress;
  progress.start(options_);
  send_failed_ = true;
  while (sent < total) {
    iovec parts[2];
    std::size_t count = 0;
    if (sent < kHead) {
      parts[count++] = {reinterpret_cast<std::byte*>(const_cast<std::uint64_t*>(&head)) + sent,
                        kHead - sent};
      parts[count++] = {body, bytes};
    } else {
      parts[count++] = {body + (sent - kHead), total - sent};
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t wrote = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (wrote > 0) {
      sent += static_cast<std::size_t>(wrote);
      progress.add(static_cast<std::size_t>(wrote), total - sent, options_);
      continue;
    }
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0 && errno != EAGAIN && errno != EWOULDBLOCK) fail_peer("send", errno);
    const Wake wake = wait(POLLOUT, deadline, &progress);
    if (wake != Wake::ready) {
      throw Error(ErrorCode::timeout, "send on a tcp channel: the peer took " +
                                          std::to_string(sent) + " of " + std::to_string(total) +
                                          " bytes before the " +
                                          (wake == Wake::stalled ? "progress " : "") + "deadline");
    }
  }
  send_failed_ = false;
}

std::optional<std::span<const std::byte>> TcpChannel::do_receive(Deadline deadline) {
  check_local();
  // Time in which nobody was receiving is not the peer's.
  if (head_got_ != 0 && receive_progress_.at() <= Deadline::Clock::now()) {
    receive_progress_.start(options_);
  }
  while (true) {
    std::byte* target = nullptr;
    std::size_t want = 0;
    std::size_t size = 0;
    if (head_got_ < kHead) {
      target = reinterpret_cast<std::byte*>(&head_word_) + head_got_;
      want = kHead - head_got_;
    } else {
      size = static_cast<std::uint32_t>(head_word_);
      if (head_word_ != encode_length(size) || size == 0 || size > options_.max_message_bytes) {
        throw Error(ErrorCode::protocol, "a frame of a tcp channel claims " + std::to_string(size) +
                                             " bytes, expected 1 to " +
                                             std::to_string(options_.max_message_bytes));
      }
      target = receive_buffer_.reserve(size) + body_got_;
      want = size - body_got_;
    }
    const ssize_t got = recv(socket_.get(), target, want, 0);
    if (got > 0) {
      if (head_got_ == 0) receive_progress_.start(options_);
      const auto count = static_cast<std::size_t>(got);
      if (head_got_ < kHead) {
        head_got_ += count;
      } else {
        body_got_ += count;
        receive_progress_.add(count, size - body_got_, options_);
        if (body_got_ == size)
          return std::span<const std::byte>{receive_buffer_.reserve(size), size};
      }
      continue;
    }
    if (got == 0) {
      check_local();
      const std::size_t part = head_got_ + body_got_;
      throw Error(ErrorCode::closed,
                  part == 0 ? std::string("the peer closed the tcp channel")
                            : "the peer closed the tcp channel in the middle of a message, after " +
                                  std::to_string(part) + " bytes of it");
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) fail_peer("receive", errno);
    const Wake wake = wait(POLLIN, deadline, head_got_ != 0 ? &receive_progress_ : nullptr);
    if (wake == Wake::deadline) return std::nullopt;
    if (wake == Wake::stalled) {
      throw Error(ErrorCode::timeout, "receive on a tcp channel: the peer sends a message of " +
                                          std::to_string(size) + " bytes too slowly (" +
                                          std::to_string(body_got_) +
                                          " arrived before the progress deadline)");
    }
  }
}

void TcpChannel::do_release() {
  head_got_ = 0;
  body_got_ = 0;
}

void TcpChannel::end(Local state) noexcept {
  Local expected = Local::open;
  if (!local_.compare_exchange_strong(expected, state)) {
    if (state != Local::cancelled || expected == Local::cancelled) return;
    local_.store(state);
  }
  const std::uint64_t one = 1;
  static_cast<void>(!write(wakeup_.get(), &one, sizeof one));
  if (state == Local::cancelled) {
    // Resets a TCP connection, so that neither end's kernel sends what it still holds. A socket of
    // another family refuses, and is only shut down.
    sockaddr none{};
    none.sa_family = AF_UNSPEC;
    static_cast<void>(connect(socket_.get(), &none, sizeof none));
  }
  shutdown(socket_.get(), SHUT_RDWR);
}

void TcpChannel::cancel() noexcept {
  end(Local::cancelled);
}
void TcpChannel::close() noexcept {
  end(Local::closed);
}

}  // namespace pipelive
