#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "pipelive/attention/isa.hpp"
#include "pipelive/cuda/driver.hpp"
#include "pipelive/cuda/fatbin.hpp"
#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/scale.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

// What the whole library may assume of the processor. Kernels chosen at run time come on top.
std::vector<std::string> baseline_isa() {
  std::vector<std::string> isa;
#if defined(__x86_64__)
  isa.emplace_back("x86-64");
#elif defined(__aarch64__)
  isa.emplace_back("aarch64");
#endif
#if defined(__AVX2__)
  isa.emplace_back("avx2");
#endif
#if defined(__FMA__)
  isa.emplace_back("fma");
#endif
#if defined(__F16C__)
  isa.emplace_back("f16c");
#endif
#if defined(__AVX512F__)
  isa.emplace_back("avx512f");
#endif
#if defined(__AVX512BF16__)
  isa.emplace_back("avx512bf16");
#endif
  return isa;
}

py::dict build_info() {
  std::size_t fatbin_bytes = 0;
  std::vector<std::string> kernels;
  for (const cuda::Fatbin& entry : cuda::fatbins()) {
    fatbin_bytes += entry.bytes.size();
    kernels.emplace_back(entry.name);
  }
  std::vector<std::string> archs;
  for (const std::string_view arch : cuda::fatbin_archs()) archs.emplace_back(arch);

  std::vector<std::string> attention;
  for (const Isa isa : available_isas()) attention.emplace_back(to_string(isa));

  py::dict info;
  info["version"] = PIPELIVE_VERSION;
  info["compiler"] = PIPELIVE_COMPILER;
  info["build_type"] = PIPELIVE_BUILD_TYPE;
  info["sanitizers"] = PIPELIVE_SANITIZE;
  info["baseline_isa"] = baseline_isa();
  info["attention_isa"] = attention;
  info["cuda_compiler"] = std::string(cuda::fatbin_compiler());
  info["cuda_archs"] = archs;
  info["cuda_kernels"] = kernels;
  info["cuda_fatbin_bytes"] = fatbin_bytes;
  return info;
}

py::dict cuda_probe(const std::string& library) {
  cuda::DriverProbe probe;
  std::vector<std::string> devices;
  {
    const py::gil_scoped_release release;
    probe = cuda::probe_driver(library);
    if (probe.device_count > 0) {
      const auto driver = cuda::Driver::open(library);
      for (int i = 0; i < probe.device_count; ++i) devices.push_back(driver->device_name(i));
    }
  }
  py::dict result;
  result["version"] = probe.version;
  result["devices"] = devices;
  result["problem"] = probe.problem;
  return result;
}

py::array_t<float> cuda_scale(
    const py::array_t<float, py::array::c_style | py::array::forcecast>& values, float factor,
    int device, const std::string& library) {
  py::array_t<float> result(
      std::vector<py::ssize_t>(values.shape(), values.shape() + values.ndim()));
  float* data = result.mutable_data();
  const auto count = static_cast<std::size_t>(values.size());
  std::copy_n(values.data(), count, data);
  {
    const py::gil_scoped_release release;
    const auto driver = cuda::Driver::open(library);
    const cuda::Kernels kernels(std::make_shared<const cuda::PrimaryContext>(driver, device));
    const auto image = cuda::kernel_image({"scale", {}}, kernels.limits());
    cuda::scale(driver, device, image, {data, count}, factor);
  }
  return result;
}

}  // namespace

void bind_build_info(py::module_& m) {
  m.def("build_info", &build_info);
  m.def("cuda_probe", &cuda_probe, py::arg("library"));
  m.def("cuda_scale", &cuda_scale, py::arg("values"), py::arg("factor"), py::arg("device"),
        py::arg("library"));
}

}  // namespace pipelive::bindings
