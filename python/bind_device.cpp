#include "bindings.hpp"

namespace pipelive::bindings {

void bind_device(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
