#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/memory/arena.hpp"
#include "pipelive/memory/page_pool.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

dlpack::Device device_of(const Device& device) {
  return {device.info().kind == DeviceKind::host ? dlpack::kCpu : dlpack::kCuda,
          device.info().index};
}

TensorExport arena_tensor(const std::shared_ptr<Arena>& arena, std::size_t offset,
                          std::vector<std::int64_t> shape, const std::string& dtype_name) {
  const dlpack::DataType dtype = dtype_from_name(dtype_name, "dtype");
  const std::size_t item = dtype.bits / 8u;
  if (offset % item != 0) {
    throw Error(ErrorCode::invalid_argument, "tensor: offset is " + std::to_string(offset) +
                                                 ", expected a multiple of the item size " +
                                                 std::to_string(item));
  }
  std::size_t bytes = item;
  for (const std::int64_t length : shape) {
    if (length < 0 ||
        (length > 0 && bytes > arena->reserved_bytes() / static_cast<std::size_t>(length))) {
      throw Error(ErrorCode::invalid_argument, "tensor: shape " + format_shape(shape) + " of " +
                                                   dtype_name + " does not fit the arena's " +
                                                   std::to_string(arena->reserved_bytes()) +
                                                   " bytes");
    }
    bytes *= static_cast<std::size_t>(length);
  }
  if (arena->closed()) throw Error(ErrorCode::closed, "the arena is closed");
  if (!arena->is_mapped(offset, bytes)) {
    throw Error(ErrorCode::not_resident, "tensor: not all of the " + std::to_string(bytes) +
                                             " bytes at offset " + std::to_string(offset) +
                                             " are mapped");
  }
  TensorExport tensor;
  tensor.data = arena->base() + offset;
  tensor.device = device_of(*arena->pool()->device());
  tensor.dtype = dtype;
  tensor.strides.resize(shape.size());
  std::int64_t step = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    tensor.strides[axis] = step;
    step *= std::max<std::int64_t>(shape[axis], 1);
  }
  tensor.shape = std::move(shape);
  tensor.owner = arena;
  return tensor;
}

// The bytes of a contiguous host tensor of any type.
std::span<std::byte> flat_bytes(const TensorView& view) {
  view.require_cpu();
  view.require_contiguous();
  return {view.data(), view.num_bytes()};
}

void bind_tensor(py::module_& m) {
  py::class_<TensorExport>(m, "DeviceTensor",
                           "Memory of the core as a tensor; lends itself by DLPack, never copies.")
      .def_property_readonly("shape",
                             [](const TensorExport& t) { return py::tuple(py::cast(t.shape)); })
      .def_property_readonly("strides",
                             [](const TensorExport& t) { return py::tuple(py::cast(t.strides)); })
      .def_property_readonly("dtype", [](const TensorExport& t) { return name_of(t.dtype); })
      .def_property_readonly("device", [](const TensorExport& t) { return name_of(t.device); })
      .def_property_readonly(
          "data_ptr",
          [](const TensorExport& t) { return reinterpret_cast<std::uintptr_t>(t.data); })
      .def_property_readonly("nbytes",
                             [](const TensorExport& t) {
                               std::size_t bytes = t.dtype.bits / 8u;
                               for (const std::int64_t n : t.shape)
                                 bytes *= static_cast<std::size_t>(n);
                               return bytes;
                             })
      .def("__dlpack__", &export_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__", &dlpack_device)
      .def(
          "numpy",
          [](const TensorExport& t, const std::optional<std::string>& dtype) {
            return export_numpy(t, dtype ? dtype_from_name(*dtype, "dtype") : t.dtype);
          },
          py::arg("dtype") = py::none())
      .def("as_uint16", [](const TensorExport& t) { return export_numpy(t, dtypes::uint16); });
}

void bind_page_pool(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PagePoolStats>(m, "PagePoolStats")
      .def_readonly("page_bytes", &PagePoolStats::page_bytes)
      .def_readonly("budget_bytes", &PagePoolStats::budget_bytes)
      .def_readonly("held_bytes", &PagePoolStats::held_bytes)
      .def_readonly("used_bytes", &PagePoolStats::used_bytes)
      .def_readonly("free_bytes", &PagePoolStats::free_bytes)
      .def_readonly("prepared_bytes", &PagePoolStats::prepared_bytes)
      .def_readonly("peak_held_bytes", &PagePoolStats::peak_held_bytes)
      .def_readonly("peak_used_bytes", &PagePoolStats::peak_used_bytes)
      .def_readonly("pages_created", &PagePoolStats::pages_created)
      .def_readonly("pages_reused", &PagePoolStats::pages_reused)
      .def_readonly("prepare_failures", &PagePoolStats::prepare_failures);

  py::class_<PagePool, std::shared_ptr<PagePool>>(m, "PagePool")
      .def(py::init([](std::shared_ptr<Device> device, std::uint64_t budget, std::size_t page_bytes,
                       std::size_t prepare_ahead) {
             PagePoolOptions options;
             options.page_bytes = page_bytes;
             options.budget_bytes = budget;
             options.prepare_ahead = prepare_ahead;
             return PagePool::create(std::move(device), options);
           }),
           py::arg("device"), py::arg("budget"), py::arg("page_bytes"), py::arg("prepare_ahead"))
      .def_property_readonly("device", &PagePool::device)
      .def_property_readonly("page_bytes", &PagePool::page_bytes)
      .def_property_readonly("budget", &PagePool::budget_bytes)
      .def_property_readonly("closed", &PagePool::closed)
      .def("stats", &PagePool::stats, Release())
      .def("trim", &PagePool::trim, py::arg("keep_bytes"), Release())
      .def("prepare", &PagePool::prepare, py::arg("count"), Release())
      .def(
          "wait_prepared",
          [](PagePool& pool, double timeout) {
            pool.wait_prepared(Deadline::after_seconds(timeout));
          },
          py::arg("timeout"), Release())
      .def("close", &PagePool::close, Release());
}

void bind_arena(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena")
      .def(py::init([](std::shared_ptr<PagePool> pool, std::size_t reserve_bytes, bool scrub) {
             const py::gil_scoped_release release;
             return std::make_shared<Arena>(std::move(pool), reserve_bytes,
                                            ArenaOptions{scrub, nullptr});
           }),
           py::arg("pool"), py::arg("reserve_bytes"), py::arg("scrub"))
      .def_property_readonly(
          "data_ptr",
          [](const Arena& arena) { return reinterpret_cast<std::uintptr_t>(arena.base()); })
      .def_property_readonly("reserved_bytes", &Arena::reserved_bytes)
      .def_property_readonly("page_bytes", &Arena::page_bytes)
      .def_property_readonly("mapped_bytes", py::cpp_function(&Arena::mapped_bytes, Release()))
      .def_property_readonly("closed", py::cpp_function(&Arena::closed, Release()))
      .def("is_mapped", &Arena::is_mapped, py::arg("offset"), py::arg("nbytes"), Release())
      .def(
          "map",
          [](Arena& arena, std::size_t offset, std::size_t nbytes) { arena.map(offset, nbytes); },
          py::arg("offset"), py::arg("nbytes"), Release())
      .def("unmap", &Arena::unmap, py::arg("offset"), py::arg("nbytes"), Release())
      .def("tensor", &arena_tensor, py::arg("offset"), py::arg("shape"), py::arg("dtype"))
      .def(
          "write",
          [](Arena& arena, std::size_t offset, const py::handle& source) {
            const TensorView view = TensorView::borrow(source, "source");
            const std::span<std::byte> bytes = flat_bytes(view);
            const py::gil_scoped_release release;
            arena.write(offset, bytes);
          },
          py::arg("offset"), py::arg("source"))
      .def(
          "read",
          [](const Arena& arena, std::size_t offset, const py::handle& target) {
            const TensorView view = TensorView::borrow(target, "target");
            view.require_writable();
            const std::span<std::byte> bytes = flat_bytes(view);
            const py::gil_scoped_release release;
            arena.read(offset, bytes);
          },
          py::arg("offset"), py::arg("target"))
      .def(
          "export_page",
          [](const Arena& arena, std::size_t offset) {
            ExportedPages exported = arena.export_page(offset);
            const std::uint64_t at = exported.offset;
            return py::make_tuple(exported.fd.release(), at, exported.bytes);
          },
          py::arg("offset"))
      .def("close", &Arena::close, Release());
}

}  // namespace

void bind_memory(py::module_& m) {
  bind_tensor(m);
  bind_page_pool(m);
  bind_arena(m);
}

}  // namespace pipelive::bindings
