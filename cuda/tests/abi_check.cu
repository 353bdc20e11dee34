// Compares our hand-typed driver interface with cuda.h at compile time. Nothing of it is ever run.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "pipelive/cuda/driver_api.hpp"

// cuda.h gives the newer function the old one's name.
#undef cuMemcpyBatchAsync

namespace pipelive::cuda {
namespace {

// Same number of parameters, and each as large and passed in the same way.
template <typename Ours, typename Theirs>
constexpr bool same_parameter() {
  constexpr bool ours_number =
      std::is_integral_v<Ours> || std::is_enum_v<Ours> || std::is_pointer_v<Ours>;
  constexpr bool theirs_number =
      std::is_integral_v<Theirs> || std::is_enum_v<Theirs> || std::is_pointer_v<Theirs>;
  return sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs) &&
         ours_number == theirs_number && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
}

template <typename Ours, typename Theirs>
struct SameAbi : std::false_type {};
template <typename... Ours, typename... Theirs>
struct SameAbi<Result (*)(Ours...), CUresult (*)(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
      return (same_parameter<Ours, Theirs>() && ...);
    } else {
      return false;
    }
  }();
};

// Handles of driver objects and addresses are pointers there; some are 64-bit numbers here and
// there alike.
#define CHECK(member, symbol, parameters)                                  \
  static_assert(SameAbi<Result(*) parameters, decltype(&::symbol)>::value, \
                #symbol " differs from cuda.h");
PIPELIVE_CUDA_DRIVER_FUNCTIONS(CHECK)
CHECK(launch_kernel_ex, cuLaunchKernelEx,
      (const LaunchConfig* config, FunctionHandle function, void** parameters, void** extra))
CHECK(stream_write_value32, cuStreamWriteValue32_v2,
      (StreamHandle stream, DevicePointer address, std::uint32_t value, unsigned flags))
#if CUDA_VERSION >= 13000
static_assert(
    SameAbi<decltype(DriverApi::memcpy_batch_async), decltype(&::cuMemcpyBatchAsync_v2)>::value,
    "cuMemcpyBatchAsync_v2 differs from cuda.h");
#endif
#undef CHECK

#define SAME_SIZE(Ours, Theirs) \
  static_assert(sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs), #Ours)
#define SAME_PLACE(Ours, ours, Theirs, theirs)                                        \
  static_assert(offsetof(Ours, ours) == offsetof(Theirs, theirs) &&                   \
                    sizeof(decltype(Ours::ours)) == sizeof(decltype(Theirs::theirs)), \
                #Ours "." #ours)
#define SAME_VALUE(ours, theirs) \
  static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #ours)

SAME_SIZE(MemoryLocation, CUmemLocation);
SAME_PLACE(MemoryLocation, type, CUmemLocation, type);
SAME_PLACE(MemoryLocation, id, CUmemLocation, id);
SAME_SIZE(AllocationProperties, CUmemAllocationProp);
SAME_PLACE(AllocationProperties, type, CUmemAllocationProp, type);
SAME_PLACE(AllocationProperties, handle_types, CUmemAllocationProp, requestedHandleTypes);
SAME_PLACE(AllocationProperties, location, CUmemAllocationProp, location);
SAME_PLACE(AllocationProperties, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
SAME_PLACE(AllocationProperties, flags, CUmemAllocationProp, allocFlags);
static_assert(offsetof(AllocationProperties, flags.rdma_capable) ==
              offsetof(CUmemAllocationProp, allocFlags.gpuDirectRDMACapable));
static_assert(offsetof(AllocationProperties, flags.usage) ==
              offsetof(CUmemAllocationProp, allocFlags.usage));
SAME_SIZE(AccessDescriptor, CUmemAccessDesc);
SAME_PLACE(AccessDescriptor, location, CUmemAccessDesc, location);
SAME_PLACE(AccessDescriptor, access, CUmemAccessDesc, flags);
SAME_SIZE(Uuid, CUuuid);
SAME_SIZE(IpcMemoryHandle, CUipcMemHandle);
SAME_SIZE(IpcEventHandle, CUipcEventHandle);
SAME_SIZE(Copy2D, CUDA_MEMCPY2D);
SAME_PLACE(Copy2D, source_x_bytes, CUDA_MEMCPY2D, srcXInBytes);
SAME_PLACE(Copy2D, source_y, CUDA_MEMCPY2D, srcY);
SAME_PLACE(Copy2D, source_type, CUDA_MEMCPY2D, srcMemoryType);
SAME_PLACE(Copy2D, source_host, CUDA_MEMCPY2D, srcHost);
SAME_PLACE(Copy2D, source_device, CUDA_MEMCPY2D, srcDevice);
SAME_PLACE(Copy2D, source_array, CUDA_MEMCPY2D, srcArray);
SAME_PLACE(Copy2D, source_pitch, CUDA_MEMCPY2D, srcPitch);
SAME_PLACE(Copy2D, target_x_bytes, CUDA_MEMCPY2D, dstXInBytes);
SAME_PLACE(Copy2D, target_y, CUDA_MEMCPY2D, dstY);
SAME_PLACE(Copy2D, target_type, CUDA_MEMCPY2D, dstMemoryType);
SAME_PLACE(Copy2D, target_host, CUDA_MEMCPY2D, dstHost);
SAME_PLACE(Copy2D, target_device, CUDA_MEMCPY2D, dstDevice);
SAME_PLACE(Copy2D, target_array, CUDA_MEMCPY2D, dstArray);
SAME_PLACE(Copy2D, target_pitch, CUDA_MEMCPY2D, dstPitch);
SAME_PLACE(Copy2D, width_bytes, CUDA_MEMCPY2D, WidthInBytes);
SAME_PLACE(Copy2D, height, CUDA_MEMCPY2D, Height);
SAME_SIZE(LaunchConfig, CUlaunchConfig);
SAME_PLACE(LaunchConfig, shared_bytes, CUlaunchConfig, sharedMemBytes);
SAME_PLACE(LaunchConfig, stream, CUlaunchConfig, hStream);
SAME_PLACE(LaunchConfig, attributes, CUlaunchConfig, attrs);
SAME_PLACE(LaunchConfig, attribute_count, CUlaunchConfig, numAttrs);
#if CUDA_VERSION >= 12080
SAME_SIZE(CopyAttributes, CUmemcpyAttributes);
SAME_PLACE(CopyAttributes, source_order, CUmemcpyAttributes, srcAccessOrder);
SAME_PLACE(CopyAttributes, source_hint, CUmemcpyAttributes, srcLocHint);
SAME_PLACE(CopyAttributes, target_hint, CUmemcpyAttributes, dstLocHint);
SAME_PLACE(CopyAttributes, flags, CUmemcpyAttributes, flags);
SAME_VALUE(CopySourceOrder::stream, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
SAME_VALUE(CopySourceOrder::any, CU_MEMCPY_SRC_ACCESS_ORDER_ANY);
#endif

SAME_VALUE(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(kInvalidValue, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(kNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
SAME_VALUE(kDeinitialized, CUDA_ERROR_DEINITIALIZED);
SAME_VALUE(kNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(kInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(kNotFound, CUDA_ERROR_NOT_FOUND);
SAME_VALUE(kNotReady, CUDA_ERROR_NOT_READY);
SAME_VALUE(kIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
SAME_VALUE(kPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
SAME_VALUE(kPeerAccessNotEnabled, CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
SAME_VALUE(kHostMemoryAlreadyRegistered, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
SAME_VALUE(kHostMemoryNotRegistered, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
SAME_VALUE(kLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
SAME_VALUE(kNotPermitted, CUDA_ERROR_NOT_PERMITTED);
SAME_VALUE(kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
SAME_VALUE(kUnsupportedPtxVersion, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME_VALUE(kStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME_VALUE(kStreamCaptureInvalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
SAME_VALUE(kStreamCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
SAME_VALUE(kStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
SAME_VALUE(kCapturedEvent, CUDA_ERROR_CAPTURED_EVENT);
SAME_VALUE(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME_VALUE(kEventBlockingSync, CU_EVENT_BLOCKING_SYNC);
SAME_VALUE(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(kEventInterprocess, CU_EVENT_INTERPROCESS);
SAME_VALUE(kHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE);
SAME_VALUE(kHostAllocDeviceMap, CU_MEMHOSTALLOC_DEVICEMAP);
SAME_VALUE(kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
SAME_VALUE(kHostRegisterDeviceMap, CU_MEMHOSTREGISTER_DEVICEMAP);
SAME_VALUE(kIpcLazyPeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
SAME_VALUE(DeviceAttribute::max_shared_memory_per_block,
           CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
SAME_VALUE(DeviceAttribute::warp_size, CU_DEVICE_ATTRIBUTE_WARP_SIZE);
SAME_VALUE(DeviceAttribute::multiprocessor_count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME_VALUE(DeviceAttribute::integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED);
SAME_VALUE(DeviceAttribute::compute_mode, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE);
SAME_VALUE(DeviceAttribute::memory_clock_khz, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
SAME_VALUE(DeviceAttribute::memory_bus_bits, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
SAME_VALUE(DeviceAttribute::l2_cache_bytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
SAME_VALUE(DeviceAttribute::async_engine_count, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
SAME_VALUE(DeviceAttribute::unified_addressing, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
SAME_VALUE(DeviceAttribute::compute_capability_major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME_VALUE(DeviceAttribute::compute_capability_minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME_VALUE(DeviceAttribute::max_shared_memory_per_multiprocessor,
           CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
SAME_VALUE(DeviceAttribute::host_registered_same_pointer,
           CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
SAME_VALUE(DeviceAttribute::cooperative_launch, CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH);
SAME_VALUE(DeviceAttribute::max_shared_memory_per_block_optin,
           CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME_VALUE(DeviceAttribute::virtual_memory_supported,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME_VALUE(DeviceAttribute::posix_handle_supported,
           CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME_VALUE(DeviceAttribute::rdma_with_vmm_supported,
           CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
SAME_VALUE(DeviceAttribute::rdma_supported, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED);
SAME_VALUE(P2PAttribute::performance_rank, CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK);
SAME_VALUE(P2PAttribute::access_supported, CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED);
SAME_VALUE(P2PAttribute::native_atomic_supported, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED);
SAME_VALUE(FunctionAttribute::max_threads_per_block, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
SAME_VALUE(FunctionAttribute::shared_bytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
SAME_VALUE(FunctionAttribute::local_bytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
SAME_VALUE(FunctionAttribute::num_registers, CU_FUNC_ATTRIBUTE_NUM_REGS);
SAME_VALUE(FunctionAttribute::binary_version, CU_FUNC_ATTRIBUTE_BINARY_VERSION);
SAME_VALUE(FunctionAttribute::max_dynamic_shared_bytes,
           CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME_VALUE(FunctionAttribute::preferred_shared_carveout,
           CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT);
SAME_VALUE(FunctionAttribute::non_portable_cluster_allowed,
           CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
SAME_VALUE(PointerAttribute::context, CU_POINTER_ATTRIBUTE_CONTEXT);
SAME_VALUE(PointerAttribute::memory_type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
SAME_VALUE(PointerAttribute::device_pointer, CU_POINTER_ATTRIBUTE_DEVICE_POINTER);
SAME_VALUE(PointerAttribute::is_managed, CU_POINTER_ATTRIBUTE_IS_MANAGED);
SAME_VALUE(PointerAttribute::device_ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME_VALUE(PointerAttribute::is_legacy_ipc_capable,
           CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
SAME_VALUE(PointerAttribute::range_start, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
SAME_VALUE(PointerAttribute::range_bytes, CU_POINTER_ATTRIBUTE_RANGE_SIZE);
SAME_VALUE(PointerAttribute::mapped, CU_POINTER_ATTRIBUTE_MAPPED);
SAME_VALUE(PointerAttribute::allowed_handle_types, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES);
SAME_VALUE(kMemoryTypeHost, CU_MEMORYTYPE_HOST);
SAME_VALUE(kMemoryTypeDevice, CU_MEMORYTYPE_DEVICE);
SAME_VALUE(CaptureMode::relaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME_VALUE(CaptureMode::thread_local_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME_VALUE(CaptureStatus::active, CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME_VALUE(CaptureStatus::invalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
SAME_VALUE(MemoryLocationType::device, CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(MemoryAllocationType::pinned, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME_VALUE(ShareableHandleType::posix_fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(MemoryAccess::read, CU_MEM_ACCESS_FLAGS_PROT_READ);
SAME_VALUE(MemoryAccess::read_write, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME_VALUE(Granularity::minimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
SAME_VALUE(Granularity::recommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);

}  // namespace
}  // namespace pipelive::cuda
