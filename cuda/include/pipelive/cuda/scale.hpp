#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "pipelive/cuda/driver.hpp"

namespace pipelive::cuda {

/// Multiplies `values` by `factor` on a device and waits for the result: the smallest whole path
/// from an embedded kernel to a result, so that an installation can be checked.
///
/// `image` is a fatbin with the kernel of scale.cu. Throws Error(invalid_argument) for a device
/// that is not there, Error(device) or Error(out_of_memory) if a call fails; `values` are then as
/// before, unless it was the copy back that failed.
void scale(const std::shared_ptr<const Driver>& driver, int device,
           std::span<const std::byte> image, std::span<float> values, float factor);

}  // namespace pipelive::cuda
