#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/device/fault_device.hpp"
#include "pipelive/device/host_device.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

DeviceCall call_from_name(const std::string& name) {
  std::string known;
  for (std::size_t i = 0; i < kDeviceCallCount; ++i) {
    const auto call = static_cast<DeviceCall>(i);
    if (to_string(call) == name) return call;
    known += (i > 0 ? ", " : "") + std::string(to_string(call));
  }
  throw Error(ErrorCode::invalid_argument, "call is '" + name + "', expected one of " + known);
}

}  // namespace

void bind_device(py::module_& m) {
  py::class_<DeviceUsage>(m, "DeviceUsage")
      .def_readonly("reserved_bytes", &DeviceUsage::reserved_bytes)
      .def_readonly("page_bytes", &DeviceUsage::page_bytes)
      .def_readonly("mapped_bytes", &DeviceUsage::mapped_bytes);

  py::class_<ImportedPages>(m, "ImportedPages", py::buffer_protocol())
      .def_property_readonly("nbytes", &ImportedPages::bytes)
      .def_buffer([](ImportedPages& pages) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(pages.data()),
                               static_cast<py::ssize_t>(pages.bytes()));
      });

  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("name", [](const Device& device) { return device.info().name; })
      .def_property_readonly("page_granularity",
                             [](const Device& device) { return device.info().page_granularity; })
      .def("usage", &Device::usage)
      .def(
          "import_pages",
          [](Device& device, int fd, std::uint64_t offset, std::size_t nbytes) {
            // The caller keeps its descriptor.
            ExportedPages exported{UniqueFd(::dup(fd)), offset, nbytes};
            const py::gil_scoped_release release;
            return device.import_pages(exported);
          },
          py::arg("fd"), py::arg("offset"), py::arg("nbytes"));

  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(m, "HostDevice")
      .def(py::init<>())
      .def("resident_file_bytes", &HostDevice::resident_file_bytes);

  py::class_<FaultDevice, Device, std::shared_ptr<FaultDevice>>(m, "FaultDevice")
      .def(py::init<std::shared_ptr<Device>>(), py::arg("device"))
      .def(
          "fail",
          [](FaultDevice& device, const std::string& call, std::uint64_t nth, std::uint64_t times) {
            device.fail(call_from_name(call), nth, times);
          },
          py::arg("call"), py::arg("nth"), py::arg("times") = 1)
      .def("fail_any", &FaultDevice::fail_any, py::arg("nth"))
      .def("disarm", &FaultDevice::disarm)
      .def(
          "calls",
          [](const FaultDevice& device, const std::string& call) {
            return device.calls(call_from_name(call));
          },
          py::arg("call"))
      .def("total_calls", &FaultDevice::total_calls);
}

}  // namespace pipelive::bindings
