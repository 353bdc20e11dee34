// The slot kernels inside the stand-in for libcuda, for tests that can only load it (Python's).
#include "fake_driver.hpp"
#include "fake_state.hpp"
#include "slots_emulation.hpp"

namespace pipelive::cuda {
namespace {

void run(const char* name, unsigned grid, unsigned block, const void* parameter) {
  void* parameters[] = {const_cast<void*>(parameter)};
  if (!test::emulate_slot_kernel(name, grid, block, parameters)) {
    fake::mistake(std::string("a wrong launch of ") + name);
  }
}

}  // namespace

FAKE_EXPORT void fake_driver_slot_kernels() {
  for (const std::string& name : test::slot_kernel_names()) {
    fake::state().kernels[name] = {test::slot_kernel_bytes(name), &run};
  }
}

}  // namespace pipelive::cuda
