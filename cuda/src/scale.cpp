#include "pipelive/cuda/scale.hpp"

#include <algorithm>
#include <array>
#include <cstdint>

namespace pipelive::cuda {

void scale(const std::shared_ptr<const Driver>& driver, int device,
           std::span<const std::byte> image, std::span<float> values, float factor) {
  constexpr std::size_t kThreads = 256;
  constexpr std::size_t kMaxBlocks = 4096;  // the kernel strides over the rest
  if (values.empty()) return;

  const PrimaryContext context(driver, device);
  const ContextScope scope(context);
  const Module module(*driver, image);
  const FunctionHandle kernel = module.function("pipelive_scale_f32");
  const DeviceBuffer buffer(*driver, values.size_bytes());

  const DriverApi& api = driver->api();
  driver->check(api.memcpy_to_device(buffer.pointer(), values.data(), values.size_bytes()),
                "cuMemcpyHtoD");
  DevicePointer pointer = buffer.pointer();
  std::uint64_t count = values.size();
  std::array<void*, 3> parameters{&pointer, &factor, &count};
  const auto blocks =
      static_cast<unsigned>(std::min((values.size() + kThreads - 1) / kThreads, kMaxBlocks));
  driver->check(api.launch_kernel(kernel, blocks, 1, 1, kThreads, 1, 1, 0, nullptr,
                                  parameters.data(), nullptr),
                "cuLaunchKernel(pipelive_scale_f32)");
  driver->check(api.stream_synchronize(nullptr), "cuStreamSynchronize");
  driver->check(api.memcpy_to_host(values.data(), buffer.pointer(), values.size_bytes()),
                "cuMemcpyDtoH");
}

}  // namespace pipelive::cuda
