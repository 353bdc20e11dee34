#include "pipelive/tracker/slot_ranges.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

std::string describe(std::size_t index, const SlotRange& range) {
  return std::string("[") + std::to_string(index) + "] is (begin " + std::to_string(range.begin) +
         ", count " + std::to_string(range.count) + ")";
}

void require_block_size(const char* function, std::uint32_t block_size) {
  if (block_size == 0) refuse(std::string(function) + ": block_size is 0, expected at least 1");
}

void require_normal(const char* argument, std::span<const SlotRange> ranges) {
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].count == 0 || ranges[i].count > kMost - ranges[i].begin) {
      refuse(argument + describe(i, ranges[i]) +
             ", expected a range that is neither empty nor wraps");
    }
    if (i > 0 && ranges[i].begin <= ranges[i - 1].end()) {
      refuse(argument + describe(i, ranges[i]) + ", expected a begin past " +
             std::to_string(ranges[i - 1].end()) + ", the end of the range before it");
    }
  }
}

}  // namespace

std::vector<SlotRange> merge_ranges(std::span<const SlotRange> ranges) {
  std::vector<SlotRange> sorted;
  sorted.reserve(ranges.size());
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].count > kMost - ranges[i].begin) {
      refuse("merge_ranges: ranges" + describe(i, ranges[i]) + ", expected an end below 2^64");
    }
    if (ranges[i].count > 0) sorted.push_back(ranges[i]);
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const SlotRange& a, const SlotRange& b) { return a.begin < b.begin; });
  std::size_t kept = 0;
  for (const SlotRange& range : sorted) {
    if (kept > 0 && range.begin <= sorted[kept - 1].end()) {
      SlotRange& last = sorted[kept - 1];
      last.count = std::max(last.end(), range.end()) - last.begin;
    } else {
      sorted[kept++] = range;
    }
  }
  sorted.resize(kept);
  return sorted;
}

std::vector<SlotRange> ranges_of_blocks(std::span<const std::int64_t> ids,
                                        std::uint32_t block_size) {
  require_block_size("ranges_of_blocks", block_size);
  const auto most = static_cast<std::int64_t>(
      std::min<std::uint64_t>(kMost / block_size - 1, std::numeric_limits<std::int64_t>::max()));
  std::vector<SlotRange> ranges;
  ranges.reserve(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] > most) {
      refuse("ranges_of_blocks: ids[" + std::to_string(i) + "] is " + std::to_string(ids[i]) +
             ", expected 0 to " + std::to_string(most));
    }
    ranges.push_back({static_cast<std::uint64_t>(ids[i]) * block_size, block_size});
  }
  return merge_ranges(ranges);
}

std::vector<SlotRange> intersect_ranges(std::span<const SlotRange> a,
                                        std::span<const SlotRange> b) {
  require_normal("intersect_ranges: a", a);
  require_normal("intersect_ranges: b", b);
  std::vector<SlotRange> both;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const std::uint64_t begin = std::max(a[i].begin, b[j].begin);
    const std::uint64_t end = std::min(a[i].end(), b[j].end());
    if (begin < end) both.push_back({begin, end - begin});
    if (a[i].end() < b[j].end()) {
      ++i;
    } else {
      ++j;
    }
  }
  return both;
}

std::vector<std::int64_t> blocks_touched(std::span<const SlotRange> ranges,
                                         std::uint32_t block_size) {
  require_block_size("blocks_touched", block_size);
  require_normal("blocks_touched: ranges", ranges);
  std::vector<std::int64_t> ids;
  std::uint64_t next = 0;  // the first block not yet listed
  for (const SlotRange& range : ranges) {
    const std::uint64_t end = (range.end() - 1) / block_size + 1;
    for (std::uint64_t id = std::max(next, range.begin / block_size); id < end; ++id) {
      ids.push_back(static_cast<std::int64_t>(id));
    }
    next = end;
  }
  return ids;
}

std::uint64_t count_slots(std::span<const SlotRange> ranges) noexcept {
  std::uint64_t slots = 0;
  for (const SlotRange& range : ranges) slots += range.count;
  return slots;
}

}  // namespace pipelive
