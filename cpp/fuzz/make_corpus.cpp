// Writes the first inputs of every target: `make_corpus DIRECTORY`. The same bytes on every run.
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>

#include "feed_channel.hpp"
#include "layers.hpp"
#include "pipelive/migration/patch_receiver.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "script_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::uint64_t kEpoch = 7;
using Messages = std::vector<std::vector<std::byte>>;

Deadline soon() {
  return Deadline::after(std::chrono::seconds(10));
}

class Corpus {
 public:
  explicit Corpus(std::filesystem::path root) : root_(std::move(root)) {}

  void add(const std::string& target, const std::string& name, const Seed& seed) const {
    std::filesystem::create_directories(root_ / target);
    std::ofstream file(root_ / target / name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(seed.bytes.data()),
               static_cast<std::streamsize>(seed.bytes.size()));
    if (!file) throw std::runtime_error("cannot write to " + (root_ / target / name).string());
  }

 private:
  std::filesystem::path root_;
};

// What a source says in a session of two rounds and a region.
Messages source_messages(bool checksum) {
  Layers layers(BlockOrder::hnd);
  auto channel = std::make_shared<ScriptChannel>(ScriptChannel::Options{false, false, false});
  PatchSender::Options options;
  options.epoch = kEpoch;
  options.checksum = checksum;
  PatchSender sender(channel, layers.patch_layers(), options);
  const SlotRange first[] = {{0, 3}, {9, 2}};
  const SlotRange second[] = {{2, 4}};
  const std::uint32_t one[] = {5};
  sender.send_round(0, 4, first, {}, soon());
  sender.send_round(1, 6, second, one, soon());
  sender.send_region(9, std::vector<std::byte>(200, std::byte{3}), soon());
  try {
    sender.verify(first, Deadline::after(std::chrono::nanoseconds(0)));
  } catch (const Error&) {
    // Nobody answers; the request is what is wanted.
  }
  try {
    sender.finish(Deadline::after(std::chrono::nanoseconds(0)));
  } catch (const Error&) {
    // Nor does anybody confirm the end.
  }
  return channel->sent;
}

// What a target answers to that.
Messages target_messages(const Messages& source) {
  Layers layers(BlockOrder::hnd);
  auto channel = std::make_shared<ScriptChannel>(ScriptChannel::Options{});
  for (const auto& message : source) channel->script.push_back({0, message, {}});
  std::vector<std::byte> region(200);
  PatchReceiver receiver(channel, layers.patch_layers(), {kEpoch, std::nullopt},
                         {{9, region, nullptr}});
  receiver.run(soon());
  return channel->sent;
}

std::vector<std::byte> abort_message() {
  wire::Header head;
  head.kind = wire::Kind::abort;
  head.epoch = kEpoch;
  head.flags = wire::kBodyChecksum;
  head.id = static_cast<std::uint64_t>(ErrorCode::corrupt);
  const std::string reason = "no more";
  return wire::small_message(head, std::as_bytes(std::span(reason)));
}

void add_sessions(const Corpus& corpus, const Messages& source, const Messages& target,
                  const std::string& name) {
  Seed whole;
  whole.put(std::uint8_t{0}).put(std::uint8_t{0}).put(std::int8_t{0});
  for (const auto& message : source) put_message(whole, 0, message);
  corpus.add("receiver", name, whole);

  Seed resized;
  resized.put(std::uint8_t{0x27}).put(std::uint8_t{2}).put(std::int8_t{5});
  for (const auto& message : source) put_message(resized, kSign | kFit | kBeside, message);
  corpus.add("receiver", name + "_beside_resized", resized);

  // Records without their payload, which the target makes up.
  Seed records;
  records.put(std::uint8_t{2}).put(std::uint8_t{0}).put(std::int8_t{0});
  for (const auto& message : source) {
    const std::size_t table = wire::payload_offset(records_of(message).size());
    const bool data =
        field<std::uint8_t>(message, 6) == static_cast<std::uint8_t>(wire::Kind::data);
    put_message(records, data ? kSign | kFit | kPad : kSign,
                std::span(message).first(data ? table : message.size()));
  }
  corpus.add("receiver", name + "_records", records);

  Seed wire;
  for (const auto& message : source) put_message(wire, kSign | kFit, message);
  for (const auto& message : target) put_message(wire, 0, message);
  corpus.add("wire", name, wire);

  // Calls of the source (see sender_fuzz.cpp): replies are queued with 0, read by what follows.
  const auto call = [](Seed& seed, std::uint8_t what) -> Seed& {
    return seed.put(what).put(std::uint8_t{0});
  };
  Seed sender;
  sender.put(std::uint8_t{8});
  call(sender, 2).put(std::uint8_t{3});
  call(sender, 3).put(std::uint8_t{2});
  for (const auto& message : target) {
    call(sender, 0);
    put_message(sender, kSign, message);
  }
  call(sender, 6).put(std::int8_t{4});
  call(sender, 5).put(std::uint8_t{100});
  call(sender, 4);
  call(sender, 7);
  corpus.add("sender", name, sender);
}

void add_streams(const Corpus& corpus) {
  const auto frame = [](Seed& seed, std::uint32_t bytes) {
    Seed body;
    body.put(bytes).put(~bytes);
    for (std::uint32_t i = 0; i < bytes; ++i) body.put(static_cast<std::uint8_t>(i));
    for (std::size_t at = 0; at < body.bytes.size(); at += 50) {
      const std::size_t piece = std::min<std::size_t>(50, body.bytes.size() - at);
      seed.put(static_cast<std::uint8_t>(piece - 1))
          .put_bytes(std::span(body.bytes).subspan(at, piece));
    }
  };
  Seed stream;
  frame(stream, 1);
  frame(stream, 120);
  corpus.add("tcp_channel", "two_messages", stream);
  Seed huge;
  frame(huge, 3);
  huge.put(std::uint8_t{7}).put(std::uint32_t{3001}).put(~std::uint32_t{3001});
  corpus.add("tcp_channel", "too_long", huge);
  Seed cut = stream;
  cut.bytes.resize(40);
  corpus.add("tcp_channel", "cut", cut);
}

void add_rings(const Corpus& corpus) {
  for (std::uint8_t side = 0; side < 2; ++side) {
    // A frame of 100 bytes in the ring that is read, its head published, and a message sent back.
    Seed seed;
    const std::uint8_t ring = side == 0 ? 64 : 0;  // in units of 64 bytes behind the control page
    seed.put(side);
    seed.put(std::uint8_t{3}).put(ring).put(std::uint16_t{100});
    for (const int word : {64, 128, 192}) {
      seed.put(static_cast<std::uint8_t>(word)).put(std::uint8_t{3});
    }
    seed.put(std::uint8_t{2}).put(std::uint16_t{256}).put(std::uint64_t{192});
    seed.put(std::uint8_t{5});
    seed.put(std::uint8_t{7}).put(std::uint16_t{300}).put(std::uint8_t{6});
    corpus.add("shm_channel", "side_" + std::to_string(side), seed);
  }
}

void put_note(Seed& seed, std::uint8_t what, std::uint8_t kind, std::uint8_t number,
              std::uint8_t attempt, std::uint8_t bytes, std::uint8_t bulk) {
  for (const std::uint8_t byte : {what, kind, std::uint8_t{0}, number, attempt, bytes, bulk}) {
    seed.put(byte);
  }
}

void add_notes(const Corpus& corpus) {
  // A message beside which 256 bytes came is read; one is sent, credited and its piece released.
  Seed peer;
  peer.put(std::uint8_t{3});
  put_note(peer, 0, 1, 1, 0, 0, 1);
  peer.put(std::uint8_t{4}).put(std::uint32_t{0x04030201});
  peer.put(std::uint8_t{4});
  peer.put(std::uint8_t{6}).put(std::uint8_t{63}).put(std::uint16_t{100});
  put_note(peer, 0, 2, 0, 0, 8, 0);
  put_note(peer, 0, 3, 1, 0, 0, 0);
  corpus.add("peer_channel", "both_ways", peer);
}

void put_answer(Seed& seed, Note::Kind kind, std::uint8_t number, std::uint8_t attempt) {
  for (const std::uint8_t byte : {static_cast<std::uint8_t>(kind), std::uint8_t{0}, number, attempt,
                                  std::uint8_t{0}, std::uint8_t{0}}) {
    seed.put(byte);
  }
}

void add_transfers(const Corpus& corpus) {
  constexpr std::uint8_t kReceive = 0;
  constexpr std::uint8_t kSend = 1;
  constexpr std::uint8_t kFeed = 2;
  constexpr std::uint8_t kAnswer = 64;  // as many times as there are answers
  // Two messages with 256 bytes beside each; the second transfer is put off once.
  Seed in;
  for (const std::uint8_t number : {1, 2}) {
    put_note(in, kFeed, 1, number, 0, 0, 1);
    in.put(std::uint8_t{4}).put(std::uint32_t{0x04030201});
    put_answer(in.put(kFeed), Note::Kind::offer, number, 1);
    if (number == 1) {
      put_answer(in.put(std::uint8_t{kReceive + kAnswer}), Note::Kind::go, number, 1);
    } else {
      in.put(std::uint8_t{kReceive + 3 * kAnswer});
      put_answer(in, Note::Kind::withdraw, number, 1);
      put_answer(in, Note::Kind::offer, number, 2);
      put_answer(in, Note::Kind::go, number, 2);
    }
  }
  corpus.add("nccl_channel", "receive", in);
  // Two payloads are sent; the second is accepted only when it is offered again.
  Seed out;
  out.put(std::uint8_t{kSend + kAnswer}).put(std::uint16_t{100});
  put_answer(out, Note::Kind::accept, 1, 1);
  out.put(std::uint8_t{kSend + 2 * kAnswer}).put(std::uint16_t{200});
  put_answer(out, Note::Kind::reject, 2, 1);
  put_answer(out, Note::Kind::accept, 2, 2);
  corpus.add("nccl_channel", "send", out);
}

}  // namespace
}  // namespace pipelive::fuzz

int main(int count, char** names) {
  using namespace pipelive::fuzz;
  if (count != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", names[0]);
    return 2;
  }
  const Corpus corpus(names[1]);
  for (const bool checksum : {false, true}) {
    const Messages source = source_messages(checksum);
    const Messages target = target_messages(source);
    add_sessions(corpus, source, target, checksum ? "session_checked" : "session");
  }
  Seed refused;
  refused.put(std::uint8_t{8}).put(std::uint8_t{2}).put(std::uint8_t{0}).put(std::uint8_t{1});
  refused.put(std::uint8_t{0}).put(std::uint8_t{0});
  put_message(refused, 0, abort_message());
  refused.put(std::uint8_t{7}).put(std::uint8_t{0});
  corpus.add("sender", "abort", refused);
  add_streams(corpus);
  add_rings(corpus);
  add_notes(corpus);
  add_transfers(corpus);
  return 0;
}
