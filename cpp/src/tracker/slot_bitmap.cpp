#include "pipelive/tracker/slot_bitmap.hpp"

#include <algorithm>

namespace pipelive {
namespace {

constexpr std::uint64_t kAll = ~std::uint64_t{0};

std::uint64_t words_for(std::uint64_t bits) {
  return bits / 64 + (bits % 64 != 0 ? 1 : 0);
}

/// Sets the bits [begin, end) of `words`, at least one; returns how many were zero.
std::uint64_t set_bits(std::uint64_t* words, std::uint64_t begin, std::uint64_t end) noexcept {
  std::uint64_t fresh = 0;
  const auto set_masked = [&](std::uint64_t index, std::uint64_t mask) {
    fresh += static_cast<std::uint64_t>(std::popcount(mask & ~words[index]));
    words[index] |= mask;
  };
  const std::uint64_t first = begin / 64;
  const std::uint64_t last = (end - 1) / 64;
  const std::uint64_t first_mask = kAll << (begin % 64);
  const std::uint64_t last_mask = kAll >> (63 - (end - 1) % 64);
  if (first == last) {
    set_masked(first, first_mask & last_mask);
  } else {
    set_masked(first, first_mask);
    for (std::uint64_t index = first + 1; index < last; ++index) set_masked(index, kAll);
    set_masked(last, last_mask);
  }
  return fresh;
}

}  // namespace

SlotBitmap::SlotBitmap(std::uint64_t num_slots)
    : words_(words_for(num_slots)), summary_(words_for(words_.size())) {}

std::uint64_t SlotBitmap::set_range(std::uint64_t begin, std::uint64_t end) noexcept {
  set_bits(summary_.data(), begin / 64, (end - 1) / 64 + 1);
  return set_bits(words_.data(), begin, end);
}

std::uint64_t SlotBitmap::merge(const SlotBitmap& other) noexcept {
  std::uint64_t fresh = 0;
  other.for_each_word([&](std::uint64_t index) {
    fresh += static_cast<std::uint64_t>(std::popcount(other.words_[index] & ~words_[index]));
    words_[index] |= other.words_[index];
  });
  for (std::uint64_t group = 0; group < summary_.size(); ++group) {
    summary_[group] |= other.summary_[group];
  }
  return fresh;
}

std::uint64_t SlotBitmap::count_ranges() const noexcept {
  std::uint64_t ranges = 0;
  for_each_word([&](std::uint64_t index) {
    const std::uint64_t word = words_[index];
    const std::uint64_t carry = index > 0 ? words_[index - 1] >> 63 : 0;
    ranges += static_cast<std::uint64_t>(std::popcount(word & ~((word << 1) | carry)));
  });
  return ranges;
}

void SlotBitmap::drain(std::vector<SlotRange>& ranges) {
  ranges.reserve(ranges.size() + count_ranges());
  std::uint64_t begin = 0;  // the range being built is [begin, end); empty at first
  std::uint64_t end = 0;
  for_each_word([&](std::uint64_t index) {
    const std::uint64_t base = index * 64;
    std::uint64_t word = words_[index];
    words_[index] = 0;
    if (word == kAll && base == end && begin != end) {
      end = base + 64;
      return;
    }
    while (word != 0) {
      const auto first = static_cast<std::uint64_t>(std::countr_zero(word));
      const auto length = static_cast<std::uint64_t>(std::countr_one(word >> first));
      if (base + first != end || begin == end) {
        if (begin != end) ranges.push_back({begin, end - begin});
        begin = base + first;
      }
      end = base + first + length;
      word = first + length == 64 ? 0 : word & (kAll << (first + length));
    }
  });
  if (begin != end) ranges.push_back({begin, end - begin});
  std::fill(summary_.begin(), summary_.end(), 0);
}

void SlotBitmap::clear() noexcept {
  std::fill(words_.begin(), words_.end(), 0);
  std::fill(summary_.begin(), summary_.end(), 0);
}

}  // namespace pipelive
