#include "tensor_view.hpp"

#include <limits>
#include <utility>

#include "pipelive/base/error.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

std::vector<std::int64_t> contiguous_strides(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = step;
    step *= shape[axis];
  }
  return strides;
}

template <typename Managed>
std::shared_ptr<void> own(Managed* managed) {
  return {static_cast<void*>(managed), [](void* pointer) {
            auto* tensor = static_cast<Managed*>(pointer);
            if (tensor->deleter == nullptr) return;
            const py::gil_scoped_acquire gil;
            tensor->deleter(tensor);
          }};
}

// torch says it without a tuple being made, which on the host would double the cost of borrowing.
bool on_cuda(py::handle object) {
  if (py::hasattr(object, "is_cuda")) return object.attr("is_cuda").cast<bool>();
  if (py::isinstance<py::buffer>(object) || !py::hasattr(object, "__dlpack_device__")) return false;
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<std::int32_t, int>>();
  return device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged;
}

dlpack::DataType dtype_of_format(const char* format, py::ssize_t item_bytes,
                                 const std::string& argument) {
  std::string text = format == nullptr ? "B" : format;
  if (!text.empty() && (text[0] == '@' || text[0] == '=' || text[0] == '<')) text.erase(0, 1);
  const auto bits = static_cast<std::uint8_t>(item_bytes * 8);
  if (text.size() == 1) {
    const char code = text[0];
    if (std::string("bhilqn").find(code) != std::string::npos) return {dlpack::kInt, bits, 1};
    if (std::string("BHILQNc").find(code) != std::string::npos) return {dlpack::kUInt, bits, 1};
    if (std::string("efd").find(code) != std::string::npos) return {dlpack::kFloat, bits, 1};
    if (code == '?') return {dlpack::kBool, bits, 1};
  }
  fail(argument + " is a buffer of format '" + text + "', expected plain numbers");
}

}  // namespace

std::string name_of(dlpack::Device device) {
  switch (device.type) {
    case dlpack::kCpu:
      return "cpu";
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      return "cuda:" + std::to_string(device.id);
    default:
      return "a device of DLPack type " + std::to_string(device.type);
  }
}

std::string name_of(dlpack::DataType dtype) {
  std::string name;
  switch (dtype.code) {
    case dlpack::kInt:
      name = "int";
      break;
    case dlpack::kUInt:
      name = "uint";
      break;
    case dlpack::kFloat:
      name = "float";
      break;
    case dlpack::kBfloat:
      name = "bfloat";
      break;
    case dlpack::kComplex:
      name = "complex";
      break;
    case dlpack::kBool:
      return "bool";
    default:
      name = "type code " + std::to_string(dtype.code) + " of bits ";
  }
  name += std::to_string(dtype.bits);
  if (dtype.lanes != 1) name += "x" + std::to_string(dtype.lanes);
  return name;
}

dlpack::DataType dtype_from_name(const std::string& name, const char* argument) {
  for (const std::uint8_t bits : {8, 16, 32, 64}) {
    for (const std::uint8_t code : {dlpack::kInt, dlpack::kUInt, dlpack::kFloat, dlpack::kBfloat}) {
      const bool exists = code == dlpack::kBfloat  ? bits == 16
                          : code == dlpack::kFloat ? bits >= 16
                                                   : true;
      const dlpack::DataType dtype{code, bits, 1};
      if (exists && name_of(dtype) == name) return dtype;
    }
  }
  if (name == "bool") return {dlpack::kBool, 8, 1};
  fail(std::string(argument) + " is '" + name +
       "', expected the name of a number type such as 'bfloat16', 'float32' or 'int64'");
}

dlpack::DataType to_dlpack(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return dtypes::float32;
    case DType::float16:
      return dtypes::float16;
    case DType::bfloat16:
      return dtypes::bfloat16;
  }
  return dtypes::bfloat16;
}

std::optional<DType> to_kv_dtype(dlpack::DataType dtype) {
  for (const DType kv : {DType::float32, DType::float16, DType::bfloat16}) {
    if (to_dlpack(kv) == dtype) return kv;
  }
  return std::nullopt;
}

std::string format_shape(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (axis > 0) text += ", ";
    text += shape[axis] < 0 ? "*" : std::to_string(shape[axis]);
  }
  return text + "]";
}

TensorView TensorView::borrow(py::handle object, const char* argument,
                              std::optional<std::intptr_t> consumer) {
  TensorView view;
  view.argument_ = argument;
  if (py::hasattr(object, "__dlpack__")) {
    const py::object method = object.attr("__dlpack__");
    // Memory of the host knows no streams, and numpy refuses one that is named.
    py::dict stream;
    if (on_cuda(object)) stream["stream"] = py::int_(consumer.value_or(-1));
    py::object capsule;
    try {
      capsule = method(
          py::arg("max_version") = py::make_tuple(dlpack::kMajorVersion, dlpack::kMinorVersion),
          **stream);
    } catch (py::error_already_set& error) {
      // Libraries from before DLPack 1.0 do not know the keyword.
      if (!error.matches(PyExc_TypeError)) throw;
      capsule = method(**stream);
    }
    view.from_capsule(std::move(capsule));
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    view.from_buffer(object);
  } else {
    throw py::type_error(std::string(argument) + " is a " +
                         std::string(py::str(py::type::of(object).attr("__name__"))) +
                         ", expected a tensor or an array (an object with __dlpack__ or a buffer)");
  }
  return view;
}

void TensorView::from_capsule(py::object capsule) {
  PyObject* raw = capsule.ptr();
  if (PyCapsule_IsValid(raw, dlpack::kVersionedName) != 0) {
    auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(
        PyCapsule_GetPointer(raw, dlpack::kVersionedName));
    if (managed->version.major != dlpack::kMajorVersion) {
      fail(argument_ + " exports DLPack " + std::to_string(managed->version.major) +
           ".x, expected 1.x");
    }
    // The rename hands the deleter over to us; before it the capsule still owns the tensor.
    if (PyCapsule_SetName(raw, dlpack::kVersionedUsedName) != 0) throw py::error_already_set();
    owner_ = own(managed);
    read_only_ = (managed->flags & dlpack::kFlagReadOnly) != 0;
    adopt(managed->tensor);
  } else if (PyCapsule_IsValid(raw, dlpack::kLegacyName) != 0) {
    auto* managed =
        static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(raw, dlpack::kLegacyName));
    if (PyCapsule_SetName(raw, dlpack::kLegacyUsedName) != 0) throw py::error_already_set();
    owner_ = own(managed);
    adopt(managed->tensor);
  } else {
    throw py::type_error(argument_ + ": __dlpack__ returned no unused DLPack capsule");
  }
}

void TensorView::adopt(const dlpack::Tensor& tensor) {
  if (tensor.dtype.lanes != 1 || tensor.dtype.bits == 0 || tensor.dtype.bits % 8 != 0) {
    fail(argument_ + " has elements of type " + name_of(tensor.dtype) +
         ", expected one number of whole bytes each");
  }
  if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
    fail(argument_ + " has " + std::to_string(tensor.ndim) + " axes and no shape");
  }
  if (tensor.device.type == dlpack::kCudaManaged) {
    // It moves between the host and the GPUs whenever one of them touches it.
    fail(argument_ + " lies in managed memory of " + name_of(tensor.device) +
         ", expected memory of the CPU or of one GPU");
  }
  device_ = tensor.device;
  dtype_ = tensor.dtype;
  data_ = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  if (tensor.data == nullptr) data_ = nullptr;
  if (tensor.ndim > 0) shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides != nullptr && tensor.ndim > 0) {
    strides_.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    strides_ = contiguous_strides(shape_);
  }
}

void TensorView::from_buffer(py::handle object) {
  const auto release = [](Py_buffer* buffer) {
    const py::gil_scoped_acquire gil;
    PyBuffer_Release(buffer);
    delete buffer;
  };
  auto raw = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), raw.get(), PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    throw py::error_already_set();
  }
  const std::shared_ptr<Py_buffer> buffer(raw.release(), release);
  dtype_ = dtype_of_format(buffer->format, buffer->itemsize, argument_);
  data_ = static_cast<std::byte*>(buffer->buf);
  read_only_ = buffer->readonly != 0;
  shape_.assign(buffer->shape, buffer->shape + buffer->ndim);
  strides_.reserve(shape_.size());
  for (int axis = 0; axis < buffer->ndim; ++axis) {
    if (buffer->strides[axis] % buffer->itemsize != 0) {
      fail(argument_ + " has a stride that is no multiple of its item size");
    }
    strides_.push_back(buffer->strides[axis] / buffer->itemsize);
  }
  owner_ = buffer;
}

std::int64_t TensorView::num_elements() const noexcept {
  std::int64_t count = 1;
  for (const std::int64_t length : shape_) count *= length;
  return count;
}

bool TensorView::contiguous() const noexcept {
  if (num_elements() == 0) return true;  // the strides of an empty tensor mean nothing
  std::int64_t step = 1;
  for (std::size_t axis = shape_.size(); axis-- > 0;) {
    if (shape_[axis] != 1 && strides_[axis] != step) return false;
    step *= shape_[axis];
  }
  return true;
}

void TensorView::require_cpu() const {
  if (!on_cpu()) {
    fail(argument_ + " lies on " + name_of(device_) + ", expected memory of the CPU");
  }
}

void TensorView::require_dtype(dlpack::DataType dtype) const {
  if (dtype_ != dtype) {
    fail(argument_ + " has dtype " + name_of(dtype_) + ", expected " + name_of(dtype));
  }
}

void TensorView::require_ndim(std::size_t ndim) const {
  if (shape_.size() != ndim) {
    fail(argument_ + " has shape " + format_shape(shape_) + ", expected " + std::to_string(ndim) +
         " axes");
  }
}

void TensorView::require_shape(std::span<const std::int64_t> shape) const {
  bool same = shape.size() == shape_.size();
  for (std::size_t axis = 0; same && axis < shape.size(); ++axis) {
    same = shape[axis] < 0 || shape[axis] == shape_[axis];
  }
  if (!same) {
    fail(argument_ + " has shape " + format_shape(shape_) + ", expected " + format_shape(shape));
  }
}

void TensorView::require_contiguous() const {
  if (!contiguous()) {
    fail(argument_ + " has shape " + format_shape(shape_) + " and strides " +
         format_shape(strides_) + ", expected a contiguous tensor");
  }
}

void TensorView::require_writable() const {
  if (read_only_) fail(argument_ + " is read-only, expected a tensor that can be written");
}

}  // namespace pipelive::bindings
