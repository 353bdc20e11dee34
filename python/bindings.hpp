#pragma once

#include <pybind11/pybind11.h>

// One function per layer of the core; each registers the classes of its layer. Bindings convert
// arguments and release the GIL; logic belongs in the core or in the Python package.
namespace pipelive::bindings {

void bind_errors(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_kv(pybind11::module_& m);
void bind_tracker(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_transport(pybind11::module_& m);
void bind_migration(pybind11::module_& m);
void bind_build_info(pybind11::module_& m);

}  // namespace pipelive::bindings
