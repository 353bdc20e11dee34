#include "pipelive/transport/staging.hpp"

#include <algorithm>
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

}  // namespace

void check_shape(const StagingShape& shape) {
  const std::string problem = problem_of(shape);
  if (!problem.empty()) throw Error(ErrorCode::invalid_argument, problem);
}

Staging::Staging(std::shared_ptr<Device> device, StagingShape shape)
    : device_(std::move(device)), shape_(shape) {
  check_shape(shape_);
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
  const std::size_t bytes = shape_.bytes();
  device_->release(address_, bytes);
  try {
    device_->destroy_pages(bytes, {&page_, 1});
  } catch (const Error&) {
    // A device that is broken has been reported by what broke it.
  }
}

ExportedPages Staging::export_memory() const {
  return device_->export_page(shape_.bytes(), page_);
}

PeerStaging::PeerStaging(Device& device, const ExportedPages& exported, StagingShape shape)
    : shape_(shape) {
  const std::string problem = problem_of(shape);
  if (!problem.empty()) throw Error(ErrorCode::protocol, "the peer offers " + problem);
  if (exported.bytes != shape.bytes()) {
    throw Error(ErrorCode::protocol, "the peer's staging has " + std::to_string(exported.bytes) +
                                         " bytes, its pieces " + std::to_string(shape.bytes()));
  }
  pages_ = device.import_run({&exported, 1}, PageAccess::read);
  if (pages_->bytes() < shape.bytes()) {
    throw Error(ErrorCode::protocol, "the peer's staging maps to " +
                                         std::to_string(pages_->bytes()) + " bytes, expected " +
                                         std::to_string(shape.bytes()));
  }
}

}  // namespace pipelive
