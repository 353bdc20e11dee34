#pragma once

#include <cstddef>
#include <cstdint>

/// The types and numbers of the CUDA driver API that we use, typed by hand so that no CUDA header
/// is needed. Layouts and values are the driver's; cuda/tests/abi_check.cu compares them with
/// cuda.h wherever nvcc is at hand.
namespace pipelive::cuda {

using Result = int;  ///< CUresult
inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotInitialized = 3;
inline constexpr Result kDeinitialized = 4;
inline constexpr Result kNoDevice = 100;
inline constexpr Result kInvalidDevice = 101;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kUnsupportedPtxVersion = 222;
inline constexpr Result kNotFound = 500;
inline constexpr Result kNotReady = 600;
inline constexpr Result kIllegalAddress = 700;
inline constexpr Result kPeerAccessAlreadyEnabled = 704;
inline constexpr Result kPeerAccessNotEnabled = 705;
inline constexpr Result kHostMemoryAlreadyRegistered = 712;
inline constexpr Result kHostMemoryNotRegistered = 713;
inline constexpr Result kLaunchFailed = 719;
inline constexpr Result kNotPermitted = 800;
inline constexpr Result kNotSupported = 801;
inline constexpr Result kStreamCaptureUnsupported = 900;
inline constexpr Result kStreamCaptureInvalidated = 901;
// Of a captured stream that is to wait for an event from outside of the capture.
inline constexpr Result kStreamCaptureIsolation = 905;
// Of the legacy default stream, while another stream is captured that waits for it.
inline constexpr Result kStreamCaptureImplicit = 906;
// Of an event that was last recorded in a captured stream: it marks a place in the graph.
inline constexpr Result kCapturedEvent = 907;

using DeviceOrdinal = int;                       ///< CUdevice
using DevicePointer = std::uint64_t;             ///< CUdeviceptr
using AllocationHandle = std::uint64_t;          ///< CUmemGenericAllocationHandle; opaque
using ContextHandle = struct ContextOpaque*;     ///< CUcontext
using ModuleHandle = struct ModuleOpaque*;       ///< CUmodule
using FunctionHandle = struct FunctionOpaque*;   ///< CUfunction
using StreamHandle = struct StreamOpaque*;       ///< CUstream; nullptr is the legacy default stream
using EventHandle = struct EventOpaque*;         ///< CUevent
using ArrayHandle = struct ArrayOpaque*;         ///< CUarray
using HostFunction = void (*)(void* user_data);  ///< CUhostFn

/// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD: handles that name an implicit stream.
inline constexpr std::uintptr_t kLegacyStream = 1;
inline constexpr std::uintptr_t kPerThreadStream = 2;

// Flags of calls.
inline constexpr unsigned kStreamNonBlocking = 1;      ///< CU_STREAM_NON_BLOCKING
inline constexpr unsigned kEventBlockingSync = 1;      ///< CU_EVENT_BLOCKING_SYNC
inline constexpr unsigned kEventDisableTiming = 2;     ///< CU_EVENT_DISABLE_TIMING
inline constexpr unsigned kEventInterprocess = 4;      ///< CU_EVENT_INTERPROCESS
inline constexpr unsigned kHostAllocPortable = 1;      ///< CU_MEMHOSTALLOC_PORTABLE
inline constexpr unsigned kHostAllocDeviceMap = 2;     ///< CU_MEMHOSTALLOC_DEVICEMAP
inline constexpr unsigned kHostRegisterPortable = 1;   ///< CU_MEMHOSTREGISTER_PORTABLE
inline constexpr unsigned kHostRegisterDeviceMap = 2;  ///< CU_MEMHOSTREGISTER_DEVICEMAP
inline constexpr unsigned kIpcLazyPeerAccess = 1;      ///< CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

enum class DeviceAttribute : int {
  max_shared_memory_per_block = 8,
  warp_size = 10,
  multiprocessor_count = 16,
  integrated = 18,
  compute_mode = 20,
  memory_clock_khz = 36,
  memory_bus_bits = 37,
  l2_cache_bytes = 38,
  async_engine_count = 40,
  unified_addressing = 41,
  compute_capability_major = 75,
  compute_capability_minor = 76,
  max_shared_memory_per_multiprocessor = 81,
  host_registered_same_pointer = 91,
  cooperative_launch = 95,
  max_shared_memory_per_block_optin = 97,
  virtual_memory_supported = 102,
  posix_handle_supported = 103,
  rdma_with_vmm_supported = 110,
  rdma_supported = 116,
};

enum class P2PAttribute : int {
  performance_rank = 1,
  access_supported = 2,
  native_atomic_supported = 3,
};

enum class FunctionAttribute : int {
  max_threads_per_block = 0,
  shared_bytes = 1,
  local_bytes = 3,
  num_registers = 4,
  binary_version = 6,
  max_dynamic_shared_bytes = 8,
  preferred_shared_carveout = 9,
  non_portable_cluster_allowed = 14,
};

enum class PointerAttribute : int {
  context = 1,
  memory_type = 2,
  device_pointer = 3,
  is_managed = 8,
  device_ordinal = 9,
  is_legacy_ipc_capable = 10,
  range_start = 11,
  range_bytes = 12,
  mapped = 13,
  allowed_handle_types = 14,
};
inline constexpr unsigned kMemoryTypeHost = 1;
inline constexpr unsigned kMemoryTypeDevice = 2;

enum class CaptureMode : int { global = 0, thread_local_ = 1, relaxed = 2 };
enum class CaptureStatus : int { none = 0, active = 1, invalidated = 2 };

enum class MemoryLocationType : int { invalid = 0, device = 1, host = 2 };
enum class MemoryAllocationType : int { invalid = 0, pinned = 1 };
enum class ShareableHandleType : int { none = 0, posix_fd = 1 };
enum class MemoryAccess : int { none = 0, read = 1, read_write = 3 };
enum class Granularity : int { minimum = 0, recommended = 1 };

struct MemoryLocation {  ///< CUmemLocation
  MemoryLocationType type = MemoryLocationType::invalid;
  int id = 0;
};

struct AllocationProperties {  ///< CUmemAllocationProp
  MemoryAllocationType type = MemoryAllocationType::invalid;
  ShareableHandleType handle_types = ShareableHandleType::none;
  MemoryLocation location;
  void* win32_metadata = nullptr;
  struct Flags {
    unsigned char compression_type = 0;
    unsigned char rdma_capable = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {};
  } flags;
};

struct AccessDescriptor {  ///< CUmemAccessDesc
  MemoryLocation location;
  MemoryAccess access = MemoryAccess::none;
};

struct Uuid {  ///< CUuuid
  char bytes[16];
};

struct IpcMemoryHandle {  ///< CUipcMemHandle
  char reserved[64];
};
struct IpcEventHandle {  ///< CUipcEventHandle
  char reserved[64];
};

struct Copy2D {  ///< CUDA_MEMCPY2D_v2; memory types as kMemoryType*
  std::size_t source_x_bytes = 0;
  std::size_t source_y = 0;
  int source_type = kMemoryTypeDevice;
  const void* source_host = nullptr;
  DevicePointer source_device = 0;
  ArrayHandle source_array = nullptr;
  std::size_t source_pitch = 0;
  std::size_t target_x_bytes = 0;
  std::size_t target_y = 0;
  int target_type = kMemoryTypeDevice;
  void* target_host = nullptr;
  DevicePointer target_device = 0;
  ArrayHandle target_array = nullptr;
  std::size_t target_pitch = 0;
  std::size_t width_bytes = 0;
  std::size_t height = 0;
};

enum class CopySourceOrder : int { stream = 1, during_call = 2, any = 3 };

struct CopyAttributes {  ///< CUmemcpyAttributes
  CopySourceOrder source_order = CopySourceOrder::stream;
  MemoryLocation source_hint;
  MemoryLocation target_hint;
  unsigned flags = 0;
};

struct LaunchAttribute;  ///< CUlaunchAttribute; none is used yet

struct LaunchConfig {  ///< CUlaunchConfig
  unsigned grid_x = 1;
  unsigned grid_y = 1;
  unsigned grid_z = 1;
  unsigned block_x = 1;
  unsigned block_y = 1;
  unsigned block_z = 1;
  unsigned shared_bytes = 0;
  StreamHandle stream = nullptr;
  LaunchAttribute* attributes = nullptr;
  unsigned attribute_count = 0;
};

}  // namespace pipelive::cuda
