#include "bindings.hpp"

namespace pipelive::bindings {

void bind_memory(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
