#pragma once

#include <cstddef>
#include <cstdint>

/// The entry points of libcuda that we use, typed by hand so that no CUDA header is needed. Layouts
/// and values are those of the CUDA driver API, whose ABI does not change under a symbol's name.
namespace pipelive::cuda {

using Result = int;  ///< CUresult
inline constexpr Result kSuccess = 0;

using DeviceOrdinal = int;                      ///< CUdevice
using DevicePointer = std::uint64_t;            ///< CUdeviceptr
using ContextHandle = struct ContextOpaque*;    ///< CUcontext
using ModuleHandle = struct ModuleOpaque*;      ///< CUmodule
using FunctionHandle = struct FunctionOpaque*;  ///< CUfunction
using StreamHandle = struct StreamOpaque*;      ///< CUstream; nullptr is the default stream

// X(member, symbol, parameters). Every one of them must be there; all exist since CUDA 11.
#define PIPELIVE_CUDA_DRIVER_FUNCTIONS(X)                                                          \
  X(get_error_name, "cuGetErrorName", (Result error, const char** name))                           \
  X(get_error_string, "cuGetErrorString", (Result error, const char** text))                       \
  X(init, "cuInit", (unsigned flags))                                                              \
  X(driver_get_version, "cuDriverGetVersion", (int* version))                                      \
  X(device_get_count, "cuDeviceGetCount", (int* count))                                            \
  X(device_get, "cuDeviceGet", (DeviceOrdinal * device, int ordinal))                              \
  X(device_get_name, "cuDeviceGetName", (char* name, int bytes, DeviceOrdinal device))             \
  X(primary_ctx_retain, "cuDevicePrimaryCtxRetain",                                                \
    (ContextHandle * context, DeviceOrdinal device))                                               \
  X(primary_ctx_release, "cuDevicePrimaryCtxRelease_v2", (DeviceOrdinal device))                   \
  X(ctx_push_current, "cuCtxPushCurrent_v2", (ContextHandle context))                              \
  X(ctx_pop_current, "cuCtxPopCurrent_v2", (ContextHandle * context))                              \
  X(module_load_data, "cuModuleLoadData", (ModuleHandle * module, const void* image))              \
  X(module_unload, "cuModuleUnload", (ModuleHandle module))                                        \
  X(module_get_function, "cuModuleGetFunction",                                                    \
    (FunctionHandle * function, ModuleHandle module, const char* name))                            \
  X(mem_alloc, "cuMemAlloc_v2", (DevicePointer * pointer, std::size_t bytes))                      \
  X(mem_free, "cuMemFree_v2", (DevicePointer pointer))                                             \
  X(memcpy_to_device, "cuMemcpyHtoD_v2",                                                           \
    (DevicePointer target, const void* source, std::size_t bytes))                                 \
  X(memcpy_to_host, "cuMemcpyDtoH_v2", (void* target, DevicePointer source, std::size_t bytes))    \
  X(launch_kernel, "cuLaunchKernel",                                                               \
    (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, StreamHandle stream,               \
     void** parameters, void** extra))                                                             \
  X(stream_synchronize, "cuStreamSynchronize", (StreamHandle stream))

/// The loaded functions; after Driver::open none of them is null.
struct DriverApi {
#define PIPELIVE_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  PIPELIVE_CUDA_DRIVER_FUNCTIONS(PIPELIVE_CUDA_MEMBER)
#undef PIPELIVE_CUDA_MEMBER
};

}  // namespace pipelive::cuda
