#include "cuda_attention.hpp"

#include <string>
#include <vector>

#include "attention_arguments.hpp"
#include "cuda_layers.hpp"
#include "pipelive/cuda/attention.hpp"
#include "stream_arg.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

StreamArgument stream_of(py::handle stream) {
  const Stream queue = stream.is_none() ? cuda::kDefaultStream : stream_from(stream, "stream");
  return {queue, static_cast<cuda::StreamHandle>(queue.handle)};
}

}  // namespace
}  // namespace pipelive::bindings
