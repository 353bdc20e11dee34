#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "pipelive/device/device.hpp"

namespace pipelive::bindings {

/// The stream that a Python value names: an integer handle, a torch stream (`cuda_stream`), a cupy
/// stream (`ptr`) or any object with `__cuda_stream__`. The handles 0 and 1 both are CUDA's default
/// stream; None is the device's own queue. `argument` is the parameter's name, for the messages.
/// Throws Error(invalid_argument) for anything else, and for 2: the per-thread default stream means
/// another stream to other threads of ours than to the caller.
[[nodiscard]] Stream stream_from(pybind11::handle value, const char* argument);

/// What keeps the stream of that argument existing, and may be dropped by any thread: the object
/// itself; null for None and for handles, which keep nothing. Call with the GIL held.
[[nodiscard]] std::shared_ptr<void> stream_owner(pybind11::handle value);

/// The consumer's stream of a `__dlpack__(stream=...)` for memory of a CUDA device: None is the
/// default stream; 2 that of the calling thread, to be used in this call alone; nothing for -1,
/// which asks for no ordering. Throws ValueError for 0, as the protocol wants, since it names no
/// stream for sure.
[[nodiscard]] std::optional<Stream> consumer_stream(pybind11::handle value);

}  // namespace pipelive::bindings
