#include "pipelive/kv/geometry.hpp"

#include <algorithm>
#include <limits>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

void check_range(const char* name, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
  if (value < least || value > most) {
    fail(std::string(name) + " is " + std::to_string(value) + ", expected " +
         std::to_string(least) + " to " + std::to_string(most));
  }
}

}  // namespace

void Geometry::validate() const {
  check_range("block_bytes", block_bytes, 1, std::uint64_t{1} << 32);
  check_range("num_layers", num_layers, 1, 65536);
  check_range("stack", stack, 1, num_layers);
  check_range("max_blocks", max_blocks, 1, std::uint64_t{1} << 31);
  check_range("page_bytes", page_bytes, 1, std::uint64_t{1} << 40);
  // Addresses of a process: 47 bits; all products below stay far from overflow.
  const std::uint64_t per_block = static_cast<std::uint64_t>(block_bytes) * num_layers;
  if (per_block > (std::uint64_t{1} << 46) / max_blocks) {
    fail("max_blocks is " + std::to_string(max_blocks) + ": with " + std::to_string(per_block) +
         " bytes per block id over all layers this passes the address space of 64 TiB");
  }
}

std::uint32_t Geometry::layers_in(std::uint32_t stack_index) const noexcept {
  return std::min(stack, num_layers - stack_index * stack);
}

std::size_t Geometry::pages_for(std::uint32_t stack_index, std::uint64_t capacity) const {
  return (capacity * stride(stack_index) + page_bytes - 1) / page_bytes;
}

std::vector<std::uint32_t> Geometry::stacks_of(std::span<const std::uint32_t> layers,
                                               const char* argument, bool whole) const {
  std::vector<std::uint32_t> sorted(layers.begin(), layers.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<std::uint32_t> stacks;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    if (sorted[i] >= num_layers) {
      fail(std::string(argument) + ": layer " + std::to_string(sorted[i]) +
           " is not in the model, which has layers 0 to " + std::to_string(num_layers - 1));
    }
    if (i > 0 && sorted[i] == sorted[i - 1]) {
      fail(std::string(argument) + ": layer " + std::to_string(sorted[i]) + " is named twice");
    }
    const std::uint32_t index = stack_of(sorted[i]);
    if (stacks.empty() || stacks.back() != index) stacks.push_back(index);
  }
  if (!whole) return stacks;
  for (const std::uint32_t index : stacks) {
    const std::uint32_t first = first_layer(index);
    const std::uint32_t end = first + layers_in(index);
    for (std::uint32_t layer = first; layer < end; ++layer) {
      if (!std::binary_search(sorted.begin(), sorted.end(), layer)) {
        fail(std::string(argument) + ": layer " + std::to_string(layer) + " is missing; stack " +
             std::to_string(index) + " holds layers " + std::to_string(first) + " to " +
             std::to_string(end - 1) + " and moves whole");
      }
    }
  }
  return stacks;
}

std::uint64_t Geometry::bytes_needed(std::span<const std::uint32_t> stacks,
                                     std::uint64_t capacity) const {
  std::uint64_t pages = extra_pages;
  for (const std::uint32_t index : stacks) pages += pages_for(index, capacity);
  return pages * page_bytes;
}

std::uint64_t Geometry::blocks_that_fit(std::span<const std::uint32_t> stacks,
                                        std::uint64_t budget_bytes) const {
  std::uint64_t fits = 0;
  std::uint64_t too_many = max_blocks + 1;
  if (bytes_needed(stacks, 0) > budget_bytes) return 0;
  while (too_many - fits > 1) {
    const std::uint64_t middle = fits + (too_many - fits) / 2;
    (bytes_needed(stacks, middle) <= budget_bytes ? fits : too_many) = middle;
  }
  return fits;
}

std::string list_some(std::span<const std::uint64_t> numbers, std::size_t most) {
  std::string text;
  for (std::size_t i = 0; i < std::min(most, numbers.size()); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(numbers[i]);
  }
  if (numbers.size() > most) text += " and " + std::to_string(numbers.size() - most) + " more";
  return text;
}

}  // namespace pipelive
