#pragma once

#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/migration/patch_receiver.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "transport/channel_pair.hpp"
#include "transport/test_layers.hpp"

namespace pipelive::test {

/// The moving layers of one end, in plain memory.
struct EndMemory {
  EndMemory(const KVSpec& kv, const std::vector<std::uint32_t>& layer_ids, std::uint64_t blocks,
            std::size_t stack = 1)
      : spec(kv), ids(layer_ids) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      layers.push_back(std::make_unique<PlainLayer>(kv, blocks, stack));
    }
  }
  [[nodiscard]] PatchLayers patch_layers(std::shared_ptr<SlotCopier> copier = nullptr) const {
    std::vector<PatchLayer> result;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      result.push_back({ids[i], layers[i]->layout, layers[i]->memory, nullptr, copier});
    }
    return {spec, std::move(result)};
  }
  [[nodiscard]] std::uint64_t slots() const { return layers.front()->slots(); }

  KVSpec spec;
  std::vector<std::uint32_t> ids;
  std::vector<std::unique_ptr<PlainLayer>> layers;
};

template <typename Work>
ErrorCode code_of(const Work& work, std::string* text = nullptr) {
  try {
    work();
  } catch (const Error& error) {
    if (text != nullptr) *text = error.what();
    return error.code();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorCode::device;
}

inline KVSpec small_spec(BlockOrder order = BlockOrder::hnd) {
  return {2, 8, DType::bfloat16, 4, order};
}

/// A receiver that runs in its own thread.
class RunningReceiver {
 public:
  RunningReceiver(std::shared_ptr<Channel> channel, PatchLayers layers,
                  const PatchReceiver::Options& options, std::vector<PatchRegion> regions = {})
      : receiver(std::move(channel), std::move(layers), options, std::move(regions)),
        outcome_(std::async(std::launch::async, [this]() -> std::optional<Error> {
          try {
            receiver.run(soon());
          } catch (const Error& error) {
            return error;
          }
          return std::nullopt;
        })) {}
  ~RunningReceiver() { receiver.cancel(); }

  /// How `run` ended, once it has.
  std::optional<Error> outcome() { return outcome_.get(); }
  /// Ends it, as the loss of its connection would; how many rounds it has applied.
  std::uint64_t end() {
    receiver.cancel();
    outcome_.wait();
    return receiver.rounds_applied();
  }

  PatchReceiver receiver;

 private:
  std::future<std::optional<Error>> outcome_;
};

/// A whole message with records, as a sender would make it, for tests that play the sender.
inline std::vector<std::byte> raw_data(wire::Header header,
                                       const std::vector<wire::Record>& records,
                                       std::span<const std::byte> payload) {
  std::vector<std::byte> message(wire::message_bytes(records.size(), payload.size()));
  wire::write_records(message, records);
  std::copy(payload.begin(), payload.end(),
            message.begin() + static_cast<std::ptrdiff_t>(wire::payload_offset(records.size())));
  header.records = static_cast<std::uint32_t>(records.size());
  header.payload_bytes = payload.size();
  wire::write_header(message, header, 0);
  return message;
}

}  // namespace pipelive::test
