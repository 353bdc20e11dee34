#pragma once

#include <cstddef>
#include <string>
#include <vector>

// The slot kernels, run on the CPU: what a thread does is the code that the device runs (the *_math
// headers), only the barriers and sums in between are written again here.
namespace pipelive::cuda::test {

/// Runs a kernel as cuLaunchKernel would; false where there is none of that name, and where an
/// append read keys, values or slots of more tokens than there are.
bool emulate_slot_kernel(const std::string& name, unsigned grid, unsigned block, void** parameters);

/// Asked before gather and scatter touch a slot of a layer; where it says no, the kernel does
/// nothing, and returns false in place of the above.
using SlotAccess = bool(std::size_t address, std::size_t bytes, bool write);
void check_slot_access(SlotAccess* check);

/// The size of a kernel's one parameter; 0 for a name that is none's.
[[nodiscard]] std::size_t slot_kernel_bytes(const std::string& name);

/// The names of all of them.
[[nodiscard]] const std::vector<std::string>& slot_kernel_names();

}  // namespace pipelive::cuda::test
