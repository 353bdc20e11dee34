#include "stream_arg.hpp"

#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/stream.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

Stream from_handle(std::uintptr_t handle) {
  if (handle <= cuda::kLegacyStream) return cuda::kDefaultStream;
  return {reinterpret_cast<void*>(handle)};
}

}  // namespace

Stream stream_from(py::handle value, const char* argument) {
  if (value.is_none()) return {};
  const auto named = [argument](std::uintptr_t handle) {
    if (handle == cuda::kPerThreadStream) {
      // It may be asked about, or given work, by another thread than the one that named it.
      throw Error(ErrorCode::invalid_argument,
                  std::string(argument) +
                      " is 2, CUDA's per-thread default stream, which is another one in every "
                      "thread; expected a stream of its own, or 1 for the default stream");
    }
    return from_handle(handle);
  };
  try {
    if (py::isinstance<py::int_>(value)) return named(value.cast<std::uintptr_t>());
    if (py::hasattr(value, "cuda_stream")) {
      return named(value.attr("cuda_stream").cast<std::uintptr_t>());
    }
    if (py::hasattr(value, "__cuda_stream__")) {
      const auto pair = value.attr("__cuda_stream__")();
      return named(pair.cast<std::pair<int, std::uintptr_t>>().second);
    }
    if (py::hasattr(value, "ptr")) return named(value.attr("ptr").cast<std::uintptr_t>());
  } catch (const py::cast_error&) {
    // Below.
  }
  throw Error(ErrorCode::invalid_argument,
              std::string(argument) + " is " + py::repr(value).cast<std::string>() +
                  ", expected a CUDA stream of torch or cupy, or its handle");
}

std::shared_ptr<void> stream_owner(py::handle value) {
  if (value.is_none() || py::isinstance<py::int_>(value)) return nullptr;
  return {value.inc_ref().ptr(), [](void* object) {
            if (Py_IsInitialized() == 0) return;  // a pool may outlive the interpreter
            const py::gil_scoped_acquire gil;
            py::handle(static_cast<PyObject*>(object)).dec_ref();
          }};
}

std::optional<Stream> consumer_stream(py::handle value) {
  if (value.is_none()) return cuda::kDefaultStream;
  const auto number = value.cast<std::intptr_t>();
  if (number == -1) return std::nullopt;
  if (number == 0 || number < -1) {
    throw py::value_error("stream is " + std::to_string(number) +
                          ", expected a handle, 1 or 2 for a default stream, or -1 for none");
  }
  return from_handle(static_cast<std::uintptr_t>(number));
}

}  // namespace pipelive::bindings
