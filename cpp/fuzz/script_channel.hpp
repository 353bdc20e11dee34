#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/transport/channel.hpp"
#include "script.hpp"

namespace pipelive::fuzz {

/// A peer that says what the input makes it say, at once, and takes everything. Used by one thread.
class ScriptChannel final : public Channel {
 public:
  struct Options {
    bool shared = false;  ///< the peer could write to what it has sent
    bool device = false;  ///< payloads may go beside messages
    bool ends = true;     ///< after the last message it is closed, else silent
  };

  explicit ScriptChannel(const Options& options) : options_(options) {
    static const auto device = std::make_shared<HostDevice>();
    if (options_.device) device_ = device;
  }

  std::deque<ScriptMessage> script;
  std::vector<std::vector<std::byte>> sent;

  [[nodiscard]] std::string_view kind() const noexcept override { return "script"; }
  [[nodiscard]] std::size_t max_message_bytes() const noexcept override { return 1U << 20; }
  [[nodiscard]] bool peer_can_write_received() const noexcept override { return options_.shared; }
  [[nodiscard]] const Device* bulk_device() const noexcept override { return device_.get(); }
  [[nodiscard]] std::size_t max_bulk_bytes() const noexcept override {
    return device_ ? 1U << 16 : 0;
  }
  void cancel() noexcept override { closed_ = true; }
  void close() noexcept override { closed_ = true; }

 protected:
  std::span<std::byte> do_acquire(std::size_t bytes, Deadline /*deadline*/) override {
    check();
    out_.assign(bytes, std::byte{0});
    return out_;
  }
  Bulk do_acquire_bulk(std::size_t bytes, Deadline /*deadline*/) override {
    bulk_out_.assign(bytes, std::byte{0});
    return {bulk_out_.data(), bytes, {}};
  }
  void do_submit(std::size_t bytes, std::size_t /*bulk*/, Deadline /*deadline*/) override {
    check();
    out_.resize(bytes);
    if (bytes != 0) sent.push_back(std::move(out_));
    out_ = {};
  }
  std::optional<std::span<const std::byte>> do_receive(Deadline /*deadline*/) override {
    check();
    if (script.empty()) {
      if (options_.ends) throw Error(ErrorCode::closed, "the script is at its end");
      return std::nullopt;
    }
    // A vector of its own, so that the sanitizer sees every byte that is read behind the message.
    in_ = std::move(script.front());
    script.pop_front();
    return std::span<const std::byte>(in_.bytes);
  }
  void do_release() override { in_ = {}; }
  [[nodiscard]] Bulk do_received_bulk() const override {
    if (!device_ || in_.beside.empty()) return {};
    return {const_cast<std::byte*>(in_.beside.data()), in_.beside.size(), {}};
  }

 private:
  void check() const {
    if (closed_) throw Error(ErrorCode::closed, "the channel was closed here");
  }

  Options options_;
  std::shared_ptr<Device> device_;
  std::vector<std::byte> out_;
  std::vector<std::byte> bulk_out_;
  ScriptMessage in_;
  bool closed_ = false;
};

}  // namespace pipelive::fuzz
