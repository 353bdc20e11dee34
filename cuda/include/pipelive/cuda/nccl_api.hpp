#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

/// The entry points of libnccl.so.2 that we use, typed by hand so that no NCCL header is needed.
/// Layouts and values are those of nccl.h from 2.18 on; they have not changed up to 2.32.
namespace pipelive::cuda {

using NcclResult = int;  ///< ncclResult_t
inline constexpr NcclResult kNcclSuccess = 0;
inline constexpr NcclResult kNcclUnhandledCudaError = 1;
inline constexpr NcclResult kNcclSystemError = 2;
inline constexpr NcclResult kNcclInternalError = 3;
inline constexpr NcclResult kNcclInvalidArgument = 4;
inline constexpr NcclResult kNcclInvalidUsage = 5;
inline constexpr NcclResult kNcclRemoteError = 6;
inline constexpr NcclResult kNcclInProgress = 7;

using NcclCommHandle = struct ncclComm*;  ///< ncclComm_t
inline constexpr int kNcclUint8 = 1;      ///< ncclUint8 of ncclDataType_t

/// ncclUniqueId; travels by value.
struct NcclUniqueId {
  char internal[128];
};
static_assert(sizeof(NcclUniqueId) == 128 && alignof(NcclUniqueId) == 1);

/// ncclConfig_t as of 2.17 (ncclConfig_v21700). A library takes as many bytes as `size` says over
/// its own defaults, and sets the fields that are newer than `version` back to them; so this one
/// serves every later release. The last word is padding up to 2.24 and `trafficClass` after.
struct NcclConfig {
  static constexpr int kUndefined = INT_MIN;  ///< NCCL_CONFIG_UNDEF_INT

  std::size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;  ///< NCCL_VERSION(2, 18, 0)
  int blocking = 0;
  int cga_cluster_size = kUndefined;
  // Thread blocks that spin on the engine's multiprocessors while a transfer runs. Of itself NCCL
  // takes 16 to 32. What the bound costs in speed was not measured.
  int min_ctas = 1;
  int max_ctas = 8;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;
};
static_assert(sizeof(NcclConfig) == 48 && offsetof(NcclConfig, magic) == 8 &&
              offsetof(NcclConfig, version) == 12 && offsetof(NcclConfig, blocking) == 16 &&
              offsetof(NcclConfig, max_ctas) == 28 && offsetof(NcclConfig, net_name) == 32 &&
              offsetof(NcclConfig, split_share) == 40 && offsetof(NcclConfig, traffic_class) == 44);

// X(member, symbol, returned type, parameters). All exist since 2.14. Streams are CUstream, which
// is the same as cudaStream_t.
#define PIPELIVE_NCCL_FUNCTIONS(X)                                                                \
  X(get_version, "ncclGetVersion", NcclResult, (int* version))                                    \
  X(get_unique_id, "ncclGetUniqueId", NcclResult, (NcclUniqueId * id))                            \
  X(comm_init_rank_config, "ncclCommInitRankConfig", NcclResult,                                  \
    (NcclCommHandle * comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config))            \
  X(comm_abort, "ncclCommAbort", NcclResult, (NcclCommHandle comm))                               \
  X(comm_get_async_error, "ncclCommGetAsyncError", NcclResult,                                    \
    (NcclCommHandle comm, NcclResult * state))                                                    \
  X(get_error_string, "ncclGetErrorString", const char*, (NcclResult result))                     \
  X(get_last_error, "ncclGetLastError", const char*, (NcclCommHandle comm))                       \
  X(send, "ncclSend", NcclResult,                                                                 \
    (const void* data, std::size_t count, int type, int peer, NcclCommHandle comm, void* stream)) \
  X(recv, "ncclRecv", NcclResult,                                                                 \
    (void* data, std::size_t count, int type, int peer, NcclCommHandle comm, void* stream))       \
  X(group_start, "ncclGroupStart", NcclResult, ())                                                \
  X(group_end, "ncclGroupEnd", NcclResult, ())

/// The loaded functions; after Nccl::open none of them is null.
struct NcclApi {
#define PIPELIVE_NCCL_MEMBER(member, symbol, type, parameters) type(*member) parameters = nullptr;
  PIPELIVE_NCCL_FUNCTIONS(PIPELIVE_NCCL_MEMBER)
#undef PIPELIVE_NCCL_MEMBER
};

}  // namespace pipelive::cuda
