#pragma once
#include <vector>
#include <cstddef>
#include "pipelive/cuda/kernels.hpp"
namespace pipelive::cuda { std::vector<std::byte> kernel_image(const KernelFile&, const DeviceLimits&); }
