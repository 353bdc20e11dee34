#include "bindings.hpp"

namespace pipelive::bindings {

void bind_transport(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
