#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  namespace bindings = pipelive::bindings;
  m.doc() = "The compiled core of pipelive_kv; use it through the package.";
  bindings::bind_errors(m);
  bindings::bind_build_info(m);
  bindings::bind_device(m);
  bindings::bind_memory(m);
  bindings::bind_kv(m);
  bindings::bind_tracker(m);
  bindings::bind_attention(m);
  bindings::bind_transport(m);
  bindings::bind_migration(m);
}
