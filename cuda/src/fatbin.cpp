#include "pipelive/cuda/fatbin.hpp"

#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive::cuda {

const Fatbin& fatbin(std::string_view name) {
  for (const Fatbin& entry : fatbins()) {
    if (entry.name == name) return entry;
  }
  throw Error(ErrorCode::device, "the CUDA kernels '" + std::string(name) +
                                     "' are not in this build" +
                                     (fatbins().empty() ? ": it was compiled without nvcc" : ""));
}

}  // namespace pipelive::cuda
