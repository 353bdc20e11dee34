#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "cuda_layers.hpp"
#include "pipelive/attention/layer_attention.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/attention.hpp"
#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/slot_copier.hpp"
#include "pipelive/cuda/slot_kernels.hpp"
#include "stream_arg.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& value,
                         const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, argument + " is " + value + ", expected " + expected);
}

DType kv_dtype_of(const TensorView& tensor) {
  const std::optional<DType> dtype = to_kv_dtype(tensor.dtype());
  if (!dtype) {
    refuse(tensor.argument() + ": dtype", name_of(tensor.dtype()), "float32, float16 or bfloat16");
  }
  return *dtype;
}

void require_contiguous_last(const TensorView& tensor) {
  const std::size_t last = tensor.ndim() - 1;
  if (tensor.shape(last) > 1 && tensor.stride(last) != 1) {
    refuse(tensor.argument() + ": stride of the last axis", std::to_string(tensor.stride(last)),
           "1");
  }
}

/// The device that an operation's tensors lie on: the host, or a GPU by its number.
using Place = std::optional<int>;

Place place_of(const TensorView& tensor) {
  if (tensor.device().type != dlpack::kCuda) return std::nullopt;
  return tensor.device().id;
}

void require_place(const TensorView& tensor, Place place) {
  if (!place) {
    tensor.require_cpu();
  } else if (place_of(tensor) != place) {
    refuse(tensor.argument(), "on " + name_of(tensor.device()),
           "cuda:" + std::to_string(*place) + ", where kv is");
  }
}

/// The KV that an operation works on: a layer of a pool, or any tensor of five axes.
struct KVArgument {
  std::optional<LayerView> layer;
  std::optional<TensorView> tensor;
  Place place;
  KVView view;  ///< of a layer on the host the operation makes it

  explicit KVArgument(py::handle object) {
    if (py::isinstance<LayerView>(object)) {
      layer = py::cast<const LayerView&>(object);
      if (layer->device_kind() == DeviceKind::cuda) {
        place = layer->device_index();
        view = kv_view_of(*layer);
      }
      return;
    }
    tensor = TensorView::borrow(object, "kv");
    place = place_of(*tensor);
    require_place(*tensor, place);
    tensor->require_ndim(5);
    require_contiguous_last(*tensor);
    if (tensor->shape(2) != 2) {
      refuse("kv: shape", format_shape(tensor->shape()),
             "[blocks, kv_heads, 2, block_size, head_dim]");
    }
    view.base = tensor->data();
    view.dtype = kv_dtype_of(*tensor);
    view.num_blocks = tensor->shape(0);
    view.kv_heads = tensor->shape(1);
    view.block_size = tensor->shape(3);
    view.head_dim = tensor->shape(4);
    view.block_stride = tensor->stride(0);
    view.head_stride = tensor->stride(1);
    view.kv_stride = tensor->stride(2);
    view.token_stride = tensor->stride(3);
  }

  [[nodiscard]] std::shared_ptr<cuda::Kernels> kernels() const {
    return cuda::Kernels::of(layer ? cuda_context(*layer) : cuda_context(nullptr, *place));
  }
};

TensorView borrow_tokens(py::handle object, const char* argument, Place place) {
  TensorView tensor = TensorView::borrow(object, argument);
  require_place(tensor, place);
  tensor.require_ndim(3);
  require_contiguous_last(tensor);
  return tensor;
}

TokenView tokens_of(const TensorView& tensor) {
  TokenView view;
  view.data = tensor.data();
  view.dtype = kv_dtype_of(tensor);
  view.tokens = tensor.shape(0);
  view.heads = tensor.shape(1);
  view.head_dim = tensor.shape(2);
  view.token_stride = tensor.stride(0);
  view.head_stride = tensor.stride(1);
  return view;
}

/// A contiguous vector of that length; -1: any.
TensorView borrow_vector_of(py::handle object, const char* argument, dlpack::DataType dtype,
                            std::int64_t length, Place place) {
  TensorView tensor = TensorView::borrow(object, argument);
  require_place(tensor, place);
  tensor.require_dtype(dtype);
  tensor.require_shape(std::vector<std::int64_t>{length});
  tensor.require_contiguous();
  return tensor;
}
TensorView borrow_vector(py::handle object, const char* argument, std::int64_t length,
                         Place place) {
  return borrow_vector_of(object, argument, dtypes::int32, length, place);
}

std::optional<Isa> isa_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return isa_from_name(*name);
}

void append_tokens(py::handle kv, py::handle key, py::handle value, py::handle slots,
                   const std::optional<std::string>& isa, py::handle stream, py::handle marks,
                   bool ordered) {
  if (append_on_gpu(kv, key, value, slots, stream, marks, ordered)) return;
  if (!marks.is_none()) {
    throw Error(ErrorCode::invalid_argument, "marks are made by a GPU, and kv lies in host memory");
  }
  const KVArgument kv_argument(kv);
  if (kv_argument.tensor) {
    kv_argument.tensor->require_cpu();
    kv_argument.tensor->require_writable();
  }
  const TensorView keys = borrow_tokens(key, "key", std::nullopt);
  const TensorView values = borrow_tokens(value, "value", std::nullopt);
  const TensorView slot_tensor = TensorView::borrow(slots, "slots");
  slot_tensor.require_ndim(1);
  const std::span<const std::int64_t> slot_span =
      slot_tensor.flat<const std::int64_t>(dtypes::int64);
  const TokenView key_view = tokens_of(keys);
  const TokenView value_view = tokens_of(values);
  const std::optional<Isa> chosen = isa_of(isa);
  const py::gil_scoped_release released;
  if (kv_argument.layer) {
    append(*kv_argument.layer, key_view, value_view, slot_span, chosen);
  } else {
    append(kv_argument.view, key_view, value_view, slot_span, chosen);
  }
}

/// What paged attention takes, borrowed from Python.
struct Borrowed {
  KVArgument kv;
  TensorView query;
  std::optional<TensorView> out, tables, lens, lse, starts, map;
  AttentionArgs args;

  /// `tables_place` is where tables and lengths must lie. Without `out` the query takes its place.
  Borrowed(py::handle query_object, py::handle kv_object, py::handle block_tables,
           py::handle seq_lens, py::handle out_object, py::handle lse_object, double scale,
           py::handle query_start, std::int64_t window, double soft_cap, py::handle block_map,
           bool tables_on_host)
      : kv(kv_object), query(borrow_tokens(query_object, "query", kv.place)) {
    const Place tables_place = tables_on_host ? std::nullopt : kv.place;
    args.query = tokens_of(query);
    args.kv = kv.view;
    args.out = args.query;
    if (!out_object.is_none()) {
      out = borrow_tokens(out_object, "out", kv.place);
      out->require_writable();
      args.out = tokens_of(*out);
    }
    tables = TensorView::borrow(block_tables, "block_tables");
    require_place(*tables, tables_place);
    tables->require_dtype(dtypes::int32);
    tables->require_ndim(2);
    require_contiguous_last(*tables);
    if (tables->stride(0) < 0) {
      refuse("block_tables: stride of sequences", std::to_string(tables->stride(0)), "0 or more");
    }
    args.num_seqs = tables->shape(0);
    args.block_tables = tables->data_as<const std::int32_t>();
    args.table_width = tables->shape(1);
    args.table_stride = tables->stride(0);
    lens = borrow_vector(seq_lens, "seq_lens", args.num_seqs, tables_place);
    args.seq_lens = lens->data_as<const std::int32_t>();
    if (!lse_object.is_none()) {
      lse = TensorView::borrow(lse_object, "lse");
      require_place(*lse, kv.place);
      lse->require_writable();
      lse->require_shape(std::vector<std::int64_t>{args.query.tokens, args.query.heads});
      lse->require_dtype(dtypes::float32);
      lse->require_contiguous();
      args.lse = lse->data_as<float>();
    }
    if (!query_start.is_none()) {
      starts = borrow_vector(query_start, "query_start", args.num_seqs + 1, tables_place);
      args.query_start = starts->data_as<const std::int32_t>();
    } else if (args.num_seqs != args.query.tokens) {
      refuse("query: number of tokens", std::to_string(args.query.tokens),
             "block_tables' " + std::to_string(args.num_seqs) +
                 " sequences, one token each, without query_start");
    }
    if (!block_map.is_none()) {
      map = borrow_vector(block_map, "block_map", -1, tables_place);
      if (map->num_elements() == 0) refuse("block_map: length", "0", "1 or more");
      args.block_map = {map->data_as<const std::int32_t>(),
                        static_cast<std::size_t>(map->num_elements())};
    }
    args.scale = scale;
    args.window = window;
    args.soft_cap = soft_cap;
  }
};

Stream stream_of(py::handle stream) {
  return stream.is_none() ? cuda::kDefaultStream : stream_from(stream, "stream");
}

/// While it lives, blocks of `layer` stay; and they stay until `stream` has done what it is given
/// meanwhile. Throws where the layer is not held.
std::optional<Residency::Use> use_in(const std::optional<LayerView>& layer, Stream stream,
                                     const std::shared_ptr<void>& owner) {
  if (!layer) return std::nullopt;
  std::optional<Residency::Use> use(layer->use());
  layer->check_resident_range(0, 1);
  layer->blocks()->residency().note_stream(stream, owner);
  return use;
}

void attend_on_gpu(const Borrowed& borrowed, py::handle stream, py::handle allocate) {
  const Stream queue = stream_of(stream);
  const std::shared_ptr<void> owner = stream_owner(stream);
  const auto kernels = borrowed.kv.kernels();
  const std::size_t bytes = cuda::plan_attention(borrowed.args, kernels->limits()).workspace_bytes;
  std::optional<TensorView> workspace;
  if (bytes > 0) {
    const py::object memory = allocate(bytes);
    workspace = TensorView::borrow(memory, "workspace");
    require_place(*workspace, borrowed.kv.place);
    workspace->require_contiguous();
    workspace->require_writable();
  }
  const py::gil_scoped_release released;
  const auto use = use_in(borrowed.kv.layer, queue, owner);
  cuda::paged_attention(*kernels, borrowed.args, workspace ? workspace->data() : nullptr,
                        workspace ? workspace->num_bytes() : 0,
                        static_cast<cuda::StreamHandle>(queue.handle));
}

void attend(py::handle query, py::handle kv, py::handle block_tables, py::handle seq_lens,
            py::handle out, py::handle lse, double scale, py::handle query_start,
            std::int64_t window, double soft_cap, py::handle block_map,
            std::optional<std::int64_t> threads, const std::optional<std::string>& isa,
            py::handle stream, py::handle allocate) {
  Borrowed borrowed(query, kv, block_tables, seq_lens, out, lse, scale, query_start, window,
                    soft_cap, block_map, false);
  AttentionArgs& args = borrowed.args;
  if (threads) {
    if (*threads < 1 || *threads > 1024) {
      refuse("threads", std::to_string(*threads), "None or 1 to 1024");
    }
    args.threads = static_cast<unsigned>(*threads);
  }
  if (borrowed.kv.place) {
    if (isa) refuse("isa", "'" + *isa + "'", "None, since kv lies on a GPU");
    attend_on_gpu(borrowed, stream, allocate);
    return;
  }
  if (!stream.is_none()) {
    refuse("stream", py::repr(stream).cast<std::string>(), "None, since kv lies in host memory");
  }
  args.isa = isa_of(isa);
  const py::gil_scoped_release released;
  if (borrowed.kv.layer) {
    paged_attention(*borrowed.kv.layer, args);
  } else {
    paged_attention(args);
  }
}

/// All that the host can check, with tables and lengths in its memory.
void validate_call(py::handle query, py::handle kv, py::handle block_tables, py::handle seq_lens,
                   py::handle out, double scale, py::handle query_start, std::int64_t window,
                   double soft_cap, py::handle block_map) {
  Borrowed borrowed(query, kv, block_tables, seq_lens, out, py::none(), scale, query_start, window,
                    soft_cap, block_map, true);
  const py::gil_scoped_release released;
  std::optional<Residency::Use> use;
  if (borrowed.kv.layer) {
    use.emplace(borrowed.kv.layer->use());
    borrowed.args.kv = kv_view_of(*borrowed.kv.layer);
  }
  validate(borrowed.args);
}

/// See cuda::check_tables; the default of `resident` is what is resident now.
void check_tables(py::handle query, py::handle kv, py::handle block_tables, py::handle seq_lens,
                  py::handle query_start, std::int64_t window, py::handle block_map,
                  std::optional<std::int64_t> resident, py::handle report, py::handle stream) {
  const Borrowed borrowed(query, kv, block_tables, seq_lens, py::none(), py::none(), 1.0,
                          query_start, window, 0.0, block_map, false);
  if (!borrowed.kv.place) refuse("kv", "in host memory", "memory of a GPU");
  const Stream queue = stream_of(stream);
  TensorView counts = borrow_vector_of(report, "report", dtypes::int64, 2, borrowed.kv.place);
  const auto& layer = borrowed.kv.layer;
  const std::int64_t blocks = resident ? *resident
                              : layer  ? static_cast<std::int64_t>(layer->resident_blocks())
                                       : borrowed.args.kv.num_blocks;
  const auto kernels = borrowed.kv.kernels();
  const py::gil_scoped_release released;
  cuda::check_tables(*kernels, borrowed.args, blocks, counts.data_as<std::uint64_t>(),
                     static_cast<cuda::StreamHandle>(queue.handle));
}

py::tuple isa_names() {
  py::list names;
  for (const Isa isa : available_isas()) names.append(std::string(to_string(isa)));
  return py::tuple(names);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_append", &append_tokens, py::arg("kv"), py::arg("key"), py::arg("value"),
        py::arg("slots"), py::arg("isa") = py::none(), py::arg("stream") = py::none(),
        py::arg("marks") = py::none(), py::arg("ordered") = false);
  m.def("attention_forward", &attend, py::arg("query"), py::arg("kv"), py::arg("block_tables"),
        py::arg("seq_lens"), py::arg("out"), py::arg("lse"), py::arg("scale"),
        py::arg("query_start") = py::none(), py::arg("window") = 0, py::arg("soft_cap") = 0.0,
        py::arg("block_map") = py::none(), py::arg("threads") = py::none(),
        py::arg("isa") = py::none(), py::arg("stream") = py::none(),
        py::arg("allocate") = py::none());
  m.def("attention_validate", &validate_call, py::arg("query"), py::arg("kv"),
        py::arg("block_tables"), py::arg("seq_lens"), py::arg("out"), py::arg("scale"),
        py::arg("query_start"), py::arg("window"), py::arg("soft_cap"), py::arg("block_map"));
  m.def("attention_check_tables", &check_tables, py::arg("query"), py::arg("kv"),
        py::arg("block_tables"), py::arg("seq_lens"), py::arg("query_start"), py::arg("window"),
        py::arg("block_map"), py::arg("resident"), py::arg("report"), py::arg("stream"));
  m.def("set_nvrtc_libraries", &cuda::set_nvrtc_libraries, py::arg("libraries"));
  // For tests, which take a driver down.
  m.def(
      "cuda_forget_kernels",
      [] {
        cuda::CudaSlotCopier::forget();
        cuda::SlotKernels::forget();
        cuda::Kernels::forget();
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("attention_isas", &isa_names);
}

}  // namespace pipelive::bindings
