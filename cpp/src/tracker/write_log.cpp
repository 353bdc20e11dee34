#include "pipelive/tracker/write_log.hpp"

#include <algorithm>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

// A run is its first slot in the high 36 bits and its length less one in the low 28.
constexpr int kLengthBits = 28;
constexpr std::uint64_t kMaxLength = std::uint64_t{1} << kLengthBits;
constexpr std::uint64_t kNoSlot = ~std::uint64_t{0};
constexpr std::size_t kLeastRuns = 1024;  // a log below this is never worth a bitmap
constexpr std::size_t kKeptRuns = 4096;   // what a cleared log may keep, 32 KiB

constexpr std::uint64_t pack(std::uint64_t begin, std::uint64_t count) {
  return (begin << kLengthBits) | (count - 1);
}
constexpr std::uint64_t begin_of(std::uint64_t run) {
  return run >> kLengthBits;
}
constexpr std::uint64_t count_of(std::uint64_t run) {
  return (run & (kMaxLength - 1)) + 1;
}

[[noreturn]] void refuse(const char* caller, const char* argument, std::size_t index,
                         const std::string& value, const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, std::string(caller) + ": " + argument + "[" +
                                               std::to_string(index) + "] is " + value +
                                               ", expected " + expected);
}

}  // namespace

WriteLog::Position WriteLog::position() const noexcept {
  return {runs_.size(), runs_.empty() ? 0 : runs_.back()};
}

void WriteLog::roll_back(const Position& position) noexcept {
  runs_.erase(runs_.begin() + static_cast<std::ptrdiff_t>(position.runs), runs_.end());
  if (!runs_.empty()) runs_.back() = position.last;
}

void WriteLog::push(std::uint64_t begin, std::uint64_t count) {
  if (!runs_.empty()) {
    const std::uint64_t last = runs_.back();
    if (begin_of(last) + count_of(last) == begin && count <= kMaxLength - count_of(last)) {
      runs_.back() = last + count;
      return;
    }
  }
  while (count > 0) {
    const std::uint64_t part = std::min(count, kMaxLength);
    runs_.push_back(pack(begin, part));
    begin += part;
    count -= part;
  }
}

void WriteLog::condense() {
  // One bit per slot is num_slots / 64 words, as much as that many runs.
  if (runs_.size() <= std::max<std::uint64_t>(kLeastRuns, num_slots_ / 64)) return;
  if (!dense_) dense_ = std::make_unique<SlotBitmap>(num_slots_);
  for (const std::uint64_t run : runs_) dense_->set(begin_of(run), count_of(run));
  runs_ = {};
}

void WriteLog::add_slots(const char* caller, std::span<const std::int64_t> slots) {
  const Position before = position();
  try {
    if (runs_.capacity() - runs_.size() < slots.size()) {
      runs_.reserve(std::max(runs_.size() + slots.size(), 2 * runs_.capacity()));
    }
    std::uint64_t next = kNoSlot;  // the slot that would lengthen the last run
    if (!runs_.empty() && count_of(runs_.back()) < kMaxLength) {
      next = begin_of(runs_.back()) + count_of(runs_.back());
    }
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const auto slot = static_cast<std::uint64_t>(slots[i]);
      if (slot >= num_slots_) {
        if (slot == kNoSlot) continue;  // -1
        refuse(caller, "slots", i, std::to_string(slots[i]),
               "-1 or 0 to " + std::to_string(num_slots_ - 1));
      }
      if (slot == next) {
        const std::uint64_t run = runs_.back() + 1;
        runs_.back() = run;
        next = count_of(run) < kMaxLength ? slot + 1 : kNoSlot;
      } else {
        runs_.push_back(pack(slot, 1));
        next = slot + 1;
      }
    }
    condense();
  } catch (...) {
    roll_back(before);
    throw;
  }
}

void WriteLog::add_ranges(const char* caller, std::span<const SlotRange> ranges) {
  const Position before = position();
  try {
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      const SlotRange range = ranges[i];
      if (range.begin > num_slots_ || range.count > num_slots_ - range.begin) {
        refuse(caller, "ranges", i,
               "(begin " + std::to_string(range.begin) + ", count " + std::to_string(range.count) +
                   ")",
               "an end of at most " + std::to_string(num_slots_));
      }
      push(range.begin, range.count);
    }
    condense();
  } catch (...) {
    roll_back(before);
    throw;
  }
}

void WriteLog::add_blocks(const char* caller, std::span<const std::int64_t> ids,
                          std::uint32_t block_size) {
  if (block_size == 0) {
    throw Error(ErrorCode::invalid_argument,
                std::string(caller) + ": block_size is 0, expected at least 1");
  }
  const std::uint64_t num_blocks = num_slots_ / block_size;
  const Position before = position();
  try {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::int64_t id = ids[i];
      if (static_cast<std::uint64_t>(id) >= num_blocks) {
        refuse(caller, "ids", i, std::to_string(id),
               "a block below " + std::to_string(num_blocks) + " (" + std::to_string(num_slots_) +
                   " slots in blocks of " + std::to_string(block_size) + ")");
      }
      push(static_cast<std::uint64_t>(id) * block_size, block_size);
    }
    condense();
  } catch (...) {
    roll_back(before);
    throw;
  }
}

std::uint64_t WriteLog::fold_into(SlotBitmap& marks) const noexcept {
  std::uint64_t fresh = dense_ ? marks.merge(*dense_) : 0;
  for (const std::uint64_t run : runs_) fresh += marks.set(begin_of(run), count_of(run));
  return fresh;
}

void WriteLog::clear() noexcept {
  dense_.reset();
  if (runs_.capacity() > kKeptRuns) {
    runs_ = {};
  } else {
    runs_.clear();
  }
}

std::uint64_t WriteLog::bytes() const noexcept {
  return runs_.capacity() * sizeof(std::uint64_t) + (dense_ ? dense_->bytes() : 0);
}

}  // namespace pipelive
