#include "pipelive/cuda/kernels.hpp"

#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

// What a kernel may use without asking.
constexpr unsigned kPlainSharedBytes = 48 << 10;

DeviceLimits limits_of(const Driver& driver, DeviceOrdinal device) {
  const DriverApi& api = driver.api();
  const auto read = [&](DeviceAttribute attribute) {
    int value = 0;
    driver.check(api.device_get_attribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value;
  };
  DeviceLimits limits;
  limits.major = read(DeviceAttribute::compute_capability_major);
  limits.minor = read(DeviceAttribute::compute_capability_minor);
  limits.multiprocessors = read(DeviceAttribute::multiprocessor_count);
  limits.shared_bytes_per_block = read(DeviceAttribute::max_shared_memory_per_block_optin);
  limits.shared_bytes_per_multiprocessor =
      read(DeviceAttribute::max_shared_memory_per_multiprocessor);
  limits.driver_version = driver.version();
  return limits;
}

struct Loaded {
  std::mutex mutex;
  // By the driver's context; kernels hold it, so that its handle names no other one.
  std::map<ContextHandle, std::shared_ptr<Kernels>> by_context;
};
Loaded& loaded_kernels() {
  static Loaded& loaded = *new Loaded;
  return loaded;
}

}  // namespace

Kernels::Kernels(std::shared_ptr<const PrimaryContext> context, ImageSource source)
    : context_(std::move(context)),
      source_(source ? std::move(source) : ImageSource(&kernel_image)),
      limits_(limits_of(context_->driver(), context_->device())) {}

Kernels::~Kernels() {
  if (modules_.empty()) return;
  try {
    const CallScope scope(*context_);
    modules_.clear();
  } catch (const Error&) {
    // The driver is gone, and with it the modules.
  }
}

std::shared_ptr<Kernels> Kernels::of(const std::shared_ptr<const PrimaryContext>& context) {
  Loaded& loaded = loaded_kernels();
  const std::lock_guard lock(loaded.mutex);
  std::shared_ptr<Kernels>& kernels = loaded.by_context[context->handle()];
  if (kernels == nullptr) kernels = std::make_shared<Kernels>(context);
  return kernels;
}

void Kernels::forget() {
  Loaded& loaded = loaded_kernels();
  const std::lock_guard lock(loaded.mutex);
  loaded.by_context.clear();
}

FunctionHandle Kernels::function(const KernelFile& file, const std::string& kernel,
                                 unsigned shared_bytes) {
  const std::lock_guard lock(mutex_);
  const auto known = functions_.find(kernel);
  Function function;
  if (known != functions_.end()) {
    function = known->second;
  } else {
    std::string key = file.name;
    for (const std::string& macro : file.macros) key += " " + macro;
    auto module = modules_.find(key);
    if (module == modules_.end()) {
      const std::vector<std::byte> image = source_(file, limits_);
      module = modules_.emplace(key, std::make_unique<Module>(driver(), image)).first;
    }
    function.handle = module->second->function(kernel);
  }
  if (shared_bytes > kPlainSharedBytes && shared_bytes > function.shared_bytes) {
    driver().check(
        driver().api().func_set_attribute(function.handle,
                                          FunctionAttribute::max_dynamic_shared_bytes,
                                          static_cast<int>(shared_bytes)),
        "cuFuncSetAttribute(" + kernel + ", " + std::to_string(shared_bytes) + " bytes)");
    // All of the multiprocessor's memory that can be: several blocks are to fit.
    constexpr int kPercent = 100;
    driver().check(driver().api().func_set_attribute(
                       function.handle, FunctionAttribute::preferred_shared_carveout, kPercent),
                   "cuFuncSetAttribute(" + kernel + ", carveout)");
    function.shared_bytes = shared_bytes;
  }
  functions_[kernel] = function;
  return function.handle;
}

}  // namespace pipelive::cuda
