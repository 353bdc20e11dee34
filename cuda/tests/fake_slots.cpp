// The slot kernels inside the stand-in for libcuda, for tests that can only load it (Python's).
#include "fake_driver.hpp"
#include "fake_state.hpp"
#include "slots_emulation.hpp"

namespace pipelive::cuda {
namespace {

void run(const char* name, unsigned grid, unsigned block, const void* parameter) {
  void* parameters[] = {const_cast<void*>(parameter)};
  if (!test::emulate_slot_kernel(name, grid, block, parameters)) {
    fake::mistake(std::string("a wrong launch of ") + name +
                  ", or one that ran after its memory had been unmapped");
  }
}

}  // namespace

FAKE_EXPORT void fake_driver_slot_kernels() {
  test::check_slot_access([](std::size_t address, std::size_t bytes, bool write) {
    return !fake::is_device_address(address) || fake::device_memory(address, bytes, write);
  });
  for (const std::string& name : test::slot_kernel_names()) {
    fake::state().kernels[name] = {test::slot_kernel_bytes(name), &run};
  }
}

}  // namespace pipelive::cuda
