#include "pipelive/transport/staging.hpp"

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::size_t kLargest = std::size_t{1} << 34;
constexpr std::uint32_t kMostPieces = 1024;

std::string problem_of(const StagingShape& shape) {
  if (shape.pieces == 0 || shape.pieces > kMostPieces) {
    return "staging of " + std::to_string(shape.pieces) + " pieces, expected 1 to " +
           std::to_string(kMostPieces);
  }
  if (shape.piece_bytes == 0 || shape.piece_bytes % kAlignment != 0 ||
      shape.piece_bytes > kLargest / shape.pieces) {
    return "staging pieces of " + std::to_string(shape.piece_bytes) +
           " bytes, expected a positive multiple of " + std::to_string(kAlignment) + " and " +
           std::to_string(kLargest) + " together at most";
  }
  return {};
}

// Memory whose work was not done when it was let go of. Never destroyed, as the device may be gone
// when a process ends.
struct PutAside {
  struct Memory {
    std::vector<std::shared_ptr<Event>> events;
    std::vector<std::pair<Stream, std::shared_ptr<const void>>> streams;
    std::function<void()> free;
  };
  std::mutex mutex;
  std::vector<Memory> all;
};
PutAside& put_aside() {
  static auto& instance = *new PutAside;
  return instance;
}

void check_sample(std::span<const std::byte> sample, const StagingShape& shape) {
  if (sample.empty() || sample.size() > shape.piece_bytes / 2) {
    throw Error(ErrorCode::invalid_argument,
                "a sample of " + std::to_string(sample.size()) + " bytes, expected 1 to " +
                    std::to_string(shape.piece_bytes / 2) + ", half a piece");
  }
}

/// Where the samples of all pieces lie, from the beginning of the staging.
std::vector<std::size_t> sample_places(const StagingShape& shape, std::size_t bytes) {
  std::vector<std::size_t> places;
  for (std::uint32_t piece = 0; piece < shape.pieces; ++piece) {
    places.push_back(piece * shape.piece_bytes);
    places.push_back((piece + 1) * shape.piece_bytes - bytes);
  }
  return places;
}

bool is_done(const std::vector<std::shared_ptr<Event>>& events) {
  try {
    return std::all_of(events.begin(), events.end(),
                       [](const auto& event) { return event->done(); });
  } catch (const std::exception&) {
    return true;  // a device that has failed runs nothing any more
  }
}

}  // namespace

void StreamUsers::note(Stream stream, std::shared_ptr<const void> owner) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [known, _] : streams_) {
    if (known == stream) return;
  }
  streams_.emplace_back(stream, std::move(owner));
}

void StreamUsers::free_when_done(Device& device, std::function<void()> free) noexcept {
  free_due();
  std::vector<std::shared_ptr<Event>> events;
  try {
    for (const auto& [stream, _] : streams_) events.push_back(device.record(stream));
  } catch (const std::exception&) {
    events.clear();  // as above
  }
  if (is_done(events)) {
    free();
    return;
  }
  const std::lock_guard lock(put_aside().mutex);
  put_aside().all.push_back({std::move(events), std::move(streams_), std::move(free)});
}

std::size_t StreamUsers::free_due() noexcept {
  std::vector<PutAside::Memory> due;  // freed without the lock
  std::size_t left = 0;
  {
    const std::lock_guard lock(put_aside().mutex);
    auto& all = put_aside().all;
    const auto first = std::stable_partition(
        all.begin(), all.end(), [](const PutAside::Memory& one) { return !is_done(one.events); });
    std::move(first, all.end(), std::back_inserter(due));
    all.erase(first, all.end());
    left = all.size();
  }
  for (PutAside::Memory& memory : due) memory.free();
  return left;
}

void check_shape(const StagingShape& shape) {
  const std::string problem = problem_of(shape);
  if (!problem.empty()) throw Error(ErrorCode::invalid_argument, problem);
}

Staging::Staging(std::shared_ptr<Device> device, StagingShape shape)
    : device_(std::move(device)), shape_(shape) {
  check_shape(shape_);
  StreamUsers::free_due();
  const std::size_t page = device_->info().page_granularity;
  shape_.piece_bytes = (shape_.piece_bytes + page - 1) / page * page;
  check_shape(shape_);
  const std::size_t bytes = shape_.bytes();
  page_ = device_->create_pages(bytes, 1).front();
  try {
    address_ = device_->reserve(bytes, page);
    device_->map(address_, bytes, {&page_, 1});
  } catch (...) {
    if (address_ != nullptr) device_->release(address_, bytes);
    device_->destroy_pages(bytes, {&page_, 1});
    throw;
  }
}

Staging::~Staging() {
  users_.free_when_done(
      *device_, [device = device_, address = address_, bytes = shape_.bytes(), page = page_] {
        device->release(address, bytes);
        try {
          device->destroy_pages(bytes, {&page, 1});
        } catch (const Error&) {
          // A device that is broken has been reported by what broke it.
        }
      });
}

ExportedPages Staging::export_memory() const {
  return device_->export_page(shape_.bytes(), page_);
}

void Staging::put_sample(std::span<const std::byte> sample, Stream stream,
                         std::shared_ptr<const void> stream_owner, Deadline deadline) {
  check_sample(sample, shape_);
  users_.note(stream, std::move(stream_owner));
  for (const std::size_t place : sample_places(shape_, sample.size())) {
    device_->copy(address_ + place, sample.data(), sample.size(), stream);
  }
  device_->record(stream)->wait(deadline);
}

PeerStaging::PeerStaging(std::shared_ptr<Device> device, const ExportedPages& exported,
                         StagingShape shape)
    : device_(std::move(device)), shape_(shape) {
  StreamUsers::free_due();
  const std::string problem = problem_of(shape);
  if (!problem.empty()) throw Error(ErrorCode::protocol, "the peer offers " + problem);
  if (exported.bytes != shape.bytes()) {
    throw Error(ErrorCode::protocol, "the peer's staging has " + std::to_string(exported.bytes) +
                                         " bytes, its pieces " + std::to_string(shape.bytes()));
  }
  pages_ = device_->import_run({&exported, 1}, PageAccess::read);
  if (pages_->bytes() < shape.bytes()) {
    throw Error(ErrorCode::protocol, "the peer's staging maps to " +
                                         std::to_string(pages_->bytes()) + " bytes, expected " +
                                         std::to_string(shape.bytes()));
  }
}

bool PeerStaging::has_sample(std::span<const std::byte> sample, Stream stream,
                             std::shared_ptr<const void> stream_owner, Deadline deadline) const {
  check_sample(sample, shape_);
  const std::vector<std::size_t> places = sample_places(shape_, sample.size());
  const std::size_t bytes = places.size() * sample.size();
  const Staging near(device_, {(bytes + kAlignment - 1) / kAlignment * kAlignment, 1});
  near.users().note(stream, stream_owner);
  users_.note(stream, std::move(stream_owner));
  for (std::size_t i = 0; i < places.size(); ++i) {
    device_->copy(near.piece(0) + i * sample.size(), pages_->data() + places[i], sample.size(),
                  stream);
  }
  // With a deadline; the copy to the host below waits as long as it takes.
  device_->record(stream)->wait(deadline);
  std::vector<std::byte> found(bytes);
  device_->copy(found.data(), near.piece(0), bytes, stream);
  device_->record(stream)->wait(deadline);
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto one = std::span(found).subspan(i * sample.size(), sample.size());
    if (!std::equal(one.begin(), one.end(), sample.begin())) return false;
  }
  return true;
}

PeerStaging::~PeerStaging() {
  users_.free_when_done(*device_,
                        [device = device_, pages = std::move(pages_)]() mutable { pages.reset(); });
}

}  // namespace pipelive
