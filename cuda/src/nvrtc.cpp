#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/fatbin.hpp"
namespace pipelive::cuda { std::vector<std::byte> kernel_image(const KernelFile& f, const DeviceLimits&) { auto b = fatbin(f.name).bytes; return {b.begin(), b.end()}; } }
