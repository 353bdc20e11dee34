#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "pipelive/cuda/slot_kernels.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/tracker/mark_source.hpp"

namespace pipelive::cuda {

class EventPool;
class PinnedBuffer;

/// Marks that append makes in GPU memory, in the launch that writes the slots. A DirtyTracker on
/// top of it hands a set of marks to each step and takes those of complete steps; see MarkSource.
///
/// Which set a step marks is a word in device memory that every append reads, so an append captured
/// in a CUDA graph marks for the step that replays it. Kernels run on a stream of the object's own;
/// a collect takes two of them and two small copies, whatever the number of slots that are marked.
///
/// Memory: for n slots and s steps (s + 5) * n / 8 bytes, and half of that of a set for ranges.
class DeviceMarks final : public MarkSource {
 public:
  static constexpr unsigned kSteps = 8;

  /// `steps` may be in flight at a time, 1 to 60. Throws Error(invalid_argument),
  /// Error(out_of_memory) or Error(device).
  DeviceMarks(std::shared_ptr<const SlotKernels> kernels, std::uint64_t num_slots,
              unsigned steps = kSteps);
  ~DeviceMarks() override;

  /// What an append that marks is given.
  struct Target {
    DevicePointer words = 0;      ///< of all sets
    std::uint64_t set_words = 0;  ///< of one
    DevicePointer set = 0;        ///< the word that says which one
    DevicePointer skipped = 0;    ///< counts slots that were out of range
    std::uint64_t num_slots = 0;
  };
  [[nodiscard]] Target target() const noexcept;
  /// How many slots an append was given so far that were not -1 and not in its layer: such slots
  /// are neither written nor marked. Waits for the appends before the last select, not for others.
  [[nodiscard]] std::uint64_t skipped_slots();

  [[nodiscard]] std::uint64_t num_slots() const noexcept override { return num_slots_; }
  [[nodiscard]] unsigned num_sets() const noexcept override { return num_sets_; }
  [[nodiscard]] std::uint64_t memory_bytes() const noexcept override { return bytes_; }
  /// Both throw Error(busy) for a stream that is being captured into a graph: begin and seal the
  /// step outside.
  void select(unsigned set, Stream stream) override;
  [[nodiscard]] std::shared_ptr<Event> record(Stream stream) override;
  std::uint64_t fold(std::span<const unsigned> sets, unsigned into) override;
  void take(std::span<const unsigned> sets, std::vector<SlotRange>& ranges) override;
  void clear() override;

 private:
  [[nodiscard]] const Driver& driver() const noexcept { return kernels_->context()->driver(); }
  [[nodiscard]] StreamHandle native(Stream stream) const noexcept;
  void read_back(DevicePointer source, std::size_t offset, std::size_t bytes);
  void wait();
  void take_dense(std::vector<SlotRange>& ranges);

  const std::shared_ptr<const SlotKernels> kernels_;
  const std::uint64_t num_slots_;
  const unsigned num_sets_;
  std::uint64_t set_words_ = 0;
  std::uint64_t most_ranges_ = 0;
  std::uint64_t bytes_ = 0;
  std::shared_ptr<EventPool> events_;
  std::unique_ptr<OwnStream> stream_;
  std::unique_ptr<DeviceBuffer> memory_;

  // Places in the memory. The taken marks are laid out as one more set.
  DevicePointer taken_ = 0;
  DevicePointer chunks_ = 0;
  DevicePointer words_ = 0;  // a few words: which set, skipped, fresh, then total and ranges
  DevicePointer total_ = 0;

  std::mutex mutex_;  // one user of the stream and of what follows
  std::unique_ptr<PinnedBuffer> pinned_;
  bool left_over_ = false;  // a take failed half-way: its marks are among the taken ones
};

}  // namespace pipelive::cuda
