#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/kv/kv_pool.hpp"
#include "pipelive/kv/layer_view.hpp"
#include "stream_arg.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;
using Moves = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

std::vector<BlockMove> to_moves(const Moves& pairs) {
  std::vector<BlockMove> moves;
  moves.reserve(pairs.size());
  for (const auto& [from, to] : pairs) moves.push_back({from, to});
  return moves;
}

DType dtype_from(const std::string& name) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    if (to_string(dtype) == name) return dtype;
  }
  throw Error(ErrorCode::invalid_argument,
              "KVSpec.dtype is '" + name + "', expected 'float32', 'float16' or 'bfloat16'");
}

BlockOrder order_from(const std::string& name) {
  if (name == "hnd") return BlockOrder::hnd;
  if (name == "nhd") return BlockOrder::nhd;
  throw Error(ErrorCode::invalid_argument,
              "KVSpec.order is '" + name + "', expected 'hnd' or 'nhd'");
}

HolePolicy holes_from(const std::string& name) {
  if (name == "fault") return HolePolicy::fault;
  if (name == "scratch") return HolePolicy::scratch;
  throw Error(ErrorCode::invalid_argument,
              "holes is '" + name + "', expected 'fault' or 'scratch'");
}

/// Axis 2 of the view holds K and V; `part` picks one of them.
TensorExport part_of(const LayerView& view, std::optional<int> part) {
  TensorExport tensor;
  tensor.data = view.memory().base;
  tensor.device = {view.device_kind() == DeviceKind::host ? dlpack::kCpu : dlpack::kCuda,
                   view.device_index()};
  tensor.dtype = to_dlpack(view.spec().dtype);
  tensor.shape.assign(view.shape().begin(), view.shape().end());
  tensor.strides.assign(view.strides().begin(), view.strides().end());
  tensor.owner = std::make_shared<LayerView>(view);
  if (view.device_kind() == DeviceKind::cuda) {
    tensor.order_consumer = [blocks = view.blocks()](Stream consumer) {
      blocks->order_consumer(consumer);
    };
  }
  if (part) {
    tensor.data += static_cast<std::size_t>(*part) * static_cast<std::size_t>(tensor.strides[2]) *
                   size_of(view.spec().dtype);
    tensor.shape.erase(tensor.shape.begin() + 2);
    tensor.strides.erase(tensor.strides.begin() + 2);
  }
  return tensor;
}

void bind_spec(py::module_& m) {
  py::class_<KVSpec>(m, "KVSpec")
      .def(py::init([](std::uint32_t num_kv_heads, std::uint32_t head_dim, const std::string& dtype,
                       std::uint32_t block_size, const std::string& order) {
             KVSpec spec{num_kv_heads, head_dim, dtype_from(dtype), block_size, order_from(order)};
             spec.validate();
             return spec;
           }),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("block_size"),
           py::arg("order"))
      .def_readonly("num_kv_heads", &KVSpec::num_kv_heads)
      .def_readonly("head_dim", &KVSpec::head_dim)
      .def_property_readonly("dtype",
                             [](const KVSpec& spec) { return std::string(to_string(spec.dtype)); })
      .def_readonly("block_size", &KVSpec::block_size)
      .def_property_readonly(
          "order", [](const KVSpec& spec) { return spec.order == BlockOrder::hnd ? "hnd" : "nhd"; })
      .def_property_readonly("block_bytes", &KVSpec::block_bytes)
      .def_property_readonly("slot_bytes",
                             [](const KVSpec& spec) { return spec.layout().slot_bytes(); });
}

void bind_geometry(py::module_& m) {
  py::class_<Geometry>(m, "Geometry")
      .def(
          py::init([](const KVSpec& spec, std::uint32_t num_layers, std::uint32_t stack,
                      std::uint64_t max_blocks, std::size_t page_bytes, const std::string& holes) {
            Geometry geometry{
                spec.block_bytes(), num_layers, stack,
                max_blocks,         page_bytes, holes_from(holes) == HolePolicy::scratch ? 1u : 0u};
            geometry.validate();
            return geometry;
          }),
          py::arg("spec"), py::arg("num_layers"), py::arg("stack"), py::arg("max_blocks"),
          py::arg("page_bytes"), py::arg("holes"))
      .def(
          "bytes_needed",
          [](const Geometry& geometry, const std::vector<std::uint32_t>& layers,
             std::uint64_t capacity) {
            if (capacity > geometry.max_blocks) {
              throw Error(ErrorCode::invalid_argument,
                          "bytes_needed: capacity is " + std::to_string(capacity) +
                              ", expected at most " + std::to_string(geometry.max_blocks));
            }
            return geometry.bytes_needed(geometry.stacks_of(layers, "layers", false), capacity);
          },
          py::arg("layers"), py::arg("capacity"))
      .def(
          "blocks_that_fit",
          [](const Geometry& geometry, const std::vector<std::uint32_t>& layers,
             std::uint64_t budget) {
            return geometry.blocks_that_fit(geometry.stacks_of(layers, "layers", false), budget);
          },
          py::arg("layers"), py::arg("budget"));
}

void bind_layer_view(py::module_& m) {
  py::class_<LayerView>(
      m, "LayerView",
      "One layer's blocks as a strided tensor [max_blocks, kv_heads, 2, block_size, head_dim].\n\n"
      "Lends itself by DLPack without a copy. Only blocks below `resident_blocks` have memory\n"
      "behind them. The addresses stay fixed and reserved for the life of the view.")
      .def_property_readonly("layer", &LayerView::layer)
      .def_property_readonly("spec", &LayerView::spec)
      .def_property_readonly(
          "dtype", [](const LayerView& v) { return std::string(to_string(v.spec().dtype)); })
      .def_property_readonly("device",
                             [](const LayerView& v) {
                               return v.device_kind() == DeviceKind::host
                                          ? std::string("cpu")
                                          : "cuda:" + std::to_string(v.device_index());
                             })
      .def_property_readonly("shape",
                             [](const LayerView& v) { return py::tuple(py::cast(v.shape())); })
      .def_property_readonly(
          "strides", [](const LayerView& v) { return py::tuple(py::cast(v.strides())); },
          "In elements.")
      .def_property_readonly(
          "data_ptr",
          [](const LayerView& v) { return reinterpret_cast<std::uintptr_t>(v.memory().base); })
      .def_property_readonly("resident_blocks", &LayerView::resident_blocks)
      .def_property_readonly(
          "key", [](const LayerView& v) { return part_of(v, 0); },
          "K alone: [max_blocks, kv_heads, block_size, head_dim].")
      .def_property_readonly(
          "value", [](const LayerView& v) { return part_of(v, 1); },
          "V alone: [max_blocks, kv_heads, block_size, head_dim].")
      .def(
          "check_resident",
          [](const LayerView& v, const std::vector<std::int64_t>& blocks) {
            v.check_resident<std::int64_t>(blocks);
          },
          py::arg("blocks"),
          "Raises NotResidentError naming the first block without memory behind it.")
      .def(
          "__dlpack__",
          [](const LayerView& v, py::handle stream, py::handle max_version, py::handle dl_device,
             py::handle copy) {
            v.blocks()->check_open();
            return export_dlpack(part_of(v, std::nullopt), stream, max_version, dl_device, copy);
          },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const LayerView& v) { return dlpack_device(part_of(v, std::nullopt)); })
      .def(
          "numpy",
          [](const LayerView& v) {
            v.blocks()->check_open();
            return export_numpy(part_of(v, std::nullopt), to_dlpack(v.spec().dtype));
          },
          "A numpy array over the same memory; for float32 and float16.")
      .def(
          "as_uint16",
          [](const LayerView& v) {
            v.blocks()->check_open();
            return export_numpy(part_of(v, std::nullopt), dtypes::uint16);
          },
          "The bits of a 16-bit type as a numpy array over the same memory.")
      .def("__repr__", [](const LayerView& v) {
        return "LayerView(layer=" + std::to_string(v.layer()) +
               ", shape=" + format_shape(v.shape()) +
               ", dtype=" + std::string(to_string(v.spec().dtype)) + ")";
      });
}

void bind_pool(py::module_& m) {
  py::class_<KVPoolStats>(m, "KVPoolStats")
      .def_readonly("capacity", &KVPoolStats::capacity)
      .def_readonly("max_blocks", &KVPoolStats::max_blocks)
      .def_readonly("layers_held", &KVPoolStats::layers_held)
      .def_readonly("held_bytes", &KVPoolStats::held_bytes)
      .def_readonly("resident_bytes", &KVPoolStats::resident_bytes);

  py::class_<KVPool, std::shared_ptr<KVPool>>(m, "KVPool")
      .def(
          py::init([](const KVSpec& spec, std::shared_ptr<PagePool> pages, std::uint32_t num_layers,
                      std::vector<std::uint32_t> layers, std::uint64_t max_blocks,
                      std::uint64_t capacity, std::uint32_t stack, const std::string& holes) {
            KVPoolOptions options;
            options.num_layers = num_layers;
            options.layers = std::move(layers);
            options.max_blocks = max_blocks;
            options.capacity = capacity;
            options.stack = stack;
            options.holes = holes_from(holes);
            const py::gil_scoped_release release;
            return KVPool::create(spec, std::move(pages), options);
          }),
          py::arg("spec"), py::arg("pages"), py::arg("num_layers"), py::arg("layers"),
          py::arg("max_blocks"), py::arg("capacity"), py::arg("stack"), py::arg("holes"))
      .def_property_readonly("capacity", &KVPool::capacity)
      .def_property_readonly("layers", py::cpp_function(&KVPool::layers, Release()))
      .def_property_readonly("closed", &KVPool::closed)
      .def(
          "layer",
          [](const std::shared_ptr<KVPool>& pool, std::uint32_t layer) {
            pool->check_open();
            return LayerView(pool, layer);
          },
          py::arg("layer"))
      .def(
          "add_layers",
          [](KVPool& pool, const std::vector<std::uint32_t>& layers) { pool.add_layers(layers); },
          py::arg("layers"), Release())
      .def(
          "drop_layers",
          [](KVPool& pool, const std::vector<std::uint32_t>& layers) { pool.drop_layers(layers); },
          py::arg("layers"), Release())
      .def("grow", &KVPool::grow, py::arg("capacity"), Release())
      .def(
          "shrink",
          [](KVPool& pool, std::uint64_t capacity, const std::vector<std::uint64_t>& live,
             const Moves& moves, py::handle stream) {
            const Stream chosen = stream_from(stream, "stream");
            const py::gil_scoped_release release;
            pool.shrink(capacity, live, to_moves(moves), {}, chosen);
          },
          py::arg("capacity"), py::arg("live"), py::arg("moves"), py::arg("stream") = py::none())
      .def(
          "lower",
          [](KVPool& pool, std::uint64_t capacity, const std::vector<std::uint64_t>& live,
             const Moves& moves, py::handle stream) {
            const Stream chosen = stream_from(stream, "stream");
            const py::gil_scoped_release release;
            pool.lower(capacity, live, to_moves(moves), chosen);
          },
          py::arg("capacity"), py::arg("live"), py::arg("moves"), py::arg("stream") = py::none())
      .def("reclaim", &KVPool::reclaim, py::call_guard<py::gil_scoped_release>())
      .def(
          "move_blocks",
          [](KVPool& pool, const Moves& moves, py::handle stream) {
            const Stream chosen = stream_from(stream, "stream");
            const py::gil_scoped_release release;
            pool.move_blocks(to_moves(moves), chosen);
          },
          py::arg("moves"), py::arg("stream") = py::none())
      .def(
          "note_stream",
          [](const KVPool& pool, py::handle stream) {
            pool.residency().note_stream(stream_from(stream, "stream"));
          },
          py::arg("stream"))
      .def(
          "forget_stream",
          [](const KVPool& pool, py::handle stream) {
            pool.residency().forget_stream(stream_from(stream, "stream"));
          },
          py::arg("stream"))
      .def("is_resident", &KVPool::is_resident, py::arg("block"))
      .def("stats", &KVPool::stats, Release())
      .def("close", &KVPool::close, Release());

  py::class_<AdoptedPool, std::shared_ptr<AdoptedPool>>(m, "AdoptedPool")
      .def(py::init([](const KVSpec& spec, std::uint32_t num_layers,
                       const std::map<std::uint32_t, py::object>& tensors) {
             std::vector<AdoptedTensor> adopted;
             std::optional<dlpack::Device> device;
             for (const auto& [layer, object] : tensors) {
               const std::string name = "tensors[" + std::to_string(layer) + "]";
               auto view = std::make_shared<TensorView>(TensorView::borrow(object, name.c_str()));
               view->require_dtype(to_dlpack(spec.dtype));
               view->require_ndim(5);
               view->require_writable();
               if (device.value_or(view->device()) != view->device()) {
                 throw Error(ErrorCode::invalid_argument,
                             name + " lies on another device than the tensors before it");
               }
               device = view->device();
               AdoptedTensor tensor;
               tensor.layer = layer;
               tensor.data = view->data();
               std::copy_n(view->shape().begin(), 5, tensor.shape.begin());
               std::copy_n(view->strides().begin(), 5, tensor.strides.begin());
               tensor.owner = std::move(view);
               adopted.push_back(std::move(tensor));
             }
             dlpack::Device where = device.value_or(dlpack::Device{});
             if (where.type == dlpack::kCudaHost) where = dlpack::Device{};  // pinned
             if (where.type != dlpack::kCpu && where.type != dlpack::kCuda) {
               throw Error(ErrorCode::invalid_argument,
                           "tensors lie on " + name_of(where) + ", expected the CPU or a CUDA GPU");
             }
             return AdoptedPool::create(
                 spec, num_layers, std::move(adopted),
                 where.type == dlpack::kCpu ? DeviceKind::host : DeviceKind::cuda, where.id);
           }),
           py::arg("spec"), py::arg("num_layers"), py::arg("tensors"))
      .def_property_readonly("num_blocks", &AdoptedPool::num_blocks)
      .def_property_readonly("layers", &AdoptedPool::layers)
      .def(
          "layer",
          [](const AdoptedPool& pool, std::uint32_t layer) {
            pool.check_open();
            return pool.layer(layer);
          },
          py::arg("layer"))
      .def("close", &AdoptedPool::close, Release());
}

}  // namespace

void bind_kv(py::module_& m) {
  bind_spec(m);
  bind_geometry(m);
  bind_layer_view(m);
  bind_pool(m);
}

}  // namespace pipelive::bindings
