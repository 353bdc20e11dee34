#include "bindings.hpp"

namespace pipelive::bindings {

void bind_attention(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
