#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace pipelive::bindings {

/// What attention_forward takes, as Python gave it.
struct AttentionCall {
  pybind11::handle query;
  pybind11::handle kv;
  pybind11::handle block_tables;
  pybind11::handle seq_lens;
  pybind11::handle out;
  pybind11::handle lse;  ///< or None
  double scale = 1.0;
  pybind11::handle query_start;  ///< or None
  std::int64_t window = 0;
  double soft_cap = 0.0;
  pybind11::handle block_map;  ///< or None
};

/// The device number of the GPU that `kv` (a LayerView, or anything with `__dlpack_device__`) lies
/// on; nothing where it lies elsewhere.
[[nodiscard]] std::optional<int> gpu_of_kv(pybind11::handle kv);

/// Attention over KV on a GPU, given to `stream` (None: CUDA's default stream) and not waited for.
/// `allocate(bytes)` gives a tensor of that many bytes on that GPU, ordered in that stream; it is
/// called where scratch memory is needed. Nothing is made to wait for other streams.
void attend_on_gpu(const AttentionCall& call, int ordinal, pybind11::handle stream,
                   pybind11::handle allocate);

/// cuda::check_tables, given to `stream`; `report` is an int64 tensor of two on the GPU.
void check_tables_on_gpu(const AttentionCall& call, std::int64_t resident, pybind11::handle report,
                         pybind11::handle stream);

}  // namespace pipelive::bindings
