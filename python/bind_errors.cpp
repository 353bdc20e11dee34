#include <array>
#include <string>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

struct ErrorClass {
  ErrorCode code;
  const char* name;
  PyObject* extra_base;  ///< a built-in class that callers may expect to catch
};

// Exception classes live as long as the interpreter, so the references are never dropped.
std::array<PyObject*, 11> classes{};

}  // namespace

void bind_errors(py::module_& m) {
  PyObject* root = PyErr_NewExceptionWithDoc("pipelive_kv.PipeliveError",
                                             "Base of every error that pipelive_kv raises itself.",
                                             PyExc_RuntimeError, nullptr);
  if (root == nullptr) throw py::error_already_set();
  m.attr("PipeliveError") = py::reinterpret_borrow<py::object>(root);

  const std::array<ErrorClass, 11> table{{
      {ErrorCode::invalid_argument, "InvalidArgumentError", PyExc_ValueError},
      {ErrorCode::out_of_memory, "OutOfMemoryError", PyExc_MemoryError},
      {ErrorCode::over_budget, "OverBudgetError", nullptr},
      {ErrorCode::not_resident, "NotResidentError", nullptr},
      {ErrorCode::busy, "BusyError", nullptr},
      {ErrorCode::closed, "ClosedError", nullptr},
      {ErrorCode::timeout, "DeadlineError", PyExc_TimeoutError},
      {ErrorCode::cancelled, "CancelledError", nullptr},
      {ErrorCode::protocol, "ProtocolError", nullptr},
      {ErrorCode::corrupt, "CorruptError", nullptr},
      {ErrorCode::device, "DeviceError", PyExc_OSError},
  }};
  for (const ErrorClass& entry : table) {
    py::tuple bases = py::make_tuple(py::handle(root));
    if (entry.extra_base != nullptr) {
      bases = py::make_tuple(py::handle(root), py::handle(entry.extra_base));
    }
    PyObject* made = PyErr_NewException((std::string("pipelive_kv.") + entry.name).c_str(),
                                        bases.ptr(), nullptr);
    if (made == nullptr) throw py::error_already_set();
    classes[static_cast<std::size_t>(entry.code)] = made;
    m.attr(entry.name) = py::reinterpret_borrow<py::object>(made);
  }

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetString(classes[static_cast<std::size_t>(error.code())], error.what());
    }
  });
}

}  // namespace pipelive::bindings
