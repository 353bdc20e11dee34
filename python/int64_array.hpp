#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pipelive/base/error.hpp"

namespace pipelive::bindings {

/// The numpy array behind a buffer, a sequence or a DLPack tensor of the host, without a copy where
/// the object allows it. Throws Error(invalid_argument) for a tensor that the host cannot read.
inline pybind11::array as_host_array(const pybind11::object& object, const char* name) {
  namespace py = pybind11;
  if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
  const py::module_ numpy = py::module_::import("numpy");
  if (!py::hasattr(object, "__dlpack__")) return numpy.attr("asarray")(object);
  try {
    return numpy.attr("from_dlpack")(object);
  } catch (const py::error_already_set&) {
    // Asking a tensor for its device takes as long as the conversion: only where that fails.
    const auto device = py::tuple(object.attr("__dlpack_device__")())[0].cast<int>();
    if (device == 1) throw;
    throw Error(ErrorCode::invalid_argument, std::string(name) + " is on a device of DLPack type " +
                                                 std::to_string(device) +
                                                 ", expected host memory (type 1)");
  }
}

/// One-dimensional 64-bit integers from Python, borrowed from a contiguous int64 array and copied
/// from anything else that holds integers. Lives no longer than the call that got `object`.
class Int64Array {
 public:
  Int64Array(const pybind11::object& object, const char* name) {
    namespace py = pybind11;
    array_ = as_host_array(object, name);
    const py::dtype dtype = array_.dtype();
    if (array_.ndim() != 1) {
      throw Error(
          ErrorCode::invalid_argument,
          std::string(name) + " has " + std::to_string(array_.ndim()) + " dimensions, expected 1");
    }
    if (array_.size() == 0) return;
    const bool holds_integers =
        dtype.kind() == 'i' || (dtype.kind() == 'u' && dtype.itemsize() < 8);
    if (!holds_integers) {
      throw Error(ErrorCode::invalid_argument,
                  std::string(name) + " has the dtype " + py::str(dtype).cast<std::string>() +
                      ", expected int64 or an integer type that fits it");
    }
    auto converted =
        py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array_);
    if (!converted) throw py::error_already_set();
    values_ = {converted.data(), static_cast<std::size_t>(converted.size())};
    array_ = std::move(converted);
  }

  [[nodiscard]] std::span<const std::int64_t> values() const noexcept { return values_; }
  [[nodiscard]] std::vector<std::int64_t> copy() const { return {values_.begin(), values_.end()}; }

 private:
  pybind11::array array_;
  std::span<const std::int64_t> values_;
};

}  // namespace pipelive::bindings
