#include "pipelive/transport/channel.hpp"

#include <cstring>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {

std::span<std::byte> Channel::acquire(std::size_t bytes, Deadline deadline) {
  if (bytes == 0 || bytes > max_message_bytes()) {
    throw Error(ErrorCode::invalid_argument,
                "acquire of " + std::to_string(bytes) + " bytes on a " + std::string(kind()) +
                    " channel, expected 1 to " + std::to_string(max_message_bytes()));
  }
  if (lent_ != 0) {
    throw Error(ErrorCode::invalid_argument, "acquire before the last buffer was submitted");
  }
  const std::span<std::byte> buffer = do_acquire(bytes, deadline);
  lent_ = bytes;
  return buffer;
}

void Channel::submit(std::size_t bytes, Deadline deadline) {
  if (bytes > lent_ || lent_ == 0) {
    throw Error(ErrorCode::invalid_argument, "submit of " + std::to_string(bytes) +
                                                 " bytes, acquired were " + std::to_string(lent_));
  }
  lent_ = 0;
  if (bytes == 0) return;
  do_submit(bytes, deadline);
  messages_sent_.fetch_add(1, std::memory_order_relaxed);
  bytes_sent_.fetch_add(bytes, std::memory_order_relaxed);
}

std::optional<std::span<const std::byte>> Channel::try_receive(Deadline deadline) {
  if (receiving_) {
    throw Error(ErrorCode::invalid_argument, "receive before the last message was released");
  }
  const std::optional<std::span<const std::byte>> message = do_receive(deadline);
  if (message) {
    receiving_ = true;
    messages_received_.fetch_add(1, std::memory_order_relaxed);
    bytes_received_.fetch_add(message->size(), std::memory_order_relaxed);
  }
  return message;
}

std::span<const std::byte> Channel::receive(Deadline deadline) {
  const std::optional<std::span<const std::byte>> message = try_receive(deadline);
  if (!message) {
    throw Error(ErrorCode::timeout, "receive on a " + std::string(kind()) +
                                        " channel: the peer sent nothing before the deadline");
  }
  return *message;
}

void Channel::release() {
  if (!receiving_) {
    throw Error(ErrorCode::invalid_argument, "release without a received message");
  }
  receiving_ = false;
  do_release();
}

ChannelStats Channel::stats() const noexcept {
  return {messages_sent_.load(std::memory_order_relaxed),
          bytes_sent_.load(std::memory_order_relaxed),
          messages_received_.load(std::memory_order_relaxed),
          bytes_received_.load(std::memory_order_relaxed)};
}

void send(Channel& channel, std::span<const std::byte> message, Deadline deadline) {
  const std::span<std::byte> buffer = channel.acquire(message.size(), deadline);
  std::memcpy(buffer.data(), message.data(), message.size());
  channel.submit(message.size(), deadline);
}

}  // namespace pipelive
