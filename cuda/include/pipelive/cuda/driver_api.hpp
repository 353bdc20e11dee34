#pragma once

#include "pipelive/cuda/driver_types.hpp"

/// The entry points of libcuda that we use. The ABI of a symbol does not change under its name, so
/// names carry the suffix (_v2) whose parameters are written here.
namespace pipelive::cuda {

// X(member, symbol, parameters). Every one of them must be there; all exist since CUDA 11.4.
#define PIPELIVE_CUDA_DRIVER_FUNCTIONS(X)                                                          \
  X(get_error_name, cuGetErrorName, (Result error, const char** name))                             \
  X(get_error_string, cuGetErrorString, (Result error, const char** text))                         \
  X(init, cuInit, (unsigned flags))                                                                \
  X(driver_get_version, cuDriverGetVersion, (int* version))                                        \
  /* devices */                                                                                    \
  X(device_get_count, cuDeviceGetCount, (int* count))                                              \
  X(device_get, cuDeviceGet, (DeviceOrdinal * device, int ordinal))                                \
  X(device_get_name, cuDeviceGetName, (char* name, int bytes, DeviceOrdinal device))               \
  X(device_get_attribute, cuDeviceGetAttribute,                                                    \
    (int* value, DeviceAttribute attribute, DeviceOrdinal device))                                 \
  X(device_total_mem, cuDeviceTotalMem_v2, (std::size_t* bytes, DeviceOrdinal device))             \
  X(device_get_uuid, cuDeviceGetUuid_v2, (Uuid * uuid, DeviceOrdinal device))                      \
  X(device_get_pci_bus_id, cuDeviceGetPCIBusId, (char* text, int bytes, DeviceOrdinal device))     \
  X(device_can_access_peer, cuDeviceCanAccessPeer,                                                 \
    (int* can, DeviceOrdinal device, DeviceOrdinal peer))                                          \
  X(device_get_p2p_attribute, cuDeviceGetP2PAttribute,                                             \
    (int* value, P2PAttribute attribute, DeviceOrdinal source, DeviceOrdinal target))              \
  /* contexts */                                                                                   \
  X(primary_ctx_retain, cuDevicePrimaryCtxRetain, (ContextHandle * context, DeviceOrdinal device)) \
  X(primary_ctx_release, cuDevicePrimaryCtxRelease_v2, (DeviceOrdinal device))                     \
  X(primary_ctx_get_state, cuDevicePrimaryCtxGetState,                                             \
    (DeviceOrdinal device, unsigned* flags, int* active))                                          \
  X(ctx_push_current, cuCtxPushCurrent_v2, (ContextHandle context))                                \
  X(ctx_pop_current, cuCtxPopCurrent_v2, (ContextHandle * context))                                \
  X(ctx_get_current, cuCtxGetCurrent, (ContextHandle * context))                                   \
  X(ctx_set_current, cuCtxSetCurrent, (ContextHandle context))                                     \
  X(ctx_get_device, cuCtxGetDevice, (DeviceOrdinal * device))                                      \
  X(ctx_synchronize, cuCtxSynchronize, ())                                                         \
  X(ctx_get_stream_priority_range, cuCtxGetStreamPriorityRange, (int* least, int* greatest))       \
  X(ctx_enable_peer_access, cuCtxEnablePeerAccess, (ContextHandle peer, unsigned flags))           \
  X(ctx_disable_peer_access, cuCtxDisablePeerAccess, (ContextHandle peer))                         \
  /* modules and kernels */                                                                        \
  X(module_load_data, cuModuleLoadData, (ModuleHandle * module, const void* image))                \
  X(module_unload, cuModuleUnload, (ModuleHandle module))                                          \
  X(module_get_function, cuModuleGetFunction,                                                      \
    (FunctionHandle * function, ModuleHandle module, const char* name))                            \
  X(module_get_global, cuModuleGetGlobal_v2,                                                       \
    (DevicePointer * pointer, std::size_t* bytes, ModuleHandle module, const char* name))          \
  X(func_get_attribute, cuFuncGetAttribute,                                                        \
    (int* value, FunctionAttribute attribute, FunctionHandle function))                            \
  X(func_set_attribute, cuFuncSetAttribute,                                                        \
    (FunctionHandle function, FunctionAttribute attribute, int value))                             \
  X(occupancy_max_active_blocks, cuOccupancyMaxActiveBlocksPerMultiprocessor,                      \
    (int* blocks, FunctionHandle function, int block_threads, std::size_t dynamic_shared_bytes))   \
  X(launch_kernel, cuLaunchKernel,                                                                 \
    (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, StreamHandle stream,               \
     void** parameters, void** extra))                                                             \
  X(launch_cooperative_kernel, cuLaunchCooperativeKernel,                                          \
    (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, StreamHandle stream,               \
     void** parameters))                                                                           \
  X(launch_host_func, cuLaunchHostFunc,                                                            \
    (StreamHandle stream, HostFunction function, void* user_data))                                 \
  /* plain memory */                                                                               \
  X(mem_alloc, cuMemAlloc_v2, (DevicePointer * pointer, std::size_t bytes))                        \
  X(mem_free, cuMemFree_v2, (DevicePointer pointer))                                               \
  X(mem_get_info, cuMemGetInfo_v2, (std::size_t* free, std::size_t* total))                        \
  X(mem_get_address_range, cuMemGetAddressRange_v2,                                                \
    (DevicePointer * base, std::size_t* bytes, DevicePointer pointer))                             \
  X(pointer_get_attribute, cuPointerGetAttribute,                                                  \
    (void* value, PointerAttribute attribute, DevicePointer pointer))                              \
  X(mem_host_alloc, cuMemHostAlloc, (void** pointer, std::size_t bytes, unsigned flags))           \
  X(mem_free_host, cuMemFreeHost, (void* pointer))                                                 \
  X(mem_host_register, cuMemHostRegister_v2, (void* pointer, std::size_t bytes, unsigned flags))   \
  X(mem_host_unregister, cuMemHostUnregister, (void* pointer))                                     \
  X(mem_host_get_device_pointer, cuMemHostGetDevicePointer_v2,                                     \
    (DevicePointer * device, void* host, unsigned flags))                                          \
  /* virtual memory */                                                                             \
  X(mem_address_reserve, cuMemAddressReserve,                                                      \
    (DevicePointer * pointer, std::size_t bytes, std::size_t alignment, DevicePointer hint,        \
     unsigned long long flags))                                                                    \
  X(mem_address_free, cuMemAddressFree, (DevicePointer pointer, std::size_t bytes))                \
  X(mem_create, cuMemCreate,                                                                       \
    (AllocationHandle * handle, std::size_t bytes, const AllocationProperties* properties,         \
     unsigned long long flags))                                                                    \
  X(mem_release, cuMemRelease, (AllocationHandle handle))                                          \
  X(mem_retain_allocation_handle, cuMemRetainAllocationHandle,                                     \
    (AllocationHandle * handle, void* address))                                                    \
  X(mem_map, cuMemMap,                                                                             \
    (DevicePointer pointer, std::size_t bytes, std::size_t offset, AllocationHandle handle,        \
     unsigned long long flags))                                                                    \
  X(mem_unmap, cuMemUnmap, (DevicePointer pointer, std::size_t bytes))                             \
  X(mem_set_access, cuMemSetAccess,                                                                \
    (DevicePointer pointer, std::size_t bytes, const AccessDescriptor* descriptors,                \
     std::size_t count))                                                                           \
  X(mem_get_allocation_granularity, cuMemGetAllocationGranularity,                                 \
    (std::size_t* bytes, const AllocationProperties* properties, Granularity option))              \
  X(mem_export_to_shareable_handle, cuMemExportToShareableHandle,                                  \
    (void* shareable, AllocationHandle handle, ShareableHandleType type,                           \
     unsigned long long flags))                                                                    \
  X(mem_import_from_shareable_handle, cuMemImportFromShareableHandle,                              \
    (AllocationHandle * handle, void* shareable, ShareableHandleType type))                        \
  /* legacy IPC, for memory that others allocated with cudaMalloc */                               \
  X(ipc_get_mem_handle, cuIpcGetMemHandle, (IpcMemoryHandle * handle, DevicePointer pointer))      \
  X(ipc_open_mem_handle, cuIpcOpenMemHandle_v2,                                                    \
    (DevicePointer * pointer, IpcMemoryHandle handle, unsigned flags))                             \
  X(ipc_close_mem_handle, cuIpcCloseMemHandle, (DevicePointer pointer))                            \
  X(ipc_get_event_handle, cuIpcGetEventHandle, (IpcEventHandle * handle, EventHandle event))       \
  X(ipc_open_event_handle, cuIpcOpenEventHandle, (EventHandle * event, IpcEventHandle handle))     \
  /* copies */                                                                                     \
  X(memcpy_to_device, cuMemcpyHtoD_v2,                                                             \
    (DevicePointer target, const void* source, std::size_t bytes))                                 \
  X(memcpy_to_host, cuMemcpyDtoH_v2, (void* target, DevicePointer source, std::size_t bytes))      \
  X(memcpy_to_device_async, cuMemcpyHtoDAsync_v2,                                                  \
    (DevicePointer target, const void* source, std::size_t bytes, StreamHandle stream))            \
  X(memcpy_to_host_async, cuMemcpyDtoHAsync_v2,                                                    \
    (void* target, DevicePointer source, std::size_t bytes, StreamHandle stream))                  \
  X(memcpy_on_device_async, cuMemcpyDtoDAsync_v2,                                                  \
    (DevicePointer target, DevicePointer source, std::size_t bytes, StreamHandle stream))          \
  X(memcpy_async, cuMemcpyAsync,                                                                   \
    (DevicePointer target, DevicePointer source, std::size_t bytes, StreamHandle stream))          \
  X(memcpy_peer_async, cuMemcpyPeerAsync,                                                          \
    (DevicePointer target, ContextHandle target_context, DevicePointer source,                     \
     ContextHandle source_context, std::size_t bytes, StreamHandle stream))                        \
  X(memcpy_2d_async, cuMemcpy2DAsync_v2, (const Copy2D* copy, StreamHandle stream))                \
  X(memset_d8_async, cuMemsetD8Async,                                                              \
    (DevicePointer target, unsigned char value, std::size_t count, StreamHandle stream))           \
  X(memset_d32_async, cuMemsetD32Async,                                                            \
    (DevicePointer target, unsigned value, std::size_t count, StreamHandle stream))                \
  /* streams */                                                                                    \
  X(stream_create_with_priority, cuStreamCreateWithPriority,                                       \
    (StreamHandle * stream, unsigned flags, int priority))                                         \
  X(stream_destroy, cuStreamDestroy_v2, (StreamHandle stream))                                     \
  X(stream_query, cuStreamQuery, (StreamHandle stream))                                            \
  X(stream_synchronize, cuStreamSynchronize, (StreamHandle stream))                                \
  X(stream_wait_event, cuStreamWaitEvent,                                                          \
    (StreamHandle stream, EventHandle event, unsigned flags))                                      \
  X(stream_is_capturing, cuStreamIsCapturing, (StreamHandle stream, CaptureStatus * status))       \
  X(stream_get_ctx, cuStreamGetCtx, (StreamHandle stream, ContextHandle * context))                \
  X(thread_exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (CaptureMode * mode))         \
  /* events */                                                                                     \
  X(event_create, cuEventCreate, (EventHandle * event, unsigned flags))                            \
  X(event_destroy, cuEventDestroy_v2, (EventHandle event))                                         \
  X(event_record, cuEventRecord, (EventHandle event, StreamHandle stream))                         \
  X(event_query, cuEventQuery, (EventHandle event))                                                \
  X(event_synchronize, cuEventSynchronize, (EventHandle event))                                    \
  X(event_elapsed_time, cuEventElapsedTime,                                                        \
    (float* milliseconds, EventHandle begin, EventHandle end))

// X(member, symbol, parameters). Newer, or only useful: null where the driver lacks them.
#define PIPELIVE_CUDA_OPTIONAL_DRIVER_FUNCTIONS(X)                                            \
  X(launch_kernel_ex, cuLaunchKernelEx,                                                       \
    (const LaunchConfig* config, FunctionHandle function, void** parameters, void** extra))   \
  X(memcpy_batch_async, cuMemcpyBatchAsync_v2,                                                \
    (DevicePointer * targets, DevicePointer * sources, std::size_t* bytes, std::size_t count, \
     CopyAttributes* attributes, std::size_t* attribute_begins, std::size_t attribute_count,  \
     StreamHandle stream))                                                                    \
  X(memcpy_batch_async_old, cuMemcpyBatchAsync,                                               \
    (DevicePointer * targets, DevicePointer * sources, std::size_t* bytes, std::size_t count, \
     CopyAttributes* attributes, std::size_t* attribute_begins, std::size_t attribute_count,  \
     std::size_t* failed_index, StreamHandle stream))                                         \
  X(stream_write_value32, cuStreamWriteValue32_v2,                                            \
    (StreamHandle stream, DevicePointer address, std::uint32_t value, unsigned flags))        \
  X(stream_wait_value32, cuStreamWaitValue32_v2,                                              \
    (StreamHandle stream, DevicePointer address, std::uint32_t value, unsigned flags))

/// The loaded functions; after Driver::open none of the first group is null.
struct DriverApi {
#define PIPELIVE_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  PIPELIVE_CUDA_DRIVER_FUNCTIONS(PIPELIVE_CUDA_MEMBER)
  PIPELIVE_CUDA_OPTIONAL_DRIVER_FUNCTIONS(PIPELIVE_CUDA_MEMBER)
#undef PIPELIVE_CUDA_MEMBER
};

}  // namespace pipelive::cuda
