#include "pipelive/cuda/device_marks.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/mark_math.hpp"
#include "pipelive/cuda/pinned_buffer.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"
#include "slot_wait.hpp"

namespace pipelive::cuda {
namespace {

constexpr unsigned kOwnSets = 2;              // of the tracker: pending and held
constexpr std::uint64_t kFirstRanges = 1024;  // that come with their number, in one copy
constexpr std::uint64_t kLeastRanges = 4096;
constexpr double kPatienceSeconds = 30.0;
// Of the words; each in a line of its own.
constexpr std::size_t kSetWord = 0;
constexpr std::size_t kSkippedWord = 128;
constexpr std::size_t kFreshWord = 256;
constexpr std::size_t kTotalWord = 384;
constexpr std::size_t kRanges = 400;  // behind the total, aligned to 16

}  // namespace

DeviceMarks::DeviceMarks(std::shared_ptr<const SlotKernels> kernels, std::uint64_t num_slots,
                         unsigned steps)
    : kernels_(std::move(kernels)), num_slots_(num_slots), num_sets_(steps + kOwnSets) {
  if (num_slots < 1 || num_slots > (std::uint64_t{1} << 36)) {
    throw Error(ErrorCode::invalid_argument,
                "DeviceMarks: num_slots is " + std::to_string(num_slots) + ", expected 1 to 2^36");
  }
  if (steps < 1 || num_sets_ + 1 > kMaxMarkSets) {
    throw Error(ErrorCode::invalid_argument, "DeviceMarks: steps is " + std::to_string(steps) +
                                                 ", expected 1 to " +
                                                 std::to_string(kMaxMarkSets - kOwnSets - 1));
  }
  set_words_ = mark_words(num_slots);
  // More ranges than this take more memory than the marks themselves; then those are read.
  most_ranges_ = std::max(kLeastRanges, set_words_ / 8);
  const std::uint64_t set_bytes = set_words_ * sizeof(u32);
  const std::uint64_t chunk_bytes = (set_words_ / kChunkWords * sizeof(u32) + 127) / 128 * 128;
  const std::uint64_t range_bytes = most_ranges_ * 2 * sizeof(u64);
  bytes_ = (num_sets_ + 1) * set_bytes + chunk_bytes + kRanges + range_bytes;

  const CallScope scope(*kernels_->context());
  // Whoever collects waits for these kernels: short ones, which a busy device should not keep
  // behind the blocks of a long one.
  stream_ = std::make_unique<OwnStream>(kernels_->context(), OwnStream::Priority::high);
  events_ = std::make_shared<EventPool>(kernels_->context());
  auto memory = std::make_unique<DeviceBuffer>(driver(), bytes_);
  pinned_ = std::make_unique<PinnedBuffer>(
      driver(), std::max<std::size_t>(kRanges - kTotalWord + range_bytes, set_bytes));
  try {
    taken_ = memory->pointer() + num_sets_ * set_bytes;
    chunks_ = taken_ + set_bytes;
    words_ = chunks_ + chunk_bytes;
    total_ = words_ + kTotalWord;
    driver().check(driver().api().memset_d8_async(memory->pointer(), 0, bytes_, stream_->handle()),
                   "cuMemsetD8Async");
    wait();
  } catch (...) {
    pinned_.reset();  // while the context is current
    throw;
  }
  memory_ = std::move(memory);
}

DeviceMarks::~DeviceMarks() {
  try {
    const CallScope scope(*kernels_->context());
    driver().api().stream_synchronize(stream_->handle());
    memory_.reset();
    pinned_.reset();
  } catch (const Error&) {
    // The context is gone, and what was in it.
  }
}

DeviceMarks::Target DeviceMarks::target() const noexcept {
  return {memory_->pointer(), set_words_, words_ + kSetWord, words_ + kSkippedWord, num_slots_};
}

StreamHandle DeviceMarks::native(Stream stream) const noexcept {
  return stream.handle == nullptr ? stream_->handle() : static_cast<StreamHandle>(stream.handle);
}

void DeviceMarks::wait() {
  const std::shared_ptr<Event> event = events_->record(stream_->handle());
  wait_briefly(*event, Deadline::after_seconds(kPatienceSeconds), "marks of written slots");
}

void DeviceMarks::read_back(DevicePointer source, std::size_t offset, std::size_t bytes) {
  driver().check(driver().api().memcpy_to_host_async(pinned_->data() + offset, source, bytes,
                                                     stream_->handle()),
                 "cuMemcpyDtoHAsync");
}

std::uint64_t DeviceMarks::skipped_slots() {
  const std::lock_guard lock(mutex_);
  const CallScope scope(*kernels_->context());
  read_back(words_ + kSkippedWord, 0, sizeof(u64));
  wait();
  return *reinterpret_cast<const u64*>(pinned_->data());
}

void DeviceMarks::select(unsigned set, Stream stream) {
  const CallScope scope(*kernels_->context());
  const StreamHandle handle = native(stream);
  refuse_capture(driver(), handle, "beginning the marks of a step");
  driver().check(driver().api().memset_d32_async(words_ + kSetWord, set, 1, handle),
                 "cuMemsetD32Async");
}

std::shared_ptr<Event> DeviceMarks::record(Stream stream) {
  const CallScope scope(*kernels_->context());
  const StreamHandle handle = native(stream);
  refuse_capture(driver(), handle, "sealing a step by an event");
  return events_->record(handle);
}

namespace {

MarkSets sets_of(DevicePointer words, std::uint64_t set_words, std::span<const unsigned> ids) {
  MarkSets sets{};
  sets.words = words;
  sets.set_words = set_words;
  for (const unsigned id : ids) sets.ids[sets.count++] = id;
  return sets;
}

void check_sets(std::span<const unsigned> sets, unsigned num_sets) {
  if (sets.size() <= num_sets &&
      std::all_of(sets.begin(), sets.end(), [=](unsigned set) { return set < num_sets; })) {
    return;
  }
  throw Error(ErrorCode::invalid_argument,
              "a set of marks that is not there; there are " + std::to_string(num_sets));
}

}  // namespace

std::uint64_t DeviceMarks::fold(std::span<const unsigned> sets, unsigned into) {
  check_sets(sets, num_sets_);
  check_sets({&into, 1}, num_sets_);
  const std::lock_guard lock(mutex_);
  const CallScope scope(*kernels_->context());
  MarkFoldArgs args{};
  args.sets = sets_of(memory_->pointer(), set_words_, sets);
  args.into = into;
  args.fresh = words_ + kFreshWord;
  driver().check(driver().api().memset_d8_async(args.fresh, 0, sizeof(u64), stream_->handle()),
                 "cuMemsetD8Async");
  kernels_->launch(kernels_->marks_fold, "pipelive_marks_fold", set_words_ / kChunkWords,
                   kMarkThreads, stream_->handle(), args);
  read_back(args.fresh, 0, sizeof(u64));
  wait();
  return *reinterpret_cast<const u64*>(pinned_->data());
}

void DeviceMarks::take(std::span<const unsigned> sets, std::vector<SlotRange>& ranges) {
  check_sets(sets, num_sets_);
  const std::lock_guard lock(mutex_);
  const CallScope scope(*kernels_->context());
  MarkTakeArgs take{};
  take.sets = sets_of(memory_->pointer(), set_words_, sets);
  // What a take before this one left behind lies where a set of that number would.
  if (left_over_) take.sets.ids[take.sets.count++] = num_sets_;
  take.taken = taken_;
  take.chunks = chunks_;
  left_over_ = true;
  const std::uint64_t chunks = set_words_ / kChunkWords;
  kernels_->launch(kernels_->marks_take, "pipelive_marks_take", chunks, kMarkThreads,
                   stream_->handle(), take);
  MarkEmitArgs emit{};
  emit.taken = taken_;
  emit.chunks = chunks_;
  emit.total = total_;
  emit.ranges = words_ + kRanges;
  emit.most = most_ranges_;
  emit.num_chunks = static_cast<u32>(chunks);
  kernels_->launch(kernels_->marks_emit, "pipelive_marks_emit", chunks, kMarkThreads,
                   stream_->handle(), emit);
  constexpr std::size_t kHeader = kRanges - kTotalWord;
  constexpr std::size_t kRangeBytes = 2 * sizeof(u64);
  read_back(total_, 0, kHeader + kFirstRanges * kRangeBytes);
  wait();
  const u64 total = *reinterpret_cast<const u64*>(pinned_->data());
  if (total > most_ranges_) {
    take_dense(ranges);
  } else {
    if (total > kFirstRanges) {
      const std::size_t first = kHeader + kFirstRanges * kRangeBytes;
      read_back(total_ + first, first, (total - kFirstRanges) * kRangeBytes);
      wait();
    }
    ranges.reserve(ranges.size() + total);
    const auto* found = reinterpret_cast<const u64*>(pinned_->data() + kHeader);
    for (u64 i = 0; i < total; ++i) {
      ranges.push_back({found[2 * i], found[2 * i + 1] - found[2 * i]});
    }
  }
  left_over_ = false;
}

// Reads the marks instead of the ranges, which are too many.
void DeviceMarks::take_dense(std::vector<SlotRange>& ranges) {
  read_back(taken_, 0, set_words_ * sizeof(u32));
  wait();
  const auto* words = reinterpret_cast<const u32*>(pinned_->data());
  const std::size_t before = ranges.size();
  try {
    for (u64 w = 0; w < set_words_; ++w) {
      for (u32 word = words[w]; word != 0;) {
        const u32 first = count_trailing_zeros(word);
        const u32 length = static_cast<u32>(std::countr_one(word >> first));
        const u64 begin = w * 32 + first;
        if (ranges.size() > before && ranges.back().end() == begin) {
          ranges.back().count += length;
        } else {
          ranges.push_back({begin, length});
        }
        word = first + length == 32 ? 0 : word & (~0U << (first + length));
      }
    }
  } catch (...) {
    ranges.resize(before);
    throw;
  }
}

void DeviceMarks::clear() {
  const std::lock_guard lock(mutex_);
  const CallScope scope(*kernels_->context());
  driver().check(
      driver().api().memset_d8_async(memory_->pointer(), 0,
                                     (num_sets_ + 1) * set_words_ * sizeof(u32), stream_->handle()),
      "cuMemsetD8Async");
  wait();
  left_over_ = false;
}

}  // namespace pipelive::cuda
