#include "bindings.hpp"

namespace pipelive::bindings {

void bind_build_info(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
