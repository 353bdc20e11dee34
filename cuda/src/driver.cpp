#include "pipelive/cuda/driver.hpp"

#include <dlfcn.h>

#include <array>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive::cuda {
namespace {

std::string loader_message() {
  const char* message = dlerror();
  return message != nullptr ? message : "the loader gave no reason";
}

}  // namespace

void Driver::Closer::operator()(void* library) const noexcept {
  dlclose(library);
}

std::shared_ptr<const Driver> Driver::open(const std::string& library) {
  std::shared_ptr<Driver> driver(new Driver());
  // libcuda starts threads and exit handlers of its own; NODELETE keeps its code mapped for them.
  driver->library_.reset(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE));
  if (driver->library_ == nullptr) {
    throw Error(ErrorCode::device, "the CUDA driver library cannot be opened: " + loader_message());
  }
#define PIPELIVE_CUDA_LOAD(member, symbol, parameters) \
  driver->api_.member =                                \
      reinterpret_cast<Result(*) parameters>(dlsym(driver->library_.get(), #symbol));
#define PIPELIVE_CUDA_LOAD_REQUIRED(member, symbol, parameters)                           \
  PIPELIVE_CUDA_LOAD(member, symbol, parameters)                                          \
  if (driver->api_.member == nullptr) {                                                   \
    throw Error(ErrorCode::device,                                                        \
                library + " lacks " #symbol "; a driver for CUDA 12 or later is needed"); \
  }
  PIPELIVE_CUDA_DRIVER_FUNCTIONS(PIPELIVE_CUDA_LOAD_REQUIRED)
  PIPELIVE_CUDA_OPTIONAL_DRIVER_FUNCTIONS(PIPELIVE_CUDA_LOAD)
#undef PIPELIVE_CUDA_LOAD_REQUIRED
#undef PIPELIVE_CUDA_LOAD

  driver->check(driver->api_.init(0), "cuInit");
  driver->check(driver->api_.driver_get_version(&driver->version_), "cuDriverGetVersion");
  return driver;
}

int Driver::device_count() const {
  int count = 0;
  check(api_.device_get_count(&count), "cuDeviceGetCount");
  return count;
}

std::string Driver::device_name(int ordinal) const {
  DeviceOrdinal device = 0;
  check(api_.device_get(&device, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
  std::array<char, 256> name{};
  check(api_.device_get_name(name.data(), static_cast<int>(name.size()) - 1, device),
        "cuDeviceGetName");
  return name.data();
}

void Driver::fail(Result result, std::string_view call) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api_.get_error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  if (api_.get_error_string(result, &text) != kSuccess || text == nullptr) text = "no description";
  throw Error(result == kOutOfMemory ? ErrorCode::out_of_memory : ErrorCode::device,
              std::string(call) + ": " + name + " (" + std::to_string(result) + "): " + text);
}

DriverProbe probe_driver(const std::string& library) {
  DriverProbe probe;
  try {
    const std::shared_ptr<const Driver> driver = Driver::open(library);
    probe.version = driver->version();
    probe.device_count = driver->device_count();
    if (probe.device_count == 0) probe.problem = "the CUDA driver sees no device";
  } catch (const Error& error) {
    probe.problem = error.what();
  }
  return probe;
}

PrimaryContext::PrimaryContext(std::shared_ptr<const Driver> driver, int ordinal)
    : driver_(std::move(driver)) {
  const int count = driver_->device_count();
  if (ordinal < 0 || ordinal >= count) {
    throw Error(ErrorCode::invalid_argument, "device is " + std::to_string(ordinal) +
                                                 "; the CUDA driver sees " + std::to_string(count) +
                                                 " of them, from 0");
  }
  driver_->check(driver_->api().device_get(&device_, ordinal), "cuDeviceGet");
  driver_->check(driver_->api().primary_ctx_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

// Failures while releasing are not reported: the usual one is that an earlier kernel failed, and
// that has been.
PrimaryContext::~PrimaryContext() {
  driver_->api().primary_ctx_release(device_);
}

ContextScope::ContextScope(const PrimaryContext& context) : driver_(context.driver()) {
  driver_.check(driver_.api().ctx_push_current(context.handle()), "cuCtxPushCurrent");
}

ContextScope::~ContextScope() {
  ContextHandle popped = nullptr;
  driver_.api().ctx_pop_current(&popped);
}

Module::Module(const Driver& driver, std::span<const std::byte> image) : driver_(driver) {
  if (image.empty()) {
    throw Error(ErrorCode::invalid_argument, "image is empty; expected a fatbin");
  }
  driver_.check(driver_.api().module_load_data(&module_, image.data()), "cuModuleLoadData");
}

Module::~Module() {
  driver_.api().module_unload(module_);
}

FunctionHandle Module::function(const std::string& name) const {
  FunctionHandle function = nullptr;
  driver_.check(driver_.api().module_get_function(&function, module_, name.c_str()),
                "cuModuleGetFunction(" + name + ")");
  return function;
}

DeviceBuffer::DeviceBuffer(const Driver& driver, std::size_t bytes) : driver_(driver) {
  if (bytes == 0) throw Error(ErrorCode::invalid_argument, "bytes is 0; expected at least 1");
  driver_.check(driver_.api().mem_alloc(&pointer_, bytes),
                "cuMemAlloc(" + std::to_string(bytes) + " bytes)");
}

DeviceBuffer::~DeviceBuffer() {
  driver_.api().mem_free(pointer_);
}

}  // namespace pipelive::cuda
