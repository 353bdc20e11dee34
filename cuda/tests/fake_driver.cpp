// A stand-in for libcuda: device memory is host memory and the one kernel is a loop. It records the
// calls, so that tests can check their order, and can make any of them fail.
#include "fake_driver.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int kInvalidValue = 1;
constexpr int kOutOfMemory = 2;
constexpr int kNoDevice = 100;
constexpr int kNotFound = 500;

struct State {
  std::string calls;
  std::string failing;
  int failure = 0;
  int held = 0;
  int devices = 1;
  int current_depth = 0;
};

State& state() {
  static State instance;
  return instance;
}

int record(const char* symbol) {
  State& s = state();
  s.calls += symbol;
  s.calls += '\n';
  if (s.failing != symbol) return 0;
  s.failing.clear();
  return s.failure;
}

int needs_context(int result) {
  constexpr int kInvalidContext = 201;
  return result == 0 && state().current_depth == 0 ? kInvalidContext : result;
}

char context_tag;
char module_tag;
char function_tag;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fake_driver_reset() {
  state() = State{};
}
EXPORT const char* fake_driver_calls() {
  return state().calls.c_str();
}
EXPORT int fake_driver_held() {
  return state().held;
}
EXPORT void fake_driver_devices(int count) {
  state().devices = count;
}
EXPORT void fake_driver_fail(const char* symbol, int result) {
  state().failing = symbol;
  state().failure = result;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  switch (error) {
    case kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return 0;
    case kOutOfMemory:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return 0;
    case kNoDevice:
      *name = "CUDA_ERROR_NO_DEVICE";
      return 0;
    case kNotFound:
      *name = "CUDA_ERROR_NOT_FOUND";
      return 0;
    default:
      *name = nullptr;
      return kInvalidValue;
  }
}

EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == kNotFound ? "named symbol not found" : nullptr;
  return error == kNotFound ? 0 : kInvalidValue;
}

EXPORT int cuInit(unsigned /*flags*/) {
  return record("cuInit");
}

EXPORT int cuDriverGetVersion(int* version) {
  *version = 12080;
  return 0;
}

EXPORT int cuDeviceGetCount(int* count) {
  *count = state().devices;
  return record("cuDeviceGetCount");
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return record("cuDeviceGet");
}

EXPORT int cuDeviceGetName(char* name, int bytes, int /*device*/) {
  std::strncpy(name, "Fake device", static_cast<std::size_t>(bytes));
  return record("cuDeviceGetName");
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int /*device*/) {
  if (const int result = record("cuDevicePrimaryCtxRetain")) return result;
  *context = &context_tag;
  ++state().held;
  return 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int /*device*/) {
  --state().held;
  return record("cuDevicePrimaryCtxRelease");
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (const int result = record("cuCtxPushCurrent")) return result;
  if (context != &context_tag) return kInvalidValue;
  ++state().current_depth;
  return 0;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  *context = &context_tag;
  --state().current_depth;
  return record("cuCtxPopCurrent");
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
  if (const int result = needs_context(record("cuModuleLoadData"))) return result;
  if (image == nullptr) return kInvalidValue;
  *module = &module_tag;
  ++state().held;
  return 0;
}

EXPORT int cuModuleUnload(void* /*module*/) {
  --state().held;
  return needs_context(record("cuModuleUnload"));
}

EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (const int result = record("cuModuleGetFunction")) return result;
  if (module != &module_tag) return kInvalidValue;
  if (std::strcmp(name, "pipelive_scale_f32") != 0) return kNotFound;
  *function = &function_tag;
  return 0;
}

EXPORT int cuMemAlloc_v2(std::uint64_t* pointer, std::size_t bytes) {
  if (const int result = needs_context(record("cuMemAlloc"))) return result;
  void* memory = std::malloc(bytes);
  if (memory == nullptr) return kOutOfMemory;
  *pointer = reinterpret_cast<std::uintptr_t>(memory);
  ++state().held;
  return 0;
}

EXPORT int cuMemFree_v2(std::uint64_t pointer) {
  std::free(reinterpret_cast<void*>(pointer));
  --state().held;
  return needs_context(record("cuMemFree"));
}

EXPORT int cuMemcpyHtoD_v2(std::uint64_t target, const void* source, std::size_t bytes) {
  if (const int result = needs_context(record("cuMemcpyHtoD"))) return result;
  std::memcpy(reinterpret_cast<void*>(target), source, bytes);
  return 0;
}

EXPORT int cuMemcpyDtoH_v2(void* target, std::uint64_t source, std::size_t bytes) {
  if (const int result = needs_context(record("cuMemcpyDtoH"))) return result;
  std::memcpy(target, reinterpret_cast<const void*>(source), bytes);
  return 0;
}

#ifndef PIPELIVE_FAKE_WITHOUT_LAUNCH
EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z,
                          unsigned /*shared_bytes*/, void* /*stream*/, void** parameters,
                          void** /*extra*/) {
  if (const int result = needs_context(record("cuLaunchKernel"))) return result;
  if (function != &function_tag || grid_x == 0 || grid_y != 1 || grid_z != 1 || block_x == 0 ||
      block_x > 1024 || block_y != 1 || block_z != 1) {
    return kInvalidValue;
  }
  auto* values = reinterpret_cast<float*>(*static_cast<std::uint64_t*>(parameters[0]));
  const float factor = *static_cast<float*>(parameters[1]);
  const std::uint64_t count = *static_cast<std::uint64_t*>(parameters[2]);
  for (std::uint64_t i = 0; i < count; ++i) values[i] *= factor;
  return 0;
}
#endif

EXPORT int cuStreamSynchronize(void* /*stream*/) {
  return needs_context(record("cuStreamSynchronize"));
}

// Entry points that have to be there, but do nothing yet.
#define NOT_SUPPORTED(symbol)         \
  EXPORT int symbol() {               \
    constexpr int kUnsupported = 801; \
    return kUnsupported;              \
  }
NOT_SUPPORTED(cuDeviceGetAttribute)
NOT_SUPPORTED(cuDeviceTotalMem_v2)
NOT_SUPPORTED(cuDeviceGetUuid_v2)
NOT_SUPPORTED(cuDeviceGetPCIBusId)
NOT_SUPPORTED(cuDeviceCanAccessPeer)
NOT_SUPPORTED(cuDeviceGetP2PAttribute)
NOT_SUPPORTED(cuDevicePrimaryCtxGetState)
NOT_SUPPORTED(cuCtxGetCurrent)
NOT_SUPPORTED(cuCtxSetCurrent)
NOT_SUPPORTED(cuCtxGetDevice)
NOT_SUPPORTED(cuCtxSynchronize)
NOT_SUPPORTED(cuCtxGetStreamPriorityRange)
NOT_SUPPORTED(cuCtxEnablePeerAccess)
NOT_SUPPORTED(cuCtxDisablePeerAccess)
NOT_SUPPORTED(cuModuleGetGlobal_v2)
NOT_SUPPORTED(cuFuncGetAttribute)
NOT_SUPPORTED(cuFuncSetAttribute)
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLaunchHostFunc)
NOT_SUPPORTED(cuMemGetInfo_v2)
NOT_SUPPORTED(cuMemGetAddressRange_v2)
NOT_SUPPORTED(cuPointerGetAttribute)
NOT_SUPPORTED(cuMemHostAlloc)
NOT_SUPPORTED(cuMemFreeHost)
NOT_SUPPORTED(cuMemHostRegister_v2)
NOT_SUPPORTED(cuMemHostUnregister)
NOT_SUPPORTED(cuMemHostGetDevicePointer_v2)
NOT_SUPPORTED(cuMemAddressReserve)
NOT_SUPPORTED(cuMemAddressFree)
NOT_SUPPORTED(cuMemCreate)
NOT_SUPPORTED(cuMemRelease)
NOT_SUPPORTED(cuMemRetainAllocationHandle)
NOT_SUPPORTED(cuMemMap)
NOT_SUPPORTED(cuMemUnmap)
NOT_SUPPORTED(cuMemSetAccess)
NOT_SUPPORTED(cuMemGetAllocationGranularity)
NOT_SUPPORTED(cuMemExportToShareableHandle)
NOT_SUPPORTED(cuMemImportFromShareableHandle)
NOT_SUPPORTED(cuIpcGetMemHandle)
NOT_SUPPORTED(cuIpcOpenMemHandle_v2)
NOT_SUPPORTED(cuIpcCloseMemHandle)
NOT_SUPPORTED(cuIpcGetEventHandle)
NOT_SUPPORTED(cuIpcOpenEventHandle)
NOT_SUPPORTED(cuMemcpyHtoDAsync_v2)
NOT_SUPPORTED(cuMemcpyDtoHAsync_v2)
NOT_SUPPORTED(cuMemcpyDtoDAsync_v2)
NOT_SUPPORTED(cuMemcpyAsync)
NOT_SUPPORTED(cuMemcpyPeerAsync)
NOT_SUPPORTED(cuMemcpy2DAsync_v2)
NOT_SUPPORTED(cuMemsetD8Async)
NOT_SUPPORTED(cuMemsetD32Async)
NOT_SUPPORTED(cuStreamCreateWithPriority)
NOT_SUPPORTED(cuStreamDestroy_v2)
NOT_SUPPORTED(cuStreamQuery)
NOT_SUPPORTED(cuStreamWaitEvent)
NOT_SUPPORTED(cuStreamIsCapturing)
NOT_SUPPORTED(cuStreamGetCtx)
NOT_SUPPORTED(cuThreadExchangeStreamCaptureMode)
NOT_SUPPORTED(cuEventCreate)
NOT_SUPPORTED(cuEventDestroy_v2)
NOT_SUPPORTED(cuEventRecord)
NOT_SUPPORTED(cuEventQuery)
NOT_SUPPORTED(cuEventSynchronize)
NOT_SUPPORTED(cuEventElapsedTime)
