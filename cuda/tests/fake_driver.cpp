// The stand-in for libcuda: devices, contexts, modules and the one kernel, and what tests ask of
// it.
#include "fake_driver.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "fake_state.hpp"

namespace pipelive::cuda {
namespace fake {
namespace {

char module_tag;
char function_tag;

int default_attribute(DeviceAttribute attribute) {
  switch (attribute) {
    case DeviceAttribute::compute_capability_major:
      return 9;
    case DeviceAttribute::warp_size:
      return 32;
    case DeviceAttribute::multiprocessor_count:
      return 4;
    case DeviceAttribute::async_engine_count:
      return 3;
    case DeviceAttribute::max_shared_memory_per_block:
      return 48 << 10;
    case DeviceAttribute::max_shared_memory_per_block_optin:
      return 227 << 10;
    case DeviceAttribute::max_shared_memory_per_multiprocessor:
      return 228 << 10;
    case DeviceAttribute::l2_cache_bytes:
      return 50 << 20;
    case DeviceAttribute::unified_addressing:
    case DeviceAttribute::host_registered_same_pointer:
    case DeviceAttribute::cooperative_launch:
    case DeviceAttribute::virtual_memory_supported:
    case DeviceAttribute::posix_handle_supported:
    case DeviceAttribute::rdma_with_vmm_supported:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

State& state() {
  static State instance;
  return instance;
}

void reset() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  release_all_memory();
  for (FakeStream* stream : s.streams) delete stream;
  for (FakeEvent* event : s.events) delete event;
  s.streams.clear();
  s.events.clear();
  s.calls.clear();
  s.counts.clear();
  s.failures.clear();
  s.mistakes.clear();
  s.device_count = 1;
  s.version = kFakeVersion;
  s.total_bytes = std::size_t{4} << 30;
  s.granularity = std::size_t{2} << 20;
  s.most_used.clear();
  s.attributes.clear();
  s.import_other = false;
  s.broken = kSuccess;
  s.devices.clear();
  s.peers.clear();
  s.modules = 0;
  ++s.generation;
}

std::vector<ContextHandle>& current_contexts() {
  thread_local std::vector<ContextHandle> contexts;
  thread_local std::uint64_t generation = 0;
  if (generation != state().generation) contexts.clear();
  generation = state().generation;
  return contexts;
}

FakeDevice& device(int ordinal) {
  return state().devices.try_emplace(ordinal, ordinal).first->second;
}

int device_of(ContextHandle context) {
  for (auto& [ordinal, device] : state().devices) {
    if (reinterpret_cast<ContextHandle>(&device.context_tag) == context) return ordinal;
  }
  return -1;
}

int current_device() {
  return current_contexts().empty() ? -1 : device_of(current_contexts().back());
}

void mistake(const std::string& text) {
  state().mistakes += text + '\n';
}

Result enter(const char* symbol) {
  State& s = state();
  s.calls += symbol;
  s.calls += '\n';
  const std::uint64_t number = ++s.counts[symbol];
  const auto failure = s.failures.find(symbol);
  if (failure == s.failures.end() || failure->second.at != number) return kSuccess;
  const int result = failure->second.result;
  s.failures.erase(failure);
  return result;
}

Result enter_context(const char* symbol) {
  if (const Result result = enter(symbol)) return result;
  if (current_contexts().empty()) {
    mistake(std::string(symbol) + " without a current context");
    return kInvalidContext;
  }
  return state().broken;
}

}  // namespace fake

using fake::enter;
using fake::enter_context;
using fake::state;
using Lock = std::lock_guard<std::recursive_mutex>;

FAKE_EXPORT void fake_driver_reset() {
  fake::reset();
}
FAKE_EXPORT const char* fake_driver_calls() {
  return state().calls.c_str();
}
FAKE_EXPORT std::uint64_t fake_driver_count(const char* symbol) {
  const Lock lock(state().mutex);
  return state().counts[symbol];
}
FAKE_EXPORT void fake_driver_fail_nth(const char* symbol, std::uint64_t nth, int result) {
  const Lock lock(state().mutex);
  if (nth == 0) {
    state().failures.erase(symbol);
  } else {
    state().failures[symbol] = {state().counts[symbol] + nth, result};
  }
}
FAKE_EXPORT void fake_driver_fail(const char* symbol, int result) {
  fake_driver_fail_nth(symbol, 1, result);
}
FAKE_EXPORT int fake_driver_held() {
  const auto& s = state();
  const Lock lock(state().mutex);
  int retained = 0;
  for (const auto& [ordinal, device] : s.devices) retained += device.retained;
  return retained + s.modules +
         static_cast<int>(s.buffers.size() + s.pinned.size() + s.handles.size() +
                          s.reservations.size() + s.streams.size() + s.events.size());
}
FAKE_EXPORT void fake_driver_devices(int count) {
  state().device_count = count;
}
FAKE_EXPORT void fake_driver_version(int version) {
  state().version = version;
}
FAKE_EXPORT void fake_driver_memory(std::uint64_t bytes) {
  state().total_bytes = bytes;
}
FAKE_EXPORT std::uint64_t fake_driver_lowest_free(int device) {
  const Lock lock(state().mutex);
  return state().total_bytes - state().most_used[device];
}
FAKE_EXPORT void fake_driver_granularity(std::uint64_t bytes) {
  state().granularity = bytes;
}
FAKE_EXPORT void fake_driver_import_other(int on) {
  state().import_other = on != 0;
}
FAKE_EXPORT void fake_driver_attribute(int attribute, int value) {
  state().attributes[attribute] = value;
}
FAKE_EXPORT void fake_driver_kernel(const char* name, std::size_t bytes, FakeKernelRun* run) {
  const Lock lock(state().mutex);
  if (run == nullptr) {
    state().kernels.erase(name);
  } else {
    state().kernels[name] = {bytes, run};
  }
}
FAKE_EXPORT const char* fake_driver_mistakes() {
  return state().mistakes.c_str();
}

FAKE_EXPORT Result cuGetErrorName(Result error, const char** name) {
  switch (error) {
    case kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return kSuccess;
    case kOutOfMemory:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return kSuccess;
    case kNoDevice:
      *name = "CUDA_ERROR_NO_DEVICE";
      return kSuccess;
    case kNotFound:
      *name = "CUDA_ERROR_NOT_FOUND";
      return kSuccess;
    case kIllegalAddress:
      *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
      return kSuccess;
    case kStreamCaptureInvalidated:
      *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
      return kSuccess;
    case kStreamCaptureIsolation:
      *name = "CUDA_ERROR_STREAM_CAPTURE_ISOLATION";
      return kSuccess;
    case kStreamCaptureImplicit:
      *name = "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT";
      return kSuccess;
    case kCapturedEvent:
      *name = "CUDA_ERROR_CAPTURED_EVENT";
      return kSuccess;
    default:
      *name = nullptr;
      return kInvalidValue;
  }
}

FAKE_EXPORT Result cuGetErrorString(Result error, const char** text) {
  *text = error == kNotFound ? "named symbol not found" : nullptr;
  return error == kNotFound ? kSuccess : kInvalidValue;
}

FAKE_EXPORT Result cuInit(unsigned /*flags*/) {
  const Lock lock(state().mutex);
  return enter("cuInit");
}

FAKE_EXPORT Result cuDriverGetVersion(int* version) {
  const Lock lock(state().mutex);
  *version = state().version;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetCount(int* count) {
  const Lock lock(state().mutex);
  *count = state().device_count;
  return enter("cuDeviceGetCount");
}

FAKE_EXPORT Result cuDeviceGet(DeviceOrdinal* device, int ordinal) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDeviceGet")) return result;
  if (ordinal < 0 || ordinal >= state().device_count) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetName(char* name, int bytes, DeviceOrdinal /*device*/) {
  const Lock lock(state().mutex);
  std::strncpy(name, "Fake device", static_cast<std::size_t>(bytes));
  return enter("cuDeviceGetName");
}

FAKE_EXPORT Result cuDeviceGetAttribute(int* value, DeviceAttribute attribute,
                                        DeviceOrdinal device) {
  const Lock lock(state().mutex);
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  const auto chosen = state().attributes.find(static_cast<int>(attribute));
  *value = chosen != state().attributes.end() ? chosen->second : fake::default_attribute(attribute);
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceTotalMem_v2(std::size_t* bytes, DeviceOrdinal /*device*/) {
  *bytes = state().total_bytes;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetUuid_v2(Uuid* uuid, DeviceOrdinal device) {
  std::memset(uuid->bytes, 0, sizeof uuid->bytes);
  uuid->bytes[15] = static_cast<char>(device + 1);
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetPCIBusId(char* text, int bytes, DeviceOrdinal device) {
  const std::string id = "0000:0" + std::to_string(device) + ":00.0";
  std::strncpy(text, id.c_str(), static_cast<std::size_t>(bytes));
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceCanAccessPeer(int* can, DeviceOrdinal device, DeviceOrdinal peer) {
  *can = device != peer ? 1 : 0;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetP2PAttribute(int* value, P2PAttribute attribute, DeviceOrdinal source,
                                           DeviceOrdinal target) {
  if (source == target) return kInvalidDevice;
  *value = attribute == P2PAttribute::performance_rank ? 0 : 1;
  return kSuccess;
}

FAKE_EXPORT Result cuDevicePrimaryCtxRetain(ContextHandle* context, DeviceOrdinal device) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDevicePrimaryCtxRetain")) return result;
  fake::FakeDevice& found = fake::device(device);
  ++found.retained;
  *context = reinterpret_cast<ContextHandle>(&found.context_tag);
  return kSuccess;
}

FAKE_EXPORT Result cuDevicePrimaryCtxRelease_v2(DeviceOrdinal device) {
  const Lock lock(state().mutex);
  const auto found = state().devices.find(device);
  if (found == state().devices.end() || found->second.retained == 0) {
    fake::mistake("cuDevicePrimaryCtxRelease of a context that is not retained");
    return kInvalidContext;
  }
  --found->second.retained;
  return enter("cuDevicePrimaryCtxRelease");
}

FAKE_EXPORT Result cuDevicePrimaryCtxGetState(DeviceOrdinal device, unsigned* flags, int* active) {
  const Lock lock(state().mutex);
  *flags = 0;
  *active = state().devices.contains(device) && fake::device(device).retained > 0 ? 1 : 0;
  return kSuccess;
}

FAKE_EXPORT Result cuCtxPushCurrent_v2(ContextHandle context) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuCtxPushCurrent")) return result;
  const int device = fake::device_of(context);
  if (device < 0 || fake::device(device).retained == 0) return kInvalidContext;
  fake::current_contexts().push_back(context);
  return kSuccess;
}

FAKE_EXPORT Result cuCtxPopCurrent_v2(ContextHandle* context) {
  const Lock lock(state().mutex);
  auto& contexts = fake::current_contexts();
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return enter("cuCtxPopCurrent");
}

FAKE_EXPORT Result cuCtxGetCurrent(ContextHandle* context) {
  const Lock lock(state().mutex);
  const auto& contexts = fake::current_contexts();
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}

FAKE_EXPORT Result cuCtxSetCurrent(ContextHandle context) {
  const Lock lock(state().mutex);
  auto& contexts = fake::current_contexts();
  if (!contexts.empty()) contexts.pop_back();
  if (context != nullptr) contexts.push_back(context);
  return kSuccess;
}

FAKE_EXPORT Result cuCtxGetDevice(DeviceOrdinal* device) {
  const Lock lock(state().mutex);
  *device = fake::current_device();
  return *device < 0 ? kInvalidContext : kSuccess;
}

FAKE_EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}

FAKE_EXPORT Result cuCtxEnablePeerAccess(ContextHandle peer, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuCtxEnablePeerAccess")) return result;
  const int other = fake::device_of(peer);
  if (flags != 0 || other < 0) return kInvalidValue;
  if (other == fake::current_device()) return kInvalidDevice;
  return state().peers.emplace(fake::current_device(), other).second ? kSuccess
                                                                     : kPeerAccessAlreadyEnabled;
}

FAKE_EXPORT Result cuCtxDisablePeerAccess(ContextHandle peer) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuCtxDisablePeerAccess")) return result;
  return state().peers.erase({fake::current_device(), fake::device_of(peer)}) == 1
             ? kSuccess
             : kPeerAccessNotEnabled;
}

FAKE_EXPORT Result cuModuleLoadData(ModuleHandle* module, const void* image) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuModuleLoadData")) return result;
  if (image == nullptr) return kInvalidValue;
  // As the stand-in for NVRTC writes it.
  constexpr std::string_view kPtx = "// PTX of CUDA ";
  const auto* const text = static_cast<const char*>(image);
  if (std::strncmp(text, kPtx.data(), kPtx.size()) == 0 &&
      std::atoi(text + kPtx.size()) > state().version) {
    return kUnsupportedPtxVersion;
  }
  *module = reinterpret_cast<ModuleHandle>(&fake::module_tag);
  ++state().modules;
  return kSuccess;
}

FAKE_EXPORT Result cuModuleUnload(ModuleHandle /*module*/) {
  const Lock lock(state().mutex);
  --state().modules;
  return enter_context("cuModuleUnload");
}

FAKE_EXPORT Result cuModuleGetFunction(FunctionHandle* function, ModuleHandle module,
                                       const char* name) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuModuleGetFunction")) return result;
  if (module != reinterpret_cast<ModuleHandle>(&fake::module_tag)) return kInvalidValue;
  const auto kernel = state().kernels.find(name);
  if (kernel != state().kernels.end()) {
    *function = reinterpret_cast<FunctionHandle>(&*kernel);
    return kSuccess;
  }
  if (std::strcmp(name, "pipelive_scale_f32") != 0) return kNotFound;
  *function = reinterpret_cast<FunctionHandle>(&fake::function_tag);
  return kSuccess;
}

FAKE_EXPORT Result cuModuleGetGlobal_v2(DevicePointer* /*pointer*/, std::size_t* /*bytes*/,
                                        ModuleHandle /*module*/, const char* /*name*/) {
  const Lock lock(state().mutex);
  const Result result = enter_context("cuModuleGetGlobal");
  return result != kSuccess ? result : kNotFound;
}

FAKE_EXPORT Result cuFuncGetAttribute(int* value, FunctionAttribute attribute,
                                      FunctionHandle /*function*/) {
  *value = attribute == FunctionAttribute::max_threads_per_block ? 1024 : 0;
  return kSuccess;
}

FAKE_EXPORT Result cuFuncSetAttribute(FunctionHandle /*function*/, FunctionAttribute attribute,
                                      int value) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuFuncSetAttribute")) return result;
  constexpr int kMostShared = 227 << 10;
  const bool too_much =
      attribute == FunctionAttribute::max_dynamic_shared_bytes && value > kMostShared;
  return too_much ? kInvalidValue : kSuccess;
}

FAKE_EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                               FunctionHandle /*function*/,
                                                               int block_threads,
                                                               std::size_t dynamic_shared_bytes) {
  if (block_threads <= 0 || block_threads > 1024) return kInvalidValue;
  constexpr std::size_t kShared = std::size_t{228} << 10;
  *blocks = static_cast<int>(
      std::min<std::size_t>(2048u / static_cast<unsigned>(block_threads),
                            dynamic_shared_bytes == 0 ? 32 : kShared / dynamic_shared_bytes));
  return kSuccess;
}

#ifndef PIPELIVE_FAKE_WITHOUT_LAUNCH
FAKE_EXPORT Result cuLaunchKernel(FunctionHandle function, unsigned grid_x, unsigned grid_y,
                                  unsigned grid_z, unsigned block_x, unsigned block_y,
                                  unsigned block_z, unsigned /*shared_bytes*/, StreamHandle stream,
                                  void** parameters, void** /*extra*/) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuLaunchKernel")) return result;
  for (const auto& entry : state().kernels) {
    if (reinterpret_cast<FunctionHandle>(const_cast<void*>(static_cast<const void*>(&entry))) !=
        function) {
      continue;
    }
    if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_x == 0 || block_x > 1024 ||
        block_y != 1 || block_z != 1) {
      return kInvalidValue;
    }
    // The parameter is taken at the call; the caller's memory may be gone when the kernel runs.
    const auto* first = static_cast<const std::byte*>(parameters[0]);
    const std::vector<std::byte> parameter(first, first + entry.second.bytes);
    const std::string name = entry.first;
    FakeKernelRun* const run = entry.second.run;
    return fake::submit(stream, [name, run, parameter, grid_x, block_x] {
      run(name.c_str(), grid_x, block_x, parameter.data());
      return true;
    });
  }
  if (function != reinterpret_cast<FunctionHandle>(&fake::function_tag) || grid_x == 0 ||
      grid_y != 1 || grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 ||
      block_z != 1) {
    return kInvalidValue;
  }
  const auto target = *static_cast<DevicePointer*>(parameters[0]);
  const float factor = *static_cast<float*>(parameters[1]);
  const std::uint64_t count = *static_cast<std::uint64_t*>(parameters[2]);
  return fake::submit(stream, [target, factor, count] {
    if (!fake::device_memory(target, count * sizeof(float), true)) {
      state().broken = kIllegalAddress;
      return true;
    }
    auto* values = reinterpret_cast<float*>(target);
    for (std::uint64_t i = 0; i < count; ++i) values[i] *= factor;
    return true;
  });
}
#endif

FAKE_EXPORT Result cuLaunchCooperativeKernel(FunctionHandle /*function*/, unsigned /*grid_x*/,
                                             unsigned /*grid_y*/, unsigned /*grid_z*/,
                                             unsigned /*block_x*/, unsigned /*block_y*/,
                                             unsigned /*block_z*/, unsigned /*shared_bytes*/,
                                             StreamHandle /*stream*/, void** /*parameters*/) {
  const Lock lock(state().mutex);
  const Result result = enter_context("cuLaunchCooperativeKernel");
  return result != kSuccess ? result : kNotSupported;
}

}  // namespace pipelive::cuda
