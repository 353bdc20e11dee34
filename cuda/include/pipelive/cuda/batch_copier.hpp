#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/kernels.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// Makes many copies within a device's memory by few calls of the driver, each of which costs the
/// host microseconds: short ones by one launch of a kernel over a table of them. Thread-safe.
///
/// The table is written in pinned memory and lies in device memory while the kernel runs: 24 bytes
/// for each copy of up to 64 KiB, twice. Both are kept for the next call.
class BatchCopier {
 public:
  BatchCopier(std::shared_ptr<const PrimaryContext> context, std::shared_ptr<EventPool> events,
              Kernels::ImageSource images);
  ~BatchCopier();
  BatchCopier(const BatchCopier&) = delete;
  BatchCopier& operator=(const BatchCopier&) = delete;

  /// The context must be current. Copies that are long, few or of odd addresses are given to the
  /// driver one by one, and so are all where there is no code of the kernel for the device. Throws
  /// Error(device) or Error(out_of_memory).
  void copy(std::span<const CopyJob> jobs, StreamHandle stream);
  /// Loads the kernel, or finds that there is none. The context must be current.
  void prepare();

 private:
  struct Table;

  [[nodiscard]] FunctionHandle kernel();
  [[nodiscard]] std::unique_ptr<Table> take_table(std::size_t bytes);
  void launch(std::span<const CopyJob* const> jobs, std::size_t entries, StreamHandle stream);

  const std::shared_ptr<const PrimaryContext> context_;
  const std::shared_ptr<EventPool> events_;
  const Kernels::ImageSource images_;

  std::mutex mutex_;
  // Of this object alone: unlike those that steps launch, it need not outlive the device.
  std::unique_ptr<Kernels> kernels_;
  FunctionHandle kernel_ = nullptr;
  bool looked_for_ = false;
  std::vector<std::unique_ptr<Table>> tables_;
};

}  // namespace pipelive::cuda
