#pragma once

#include <cstddef>
#include <cstdint>

// A stand-in for libcuda, opened by dlopen as the real one is. Device memory is host memory,
// virtual memory management is memfd and mmap, streams are queues. It checks what the real driver
// checks and what it leaves to chance: arguments, alignment, the order of calls, that a context is
// current in the calling thread, that work in a stream finds its memory mapped when it runs. New
// memory is filled with kFakePoison.
//
// Work given to a stream is done at once, unless the stream is held or waits for an event, or for
// the legacy default stream: that one and the blocking streams come after one another, as in CUDA.
// The per-thread default stream is another one in every thread. What would break a capture breaks
// it here, and counts as a mistake.
//
// What it offers besides the driver's own entry points; tests find these by dlsym.
extern "C" {

/// Forgets calls, failures, holds, contexts and whatever memory was left.
using FakeDriverReset = void();
/// The calls since the reset, each followed by a newline, without the suffix of a version and
/// without those for versions, attributes and errors.
using FakeDriverCalls = const char*();
/// How often `symbol` was called since the reset.
using FakeDriverCount = std::uint64_t(const char* symbol);
/// Makes the next call of `symbol` return `result`.
using FakeDriverFail = void(const char* symbol, int result);
/// Makes the `nth` call of `symbol` from now on (1: the next) return `result`; 0 disarms.
using FakeDriverFailNth = void(const char* symbol, std::uint64_t nth, int result);
/// How many contexts, modules, buffers, allocations, reservations, streams and events are held;
/// memory that a process imported counts as held by it.
using FakeDriverHeld = int();
/// How many devices there are; 1 after a reset.
using FakeDriverDevices = void(int count);
/// What cuDriverGetVersion gives; 12080 after a reset.
using FakeDriverVersion = void(int version);
/// Bytes of each device; 4 GiB after a reset.
using FakeDriverMemory = void(std::uint64_t bytes);
/// The fewest bytes of a device that have been free at any time since the reset.
using FakeDriverLowestFree = std::uint64_t(int device);
/// The granularity of allocations; 2 MiB after a reset.
using FakeDriverGranularity = void(std::uint64_t bytes);
/// A device attribute's value from now on, for every device.
using FakeDriverAttribute = void(int attribute, int value);
/// Starts or ends holding work back: of one stream (1: the legacy default stream), or of all that
/// are there for a null handle.
using FakeDriverHold = void(void* stream, int held);
/// How many streams of a priority there are: 0 is normal, -5 the most urgent.
using FakeDriverStreams = int(int priority);
/// Whether the stream (null: any of them) has work that is not done.
using FakeDriverPending = int(void* stream);
/// Gives a stream work that is done once `work` returns something else than 0; it is asked again
/// whenever a stream is.
using FakeDriverSubmit = int(void* stream, int (*work)(void*), void* data);
/// The stream that was made last.
using FakeDriverNewestStream = void*();
/// Starts or ends the capture of a graph.
using FakeDriverCapture = void(void* stream, int on);
/// Whether the stream is being captured and nothing has broken the capture.
using FakeDriverCaptures = int(void* stream);
/// A stream of device 0 as another library would make it, non-blocking; there until a reset.
using FakeDriverNewStream = std::uint64_t();
/// What is imported from now on is mapped, and holds other bytes than the exporter's, as where
/// PCIe's addresses are translated on the way.
using FakeDriverImportOther = void(int on);
/// What stands in for a kernel: called when the stream comes to it, with the one parameter.
using FakeKernelRun = void(const char* name, unsigned grid, unsigned block, const void* parameter);
/// From now on, also after a reset, every module has a kernel of that name, whose one parameter has
/// `bytes` bytes. A null `run` takes it away.
using FakeDriverKernel = void(const char* name, std::size_t bytes, FakeKernelRun* run);
/// Gives every module the kernels that work on slots, run on the CPU.
using FakeDriverSlotKernels = void();
/// What is wrong with the calls so far that the real driver might let pass; empty if nothing is.
using FakeDriverMistakes = const char*();

}  // extern "C"

inline constexpr unsigned char kFakePoison = 0xA5;
