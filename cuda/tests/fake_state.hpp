#pragma once

// What the parts of the stand-in for libcuda share.

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "fake_driver.hpp"
#include "pipelive/cuda/driver_api.hpp"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace pipelive::cuda {

// The definitions must agree with the table that is checked against cuda.h.
extern "C" {
#define FAKE_DECLARE(member, symbol, parameters) Result symbol parameters;
PIPELIVE_CUDA_DRIVER_FUNCTIONS(FAKE_DECLARE)
#undef FAKE_DECLARE
}

namespace fake {

/// Physical memory. It is gone when neither a handle nor a mapping is left.
struct Allocation {
  int fd = -1;
  std::size_t bytes = 0;
  int device = 0;
  int handles = 0;
  int mappings = 0;
  bool imported = false;  ///< another process's; no memory of this one's devices
  bool exportable = false;
  ~Allocation();
};

struct Mapping {
  std::size_t bytes = 0;
  std::shared_ptr<Allocation> allocation;
  MemoryAccess access = MemoryAccess::none;
};

struct Reservation {
  std::size_t bytes = 0;
  std::map<DevicePointer, Mapping> mappings;
};

/// How much work a stream was given, and how much of it is done. Outlives the stream.
struct Progress {
  std::uint64_t given = 0;
  std::uint64_t done = 0;
};

struct FakeStream {
  enum class Kind { blocking, non_blocking, legacy };
  FakeStream(Kind its_kind, int its_device) : kind(its_kind), device(its_device) {}

  std::deque<std::function<bool()>> work;  ///< true: done; false: has to wait
  std::shared_ptr<Progress> progress = std::make_shared<Progress>();
  const Kind kind;
  const int device;
  bool held = false;
  int priority = 0;
  CaptureStatus capture = CaptureStatus::none;
  std::uint64_t capture_number = 0;  ///< of the capture under way; no two have the same
};

struct FakeEvent {
  std::uint64_t captured_in = 0;  ///< the capture that it was last recorded in; 0: none
  /// Whether the work before the last record is done. Who waits keeps the record it waits for.
  std::shared_ptr<bool> done = std::make_shared<bool>(true);
};

struct FakeDevice {
  explicit FakeDevice(int ordinal) : legacy(FakeStream::Kind::legacy, ordinal) {}

  char context_tag = 0;
  int retained = 0;
  FakeStream legacy;
  std::map<std::thread::id, FakeStream> per_thread;
};

struct FakeKernel {
  std::size_t bytes = 0;
  FakeKernelRun* run = nullptr;
};

constexpr int kFakeVersion = 12080;

struct State {
  std::recursive_mutex mutex;
  std::condition_variable_any changed;
  std::string calls;
  std::map<std::string, std::uint64_t> counts;
  struct Failure {
    std::uint64_t at = 0;  ///< number of the call
    int result = 0;
  };
  std::map<std::string, Failure> failures;
  std::string mistakes;
  int device_count = 1;
  int version = kFakeVersion;
  std::size_t total_bytes = std::size_t{4} << 30;
  std::size_t granularity = std::size_t{2} << 20;
  std::map<int, std::size_t> most_used;  ///< bytes in use at the same time so far, by device
  std::map<int, int> attributes;
  bool import_other = false;
  Result broken = kSuccess;  ///< an asynchronous failure, returned by every call from then on

  std::map<int, FakeDevice> devices;
  std::map<AllocationHandle, std::shared_ptr<Allocation>> handles;
  std::map<DevicePointer, Reservation> reservations;
  std::map<DevicePointer, std::size_t> buffers;  ///< of cuMemAlloc
  std::map<std::uintptr_t, std::size_t> pinned;
  std::set<FakeStream*> streams;
  FakeStream* newest_stream = nullptr;
  std::set<FakeEvent*> events;
  std::set<std::pair<int, int>> peers;
  int modules = 0;
  std::map<std::string, FakeKernel> kernels;
  std::uint64_t generation = 0;  ///< of reset; per-thread state of an older one is void
  std::uint64_t next_handle = 0;
  std::uint64_t captures = 0;
};

State& state();
void reset();

/// Made at first use.
FakeDevice& device(int ordinal);

/// The contexts that are current in this thread, the last one on top.
std::vector<ContextHandle>& current_contexts();
/// The device of the context on top; -1 where there is none.
int current_device();
int device_of(ContextHandle context);

/// Counts and logs a call. What it returns, unless success, is what the call has to return.
Result enter(const char* symbol);
/// As enter, but also fails where no context is current in this thread or one has failed.
Result enter_context(const char* symbol);
void mistake(const std::string& text);

/// Whether the whole range can be accessed by the device: mapped with access, or in a buffer.
bool device_memory(DevicePointer pointer, std::size_t bytes, bool write);
/// Whether the address belongs to the devices at all.
bool is_device_address(DevicePointer pointer);
std::size_t used_bytes(int device);
/// Keeps count after memory was taken.
void note_used(int device);
void release_all_memory();

FakeStream* find_stream(StreamHandle stream);
/// Does what can be done in all streams.
void pump();
/// Gives work to a stream.
Result submit(StreamHandle stream, std::function<bool()> work);

}  // namespace fake
}  // namespace pipelive::cuda
