#include "bindings.hpp"

namespace pipelive::bindings {

void bind_tracker(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
