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

Bulk Channel::acquire_bulk(std::size_t bytes, Deadline deadline) {
  if (bytes == 0 || bytes > max_bulk_bytes()) {
    throw Error(ErrorCode::invalid_argument,
                "acquire_bulk of " + std::to_string(bytes) + " bytes on a " + std::string(kind()) +
                    " channel, which takes " + std::to_string(max_bulk_bytes()) +
                    " bytes at most beside a message");
  }
  if (lent_ == 0 || lent_bulk_ != 0) {
    throw Error(ErrorCode::invalid_argument, "acquire_bulk comes once, between acquire and submit");
  }
  const Bulk bulk = do_acquire_bulk(bytes, deadline);
  lent_bulk_ = bytes;
  return bulk;
}

Bulk Channel::do_acquire_bulk(std::size_t bytes, Deadline /*deadline*/) {
  throw Error(ErrorCode::invalid_argument,
              "no place for " + std::to_string(bytes) + " bytes beside a message of this channel");
}

void Channel::submit(std::size_t bytes, Deadline deadline, std::size_t bulk_bytes) {
  if (bytes > lent_ || lent_ == 0) {
    throw Error(ErrorCode::invalid_argument, "submit of " + std::to_string(bytes) +
                                                 " bytes, acquired were " + std::to_string(lent_));
  }
  if (bulk_bytes > lent_bulk_ || (bytes == 0 && bulk_bytes != 0)) {
    throw Error(ErrorCode::invalid_argument, "submit of " + std::to_string(bulk_bytes) +
                                                 " bytes beside " + std::to_string(bytes) +
                                                 ", acquired were " + std::to_string(lent_bulk_));
  }
  const bool had_bulk = lent_bulk_ != 0;
  lent_ = 0;
  lent_bulk_ = 0;
  if (bytes == 0 && !had_bulk) return;
  do_submit(bytes, bulk_bytes, deadline);
  if (bytes == 0) return;
  messages_sent_.fetch_add(1, std::memory_order_relaxed);
  bytes_sent_.fetch_add(bytes + bulk_bytes, std::memory_order_relaxed);
}

std::optional<std::span<const std::byte>> Channel::try_receive(Deadline deadline) {
  if (receiving_) {
    throw Error(ErrorCode::invalid_argument, "receive before the last message was released");
  }
  const std::optional<std::span<const std::byte>> message = do_receive(deadline);
  if (message) {
    receiving_ = true;
    messages_received_.fetch_add(1, std::memory_order_relaxed);
    bytes_received_.fetch_add(message->size() + do_received_bulk().bytes,
                              std::memory_order_relaxed);
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

Bulk Channel::received_bulk() const {
  if (!receiving_) {
    throw Error(ErrorCode::invalid_argument, "received_bulk without a received message");
  }
  return do_received_bulk();
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
