#include "bindings.hpp"

namespace pipelive::bindings {

void bind_kv(pybind11::module_& /*m*/) {}

}  // namespace pipelive::bindings
