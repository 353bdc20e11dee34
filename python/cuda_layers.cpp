#include "cuda_layers.hpp"

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/append.hpp"
#include "pipelive/cuda/slot_copier.hpp"
#include "stream_arg.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& value,
                         const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, argument + " is " + value + ", expected " + expected);
}

// The system driver's contexts, once used never given back: the driver may be gone at the end.
std::shared_ptr<const cuda::PrimaryContext> default_context(int ordinal) {
  static std::mutex mutex;
  static auto& contexts = *new std::map<int, std::shared_ptr<const cuda::PrimaryContext>>;
  const std::lock_guard lock(mutex);
  std::shared_ptr<const cuda::PrimaryContext>& context = contexts[ordinal];
  if (!context) {
    context = std::make_shared<const cuda::PrimaryContext>(cuda::Driver::open(), ordinal);
  }
  return context;
}

TensorView borrow_on(py::handle object, const char* argument, int ordinal,
                     std::optional<std::intptr_t> consumer) {
  TensorView tensor = TensorView::borrow(object, argument, consumer);
  const dlpack::Device wanted{dlpack::kCuda, ordinal};
  if (tensor.device() != wanted) {
    refuse(argument, "on " + name_of(tensor.device()), name_of(wanted) + ", where kv is");
  }
  return tensor;
}

DType kv_dtype(const TensorView& tensor) {
  const std::optional<DType> dtype = to_kv_dtype(tensor.dtype());
  if (!dtype) {
    refuse(tensor.argument() + ": dtype", name_of(tensor.dtype()), "float32, float16 or bfloat16");
  }
  return *dtype;
}

void require_last(const TensorView& tensor) {
  const std::size_t last = tensor.ndim() - 1;
  if (tensor.shape(last) > 1 && tensor.stride(last) != 1) {
    refuse(tensor.argument() + ": stride of the last axis", std::to_string(tensor.stride(last)),
           "1");
  }
}

TokenView tokens_of(const TensorView& tensor) {
  tensor.require_ndim(3);
  require_last(tensor);
  return {tensor.data(),   kv_dtype(tensor), tensor.shape(0), tensor.shape(1),
          tensor.shape(2), tensor.stride(0), tensor.stride(1)};
}

KVView kv_of(const TensorView& tensor) {
  tensor.require_ndim(5);
  tensor.require_writable();
  require_last(tensor);
  if (tensor.shape(2) != 2) {
    refuse("kv: shape", format_shape(tensor.shape()),
           "[blocks, kv_heads, 2, block_size, head_dim]");
  }
  KVView view;
  view.base = tensor.data();
  view.dtype = kv_dtype(tensor);
  view.num_blocks = tensor.shape(0);
  view.kv_heads = tensor.shape(1);
  view.block_size = tensor.shape(3);
  view.head_dim = tensor.shape(4);
  view.block_stride = tensor.stride(0);
  view.head_stride = tensor.stride(1);
  view.kv_stride = tensor.stride(2);
  view.token_stride = tensor.stride(3);
  return view;
}

/// Where a tensor of another library lies; none for the host and for what lends nothing.
std::optional<int> gpu_of(py::handle object) {
  if (!py::hasattr(object, "__dlpack_device__")) return std::nullopt;
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  if (device.first != dlpack::kCuda) return std::nullopt;
  return device.second;
}

}  // namespace

std::shared_ptr<const cuda::PrimaryContext> cuda_context(const Device* device, int ordinal) {
  const auto* gpu = dynamic_cast<const cuda::CudaDevice*>(device);
  return gpu != nullptr ? gpu->context() : default_context(ordinal);
}

std::shared_ptr<const cuda::PrimaryContext> cuda_context(const LayerView& layer) {
  const auto* pool = dynamic_cast<const KVPool*>(layer.blocks().get());
  return cuda_context(pool != nullptr ? pool->device().get() : nullptr, layer.device_index());
}

std::shared_ptr<SlotCopier> copier_for(const LayerView& layer) {
  if (layer.device_kind() == DeviceKind::host) return nullptr;
  return cuda::CudaSlotCopier::lend(cuda_context(layer));
}

bool append_on_gpu(py::handle kv, py::handle key, py::handle value, py::handle slots,
                   py::handle stream, py::handle marks, bool ordered) {
  std::optional<LayerView> layer;
  std::optional<int> ordinal;
  if (py::isinstance<LayerView>(kv)) {
    layer = py::cast<const LayerView&>(kv);
    if (layer->device_kind() == DeviceKind::cuda) ordinal = layer->device_index();
  } else {
    ordinal = gpu_of(kv);
  }
  if (!ordinal) return false;
  const Stream queue = stream.is_none() ? cuda::kDefaultStream : stream_from(stream, "stream");
  const std::shared_ptr<void> owner = stream_owner(stream);
  const auto consumer = reinterpret_cast<std::intptr_t>(queue.handle);
  // An order that is there already would cost an event and a wait for each of them.
  const std::optional<std::intptr_t> orders =
      ordered ? std::nullopt : std::optional<std::intptr_t>(consumer);
  std::optional<TensorView> tensor;
  KVView view;
  if (!layer) {
    tensor = borrow_on(kv, "kv", *ordinal, consumer);
    view = kv_of(*tensor);
  }
  const TensorView keys = borrow_on(key, "key", *ordinal, orders);
  const TensorView values = borrow_on(value, "value", *ordinal, orders);
  const TensorView slot_tensor = borrow_on(slots, "slots", *ordinal, orders);
  slot_tensor.require_dtype(dtypes::int64);
  slot_tensor.require_ndim(1);
  slot_tensor.require_contiguous();
  const TokenView key_view = tokens_of(keys);
  const TokenView value_view = tokens_of(values);
  std::shared_ptr<cuda::DeviceMarks> marked;
  if (!marks.is_none()) marked = marks.cast<std::shared_ptr<cuda::DeviceMarks>>();
  const auto handle = static_cast<cuda::StreamHandle>(queue.handle);
  const auto first = reinterpret_cast<std::uintptr_t>(slot_tensor.data());
  const std::int64_t count = slot_tensor.num_elements();
  const py::gil_scoped_release released;
  const auto kernels =
      cuda::SlotKernels::of(layer ? cuda_context(*layer) : cuda_context(nullptr, *ordinal));
  if (layer) {
    cuda::append(*kernels, *layer, key_view, value_view, first, count, handle, marked.get(), owner);
  } else {
    cuda::append(*kernels, view, key_view, value_view, first, count, handle, marked.get());
  }
  return true;
}

}  // namespace pipelive::bindings
