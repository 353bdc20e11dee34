// The stand-in for libcuda: streams, events and copies.
#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "fake_driver.hpp"
#include "fake_state.hpp"

namespace pipelive::cuda {
namespace fake {

FakeStream* find_stream(StreamHandle stream) {
  const auto number = reinterpret_cast<std::uintptr_t>(stream);
  if (number <= kPerThreadStream) {
    const int ordinal = std::max(current_device(), 0);
    FakeDevice& owner = device(ordinal);
    if (number <= kLegacyStream) return &owner.legacy;
    return &owner.per_thread
                .try_emplace(std::this_thread::get_id(), FakeStream::Kind::blocking, ordinal)
                .first->second;
  }
  auto* found = reinterpret_cast<FakeStream*>(stream);
  return state().streams.contains(found) ? found : nullptr;
}

namespace {

template <typename Action>
void each_stream(Action&& action) {
  for (FakeStream* stream : state().streams) action(*stream);
  for (auto& [ordinal, device] : state().devices) {
    action(device.legacy);
    for (auto& [thread, stream] : device.per_thread) action(stream);
  }
}

/// Work that is given to the legacy default stream would come between that of blocking streams: the
/// call is refused while one of them is captured, and the capture fails.
Result enter_legacy(int device) {
  Result result = kSuccess;
  each_stream([&](FakeStream& stream) {
    if (stream.kind != FakeStream::Kind::blocking || stream.device != device ||
        stream.capture == CaptureStatus::none) {
      return;
    }
    stream.capture = CaptureStatus::invalidated;
    mistake("work for the default stream broke the capture of another one");
    result = kStreamCaptureImplicit;
  });
  return result;
}

/// The legacy default stream comes after what all blocking streams have been given so far, and they
/// after what it has.
std::function<bool()> behind_others(const FakeStream& stream, std::function<bool()> work) {
  std::vector<std::pair<std::shared_ptr<Progress>, std::uint64_t>> others;
  each_stream([&](const FakeStream& other) {
    const bool legacy = stream.kind == FakeStream::Kind::legacy;
    const auto wanted = legacy ? FakeStream::Kind::blocking : FakeStream::Kind::legacy;
    if (stream.kind == FakeStream::Kind::non_blocking || other.kind != wanted ||
        other.device != stream.device || other.progress->done == other.progress->given) {
      return;
    }
    others.emplace_back(other.progress, other.progress->given);
  });
  if (others.empty()) return work;
  return [others, work = std::move(work)] {
    const bool over = std::all_of(others.begin(), others.end(), [](const auto& other) {
      return other.first->done >= other.second;
    });
    return over && work();
  };
}

bool advance(FakeStream& stream) {
  bool any = false;
  while (!stream.held && !stream.work.empty() && stream.work.front()()) {
    stream.work.pop_front();
    ++stream.progress->done;
    any = true;
  }
  return any;
}

}  // namespace

void pump() {
  bool any = true;
  while (any) {
    any = false;
    each_stream([&any](FakeStream& stream) { any = advance(stream) || any; });
  }
  state().changed.notify_all();
}

Result submit(StreamHandle handle, std::function<bool()> work) {
  FakeStream* stream = find_stream(handle);
  if (stream == nullptr) {
    mistake("work for a stream that does not exist");
    return 400;  // CUDA_ERROR_INVALID_HANDLE
  }
  if (stream->capture == CaptureStatus::invalidated) return kStreamCaptureInvalidated;
  if (stream->capture == CaptureStatus::active) return kSuccess;  // goes into the graph
  if (stream->kind == FakeStream::Kind::legacy) {
    if (const Result result = enter_legacy(stream->device)) return result;
  }
  stream->work.push_back(behind_others(*stream, std::move(work)));
  ++stream->progress->given;
  pump();
  return kSuccess;
}

namespace {

// Checked again when the work is done: memory that was unmapped meanwhile is a fault.
bool accessible(DevicePointer pointer, std::size_t bytes, bool write) {
  return !is_device_address(pointer) || device_memory(pointer, bytes, write);
}

Result copy(const char* symbol, DevicePointer target, DevicePointer source, std::size_t bytes,
            StreamHandle stream) {
  if (const Result result = enter_context(symbol)) return result;
  if (!accessible(target, bytes, true) || !accessible(source, bytes, false)) return kInvalidValue;
  return submit(stream, [target, source, bytes] {
    if (!accessible(target, bytes, true) || !accessible(source, bytes, false)) {
      mistake("a copy ran after its memory had been unmapped");
      state().broken = kIllegalAddress;
      return true;
    }
    std::memmove(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
    return true;
  });
}

template <typename Unit>
Result set(const char* symbol, DevicePointer target, Unit value, std::size_t count,
           StreamHandle stream) {
  if (const Result result = enter_context(symbol)) return result;
  const std::size_t bytes = count * sizeof(Unit);
  if (!device_memory(target, bytes, true) || target % sizeof(Unit) != 0) return kInvalidValue;
  return submit(stream, [target, value, count, bytes] {
    if (!device_memory(target, bytes, true)) {
      mistake("a fill ran after its memory had been unmapped");
      state().broken = kIllegalAddress;
      return true;
    }
    auto* values = reinterpret_cast<Unit*>(target);
    for (std::size_t i = 0; i < count; ++i) values[i] = value;
    return true;
  });
}

DevicePointer number(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

}  // namespace
}  // namespace fake

using fake::enter;
using fake::enter_context;
using fake::FakeEvent;
using fake::FakeStream;
using fake::state;
using Lock = std::lock_guard<std::recursive_mutex>;
constexpr Result kInvalidHandle = 400;

FAKE_EXPORT void fake_driver_hold(void* stream, int held) {
  const Lock lock(state().mutex);
  if (stream != nullptr) {
    fake::find_stream(static_cast<StreamHandle>(stream))->held = held != 0;
  } else {
    fake::each_stream([held](FakeStream& each) { each.held = held != 0; });
  }
  fake::pump();
}
FAKE_EXPORT int fake_driver_pending(void* stream) {
  const Lock lock(state().mutex);
  if (stream != nullptr) {
    return fake::find_stream(static_cast<StreamHandle>(stream))->work.empty() ? 0 : 1;
  }
  bool any = false;
  fake::each_stream([&any](const FakeStream& each) { any = any || !each.work.empty(); });
  return any ? 1 : 0;
}
FAKE_EXPORT int fake_driver_submit(void* stream, int (*work)(void*), void* data) {
  const Lock lock(state().mutex);
  return fake::submit(static_cast<StreamHandle>(stream), [work, data] { return work(data) != 0; });
}
FAKE_EXPORT void* fake_driver_newest_stream() {
  const Lock lock(state().mutex);
  return state().newest_stream;
}
FAKE_EXPORT int fake_driver_streams(int priority) {
  const Lock lock(state().mutex);
  return static_cast<int>(
      std::ranges::count(state().streams, priority, [](FakeStream* s) { return s->priority; }));
}
FAKE_EXPORT void fake_driver_capture(void* stream, int on) {
  const Lock lock(state().mutex);
  FakeStream* const found = fake::find_stream(static_cast<StreamHandle>(stream));
  found->capture = on != 0 ? CaptureStatus::active : CaptureStatus::none;
  found->capture_number = ++state().captures;
}

FAKE_EXPORT std::uint64_t fake_driver_new_stream() {
  const Lock lock(state().mutex);
  auto* made = new FakeStream(FakeStream::Kind::non_blocking, 0);
  state().streams.insert(made);
  return reinterpret_cast<std::uintptr_t>(made);
}
FAKE_EXPORT int fake_driver_captures(void* stream) {
  const Lock lock(state().mutex);
  const FakeStream* const found = fake::find_stream(static_cast<StreamHandle>(stream));
  return found->capture == CaptureStatus::active ? 1 : 0;
}

FAKE_EXPORT Result cuStreamCreateWithPriority(StreamHandle* stream, unsigned flags, int priority) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamCreateWithPriority")) return result;
  if (flags > kStreamNonBlocking || priority > 0 || priority < -5) return kInvalidValue;
  auto* made = new FakeStream(
      flags == kStreamNonBlocking ? FakeStream::Kind::non_blocking : FakeStream::Kind::blocking,
      fake::current_device());
  made->priority = priority;
  state().streams.insert(made);
  state().newest_stream = made;
  *stream = reinterpret_cast<StreamHandle>(made);
  return kSuccess;
}

FAKE_EXPORT Result cuStreamDestroy_v2(StreamHandle stream) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamDestroy")) return result;
  auto* found = reinterpret_cast<FakeStream*>(stream);
  if (!state().streams.contains(found)) {
    fake::mistake("cuStreamDestroy of a stream that does not exist");
    return kInvalidHandle;
  }
  found->held = false;
  fake::pump();
  found->progress->done = found->progress->given;
  state().streams.erase(found);
  delete found;
  return kSuccess;
}

FAKE_EXPORT Result cuStreamQuery(StreamHandle stream) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamQuery")) return result;
  const FakeStream* found = fake::find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  return found->work.empty() ? kSuccess : kNotReady;
}

FAKE_EXPORT Result cuStreamSynchronize(StreamHandle stream) {
  std::unique_lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamSynchronize")) return result;
  const FakeStream* found = fake::find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  state().changed.wait(lock, [found] { return found->work.empty(); });
  return state().broken;
}

FAKE_EXPORT Result cuCtxSynchronize() {
  std::unique_lock lock(state().mutex);
  if (const Result result = enter_context("cuCtxSynchronize")) return result;
  state().changed.wait(lock, [] { return fake_driver_pending(nullptr) == 0; });
  return state().broken;
}

FAKE_EXPORT Result cuStreamWaitEvent(StreamHandle stream, EventHandle event, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamWaitEvent")) return result;
  auto* found = reinterpret_cast<FakeEvent*>(event);
  if (flags != 0) return kInvalidValue;
  if (!state().events.contains(found)) {
    fake::mistake("cuStreamWaitEvent for an event that does not exist");
    return kInvalidHandle;
  }
  FakeStream* waiting = fake::find_stream(stream);
  if (waiting != nullptr && waiting->capture == CaptureStatus::active) {
    if (found->captured_in == waiting->capture_number) return kSuccess;
    waiting->capture = CaptureStatus::invalidated;
    fake::mistake("a captured stream was to wait for an event from outside of its capture");
    return kStreamCaptureIsolation;
  }
  // The real one lets the stream join a capture that is still under way, which nobody here wants.
  if (found->captured_in != 0) return kCapturedEvent;
  return fake::submit(stream, [done = found->done] { return *done; });
}

FAKE_EXPORT Result cuStreamIsCapturing(StreamHandle stream, CaptureStatus* status) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamIsCapturing")) return result;
  const FakeStream* found = fake::find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  if (found->kind == FakeStream::Kind::legacy) {
    bool captured = false;
    fake::each_stream([&](const FakeStream& each) {
      captured = captured || (each.kind == FakeStream::Kind::blocking &&
                              each.device == found->device && each.capture != CaptureStatus::none);
    });
    if (captured) return kStreamCaptureImplicit;  // this call harms no capture
  }
  *status = found->capture;
  return kSuccess;
}

FAKE_EXPORT Result cuStreamGetCtx(StreamHandle /*stream*/, ContextHandle* context) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuStreamGetCtx")) return result;
  *context = fake::current_contexts().back();
  return kSuccess;
}

FAKE_EXPORT Result cuThreadExchangeStreamCaptureMode(CaptureMode* mode) {
  thread_local CaptureMode own = CaptureMode::global;
  std::swap(own, *mode);
  return kSuccess;
}

FAKE_EXPORT Result cuEventCreate(EventHandle* event, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuEventCreate")) return result;
  if (flags > 7) return kInvalidValue;
  auto* made = new FakeEvent();
  state().events.insert(made);
  *event = reinterpret_cast<EventHandle>(made);
  return kSuccess;
}

FAKE_EXPORT Result cuEventDestroy_v2(EventHandle event) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuEventDestroy")) return result;
  auto* found = reinterpret_cast<FakeEvent*>(event);
  if (state().events.erase(found) == 0) {
    fake::mistake("cuEventDestroy of an event that does not exist");
    return kInvalidHandle;
  }
  delete found;
  fake::pump();
  return kSuccess;
}

FAKE_EXPORT Result cuEventRecord(EventHandle event, StreamHandle stream) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuEventRecord")) return result;
  auto* found = reinterpret_cast<FakeEvent*>(event);
  if (!state().events.contains(found)) {
    fake::mistake("cuEventRecord of an event that does not exist");
    return kInvalidHandle;
  }
  const FakeStream* recording = fake::find_stream(stream);
  const bool captured = recording != nullptr && recording->capture == CaptureStatus::active;
  found->captured_in = captured ? recording->capture_number : 0;
  found->done = std::make_shared<bool>(false);
  return fake::submit(stream, [done = found->done] {
    *done = true;
    return true;
  });
}

FAKE_EXPORT Result cuEventQuery(EventHandle event) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuEventQuery")) return result;
  fake::pump();  // work that waits for another process is asked again
  auto* found = reinterpret_cast<FakeEvent*>(event);
  if (!state().events.contains(found)) {
    fake::mistake("cuEventQuery of an event that does not exist");
    return kInvalidHandle;
  }
  if (found->captured_in != 0) return kCapturedEvent;
  return *found->done ? kSuccess : kNotReady;
}

FAKE_EXPORT Result cuEventSynchronize(EventHandle event) {
  std::unique_lock lock(state().mutex);
  if (const Result result = enter_context("cuEventSynchronize")) return result;
  auto* found = reinterpret_cast<FakeEvent*>(event);
  if (!state().events.contains(found)) return kInvalidHandle;
  if (found->captured_in != 0) return kCapturedEvent;
  state().changed.wait(lock, [done = found->done] { return *done; });
  return state().broken;
}

FAKE_EXPORT Result cuEventElapsedTime(float* milliseconds, EventHandle /*begin*/,
                                      EventHandle /*end*/) {
  *milliseconds = 1.0F;
  return kSuccess;
}

FAKE_EXPORT Result cuLaunchHostFunc(StreamHandle stream, HostFunction function, void* user_data) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuLaunchHostFunc")) return result;
  return fake::submit(stream, [function, user_data] {
    function(user_data);
    return true;
  });
}

namespace {

// A copy that the host waits for is work of the legacy default stream.
Result copy_now(std::unique_lock<std::recursive_mutex>& lock, void* target, const void* source,
                std::size_t bytes) {
  const auto done = std::make_shared<bool>(false);
  const auto legacy = reinterpret_cast<StreamHandle>(kLegacyStream);
  const Result result = fake::submit(legacy, [=] {
    std::memcpy(target, source, bytes);
    return *done = true;
  });
  if (result != kSuccess) return result;
  state().changed.wait(lock, [&done] { return *done; });
  return kSuccess;
}

}  // namespace

FAKE_EXPORT Result cuMemcpyHtoD_v2(DevicePointer target, const void* source, std::size_t bytes) {
  std::unique_lock lock(state().mutex);
  if (const Result result = enter_context("cuMemcpyHtoD")) return result;
  if (!fake::device_memory(target, bytes, true)) return kInvalidValue;
  return copy_now(lock, reinterpret_cast<void*>(target), source, bytes);
}

FAKE_EXPORT Result cuMemcpyDtoH_v2(void* target, DevicePointer source, std::size_t bytes) {
  std::unique_lock lock(state().mutex);
  if (const Result result = enter_context("cuMemcpyDtoH")) return result;
  if (!fake::device_memory(source, bytes, false)) return kInvalidValue;
  return copy_now(lock, target, reinterpret_cast<const void*>(source), bytes);
}

FAKE_EXPORT Result cuMemcpyHtoDAsync_v2(DevicePointer target, const void* source, std::size_t bytes,
                                        StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::copy("cuMemcpyHtoDAsync", target, fake::number(source), bytes, stream);
}

FAKE_EXPORT Result cuMemcpyDtoHAsync_v2(void* target, DevicePointer source, std::size_t bytes,
                                        StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::copy("cuMemcpyDtoHAsync", fake::number(target), source, bytes, stream);
}

FAKE_EXPORT Result cuMemcpyDtoDAsync_v2(DevicePointer target, DevicePointer source,
                                        std::size_t bytes, StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::copy("cuMemcpyDtoDAsync", target, source, bytes, stream);
}

FAKE_EXPORT Result cuMemcpyAsync(DevicePointer target, DevicePointer source, std::size_t bytes,
                                 StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::copy("cuMemcpyAsync", target, source, bytes, stream);
}

FAKE_EXPORT Result cuMemcpyPeerAsync(DevicePointer target, ContextHandle target_context,
                                     DevicePointer source, ContextHandle source_context,
                                     std::size_t bytes, StreamHandle stream) {
  const Lock lock(state().mutex);
  if (fake::device_of(target_context) < 0 || fake::device_of(source_context) < 0) {
    return kInvalidContext;
  }
  return fake::copy("cuMemcpyPeerAsync", target, source, bytes, stream);
}

FAKE_EXPORT Result cuMemcpy2DAsync_v2(const Copy2D* all, StreamHandle stream) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemcpy2DAsync")) return result;
  const Copy2D c = *all;
  if ((c.height > 1 && (c.source_pitch < c.width_bytes || c.target_pitch < c.width_bytes)) ||
      c.source_array != nullptr || c.target_array != nullptr) {
    return kInvalidValue;
  }
  const DevicePointer source =
      (c.source_type == kMemoryTypeHost ? fake::number(c.source_host) : c.source_device) +
      c.source_y * c.source_pitch + c.source_x_bytes;
  const DevicePointer target =
      (c.target_type == kMemoryTypeHost ? fake::number(c.target_host) : c.target_device) +
      c.target_y * c.target_pitch + c.target_x_bytes;
  return fake::submit(stream, [c, source, target] {
    for (std::size_t row = 0; row < c.height; ++row) {
      const DevicePointer from = source + row * c.source_pitch;
      const DevicePointer to = target + row * c.target_pitch;
      if (!fake::accessible(to, c.width_bytes, true) ||
          !fake::accessible(from, c.width_bytes, false)) {
        state().broken = kIllegalAddress;
        return true;
      }
      std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), c.width_bytes);
    }
    return true;
  });
}

FAKE_EXPORT Result cuMemsetD8Async(DevicePointer target, unsigned char value, std::size_t count,
                                   StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::set("cuMemsetD8Async", target, value, count, stream);
}

FAKE_EXPORT Result cuMemsetD32Async(DevicePointer target, unsigned value, std::size_t count,
                                    StreamHandle stream) {
  const Lock lock(state().mutex);
  return fake::set("cuMemsetD32Async", target, value, count, stream);
}

}  // namespace pipelive::cuda
