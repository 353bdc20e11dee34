#include "bindings.hpp"

namespace pipelive::bindings {

void bind_migration(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
