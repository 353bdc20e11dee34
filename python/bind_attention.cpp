#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "cuda_layers.hpp"
#include "pipelive/attention/layer_attention.hpp"
#include "pipelive/base/error.hpp"
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

/// The KV that an operation works on: a layer of a pool, or any tensor of five axes.
struct KVArgument {
  std::optional<LayerView> layer;
  std::optional<TensorView> tensor;
  KVView view;  ///< of `tensor`

  explicit KVArgument(py::handle object) {
    if (py::isinstance<LayerView>(object)) {
      layer = py::cast<const LayerView&>(object);
      return;
    }
    tensor = TensorView::borrow(object, "kv");
    tensor->require_cpu();
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
};

TensorView borrow_tokens(py::handle object, const char* argument) {
  TensorView tensor = TensorView::borrow(object, argument);
  tensor.require_cpu();
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

/// A contiguous vector of int32 of that length; -1: any.
TensorView borrow_vector(py::handle object, const char* argument, std::int64_t length) {
  TensorView tensor = TensorView::borrow(object, argument);
  tensor.require_cpu();
  tensor.require_dtype(dtypes::int32);
  tensor.require_shape(std::vector<std::int64_t>{length});
  tensor.require_contiguous();
  return tensor;
}

std::optional<Isa> isa_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return isa_from_name(*name);
}

void append_tokens(py::handle kv, py::handle key, py::handle value, py::handle slots,
                   const std::optional<std::string>& isa, py::handle stream, py::handle marks) {
  if (append_on_gpu(kv, key, value, slots, stream, marks)) return;
  if (!marks.is_none()) {
    throw Error(ErrorCode::invalid_argument, "marks are made by a GPU, and kv lies in host memory");
  }
  const KVArgument kv_argument(kv);
  if (kv_argument.tensor) kv_argument.tensor->require_writable();
  const TensorView keys = borrow_tokens(key, "key");
  const TensorView values = borrow_tokens(value, "value");
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

void attend(py::handle query, py::handle kv, py::handle block_tables, py::handle seq_lens,
            py::handle out, py::handle lse, double scale, py::handle query_start,
            std::int64_t window, double soft_cap, py::handle block_map,
            std::optional<std::int64_t> threads, const std::optional<std::string>& isa) {
  const KVArgument kv_argument(kv);
  const TensorView queries = borrow_tokens(query, "query");
  const TensorView outs = borrow_tokens(out, "out");
  outs.require_writable();
  const TensorView tables = TensorView::borrow(block_tables, "block_tables");
  tables.require_cpu();
  tables.require_dtype(dtypes::int32);
  tables.require_ndim(2);
  require_contiguous_last(tables);
  if (tables.stride(0) < 0) {
    refuse("block_tables: stride of sequences", std::to_string(tables.stride(0)), "0 or more");
  }
  const std::int64_t num_seqs = tables.shape(0);
  const TensorView lens = borrow_vector(seq_lens, "seq_lens", num_seqs);

  AttentionArgs args;
  args.query = tokens_of(queries);
  args.kv = kv_argument.view;
  args.out = tokens_of(outs);
  args.num_seqs = num_seqs;
  args.block_tables = tables.data_as<const std::int32_t>();
  args.table_width = tables.shape(1);
  args.table_stride = tables.stride(0);
  args.seq_lens = lens.data_as<const std::int32_t>();
  std::optional<TensorView> lses;
  if (!lse.is_none()) {
    lses = TensorView::borrow(lse, "lse");
    lses->require_writable();
    lses->require_shape(std::vector<std::int64_t>{args.query.tokens, args.query.heads});
    args.lse = lses->flat<float>(dtypes::float32).data();
  }
  std::optional<TensorView> starts;
  if (!query_start.is_none()) {
    starts = borrow_vector(query_start, "query_start", num_seqs + 1);
    args.query_start = starts->data_as<const std::int32_t>();
  } else if (num_seqs != args.query.tokens) {
    refuse("query: number of tokens", std::to_string(args.query.tokens),
           "block_tables' " + std::to_string(num_seqs) +
               " sequences, one token each, without query_start");
  }
  std::optional<TensorView> map;
  if (!block_map.is_none()) {
    map = borrow_vector(block_map, "block_map", -1);
    if (map->num_elements() == 0) refuse("block_map: length", "0", "1 or more");
    args.block_map = {map->data_as<const std::int32_t>(),
                      static_cast<std::size_t>(map->num_elements())};
  }
  args.scale = scale;
  args.window = window;
  args.soft_cap = soft_cap;
  if (threads) {
    if (*threads < 1 || *threads > 1024) {
      refuse("threads", std::to_string(*threads), "None or 1 to 1024");
    }
    args.threads = static_cast<unsigned>(*threads);
  }
  args.isa = isa_of(isa);
  const py::gil_scoped_release released;
  if (kv_argument.layer) {
    paged_attention(*kv_argument.layer, args);
  } else {
    paged_attention(args);
  }
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
        py::arg("marks") = py::none());
  m.def("attention_forward", &attend, py::arg("query"), py::arg("kv"), py::arg("block_tables"),
        py::arg("seq_lens"), py::arg("out"), py::arg("lse"), py::arg("scale"),
        py::arg("query_start") = py::none(), py::arg("window") = 0, py::arg("soft_cap") = 0.0,
        py::arg("block_map") = py::none(), py::arg("threads") = py::none(),
        py::arg("isa") = py::none());
  m.def("attention_isas", &isa_names);
}

}  // namespace pipelive::bindings
