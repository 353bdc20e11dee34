#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/report.hpp"
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

/// Pages of another process, and whether the host can look into them.
struct BoundPages {
  std::unique_ptr<ImportedPages> pages;
  std::string device;
  bool on_host = true;
};

py::dict to_dict(const cuda::DeviceReport& device) {
  py::dict result;
  result["index"] = device.index;
  result["name"] = device.name;
  result["uuid"] = device.uuid;
  result["pci_bus_id"] = device.pci_bus_id;
  result["compute_capability"] = py::make_tuple(device.compute_major, device.compute_minor);
  result["multiprocessors"] = device.multiprocessors;
  result["copy_engines"] = device.copy_engines;
  result["memory_total"] = device.memory_total;
  result["memory_free"] = device.memory_free;
  result["granularity"] = device.granularity;
  result["recommended_granularity"] = device.recommended_granularity;
  result["exportable"] = device.exportable;
  result["rdma"] = device.rdma;
  result["peers"] = device.peers;
  result["problem"] = device.problem;
  result["kernel_problem"] = device.kernel_problem;
  return result;
}

py::dict cuda_report(const std::string& library) {
  cuda::SystemReport report;
  {
    const py::gil_scoped_release release;
    report = cuda::report_system(library);
  }
  py::list devices;
  for (const cuda::DeviceReport& device : report.devices) devices.append(to_dict(device));
  py::dict result;
  result["driver_version"] = report.driver_version;
  result["problem"] = report.problem;
  result["missing"] = report.missing;
  result["devices"] = devices;
  return result;
}

}  // namespace

void bind_device(py::module_& m) {
  m.def("cuda_report", &cuda_report, py::arg("library"));

  py::class_<DeviceUsage>(m, "DeviceUsage")
      .def_readonly("reserved_bytes", &DeviceUsage::reserved_bytes)
      .def_readonly("page_bytes", &DeviceUsage::page_bytes)
      .def_readonly("mapped_bytes", &DeviceUsage::mapped_bytes);

  py::class_<BoundPages>(m, "ImportedPages", py::buffer_protocol())
      .def_property_readonly("nbytes", [](const BoundPages& bound) { return bound.pages->bytes(); })
      .def_property_readonly("data_ptr",
                             [](const BoundPages& bound) {
                               return reinterpret_cast<std::uintptr_t>(bound.pages->data());
                             })
      .def_buffer([](BoundPages& bound) {
        if (!bound.on_host) {
          throw py::buffer_error("the pages are on " + bound.device + ", not on the CPU");
        }
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(bound.pages->data()),
                               static_cast<py::ssize_t>(bound.pages->bytes()));
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
            return BoundPages{device.import_pages(exported), device.info().name,
                              device.info().kind == DeviceKind::host};
          },
          py::arg("fd"), py::arg("offset"), py::arg("nbytes"));

  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(m, "HostDevice")
      .def(py::init<>())
      .def("resident_file_bytes", &HostDevice::resident_file_bytes);

  py::class_<cuda::CudaDevice, Device, std::shared_ptr<cuda::CudaDevice>>(m, "CudaDevice")
      .def(py::init([](int ordinal, const std::string& library) {
             const py::gil_scoped_release release;
             return std::make_shared<cuda::CudaDevice>(ordinal, library);
           }),
           py::arg("ordinal"), py::arg("library") = std::string(cuda::kDriverLibrary))
      .def_property_readonly("exportable", &cuda::CudaDevice::exportable)
      .def_property_readonly("rdma", &cuda::CudaDevice::rdma)
      .def(
          "memory",
          [](const cuda::CudaDevice& device) {
            const cuda::CudaDevice::Memory memory = device.memory();
            return py::make_tuple(memory.free, memory.total);
          },
          "Bytes free and in all, whoever uses them.");

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
