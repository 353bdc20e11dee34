#include <pybind11/numpy.h>

#include <utility>

#include "pipelive/base/error.hpp"
#include "stream_arg.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

/// What a capsule's context points at: everything the exported struct refers to.
template <typename Managed>
struct Export {
  Managed managed{};
  TensorExport source;
};

template <typename Managed>
py::object make_capsule(const TensorExport& source, const char* name) {
  auto exported = std::make_unique<Export<Managed>>();
  exported->source = source;
  Managed& managed = exported->managed;
  managed.tensor.data = source.data;
  managed.tensor.device = source.device;
  managed.tensor.ndim = static_cast<std::int32_t>(source.shape.size());
  managed.tensor.dtype = source.dtype;
  managed.tensor.shape = exported->source.shape.data();
  managed.tensor.strides = exported->source.strides.data();
  managed.tensor.byte_offset = 0;
  managed.context = exported.get();
  managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->context); };
  if constexpr (requires { managed.version; }) {
    managed.version = {dlpack::kMajorVersion, dlpack::kMinorVersion};
    managed.flags = 0;
  }
  PyObject* capsule = PyCapsule_New(&managed, name, [](PyObject* self) {
    // A consumer renames the capsule and calls the deleter itself.
    const char* current = PyCapsule_GetName(self);
    const char* mine = requires { Managed::flags; } ? dlpack::kVersionedName : dlpack::kLegacyName;
    if (PyCapsule_IsValid(self, mine) == 0) return;
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(self, current));
    unused->deleter(unused);
  });
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

py::object export_dlpack(const TensorExport& tensor, py::handle stream, py::handle max_version,
                         py::handle dl_device, py::handle copy) {
  if (!copy.is_none() && copy.cast<bool>()) {
    throw py::buffer_error("this memory is exported in place; copy=True is not supported");
  }
  if (!dl_device.is_none()) {
    const auto [type, id] = dl_device.cast<std::pair<std::int32_t, std::int32_t>>();
    if (dlpack::Device{type, id} != tensor.device) {
      throw py::buffer_error("this memory is exported in place; it cannot go to another device");
    }
  }
  if (tensor.device.type == dlpack::kCuda) {
    const std::optional<Stream> consumer = consumer_stream(stream);
    if (consumer && tensor.order_consumer) {
      const py::gil_scoped_release release;
      tensor.order_consumer(*consumer);
    }
  }
  const bool versioned =
      !max_version.is_none() &&
      max_version.cast<std::pair<std::uint32_t, std::uint32_t>>().first >= dlpack::kMajorVersion;
  return versioned ? make_capsule<dlpack::ManagedTensorVersioned>(tensor, dlpack::kVersionedName)
                   : make_capsule<dlpack::ManagedTensor>(tensor, dlpack::kLegacyName);
}

py::tuple dlpack_device(const TensorExport& tensor) {
  return py::make_tuple(tensor.device.type, tensor.device.id);
}

py::object export_numpy(const TensorExport& tensor, dlpack::DataType dtype) {
  if (tensor.device.type != dlpack::kCpu) {
    throw Error(ErrorCode::invalid_argument,
                "numpy can only view memory of the CPU, and this is on " + name_of(tensor.device) +
                    "; take it by DLPack, as torch.from_dlpack and cupy.from_dlpack do");
  }
  if (dtype.bits != tensor.dtype.bits) {
    throw Error(ErrorCode::invalid_argument, "a view of " + name_of(tensor.dtype) + " as " +
                                                 name_of(dtype) + " would change the item size");
  }
  if (dtype.code == dlpack::kBfloat) {
    throw Error(ErrorCode::invalid_argument,
                "numpy has no bfloat16; view the memory as uint16 instead");
  }
  const auto item = static_cast<py::ssize_t>(dtype.bits / 8);
  std::vector<py::ssize_t> strides(tensor.strides.begin(), tensor.strides.end());
  for (py::ssize_t& stride : strides) stride *= item;
  const std::vector<py::ssize_t> shape(tensor.shape.begin(), tensor.shape.end());
  auto owner = std::make_unique<std::shared_ptr<void>>(tensor.owner);
  py::capsule base(owner.get(),
                   [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); });
  owner.release();
  return py::array(py::dtype(name_of(dtype)), shape, strides, tensor.data, base);
}

}  // namespace pipelive::bindings
