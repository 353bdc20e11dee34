// A libnccl.so.2 in which every transfer is over at once: a receive brings zeros, a send reads what
// it is given. For the fuzzer, which plays the peer and has no second communicator.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "pipelive/cuda/nccl_api.hpp"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

using pipelive::cuda::kNcclSuccess;
using pipelive::cuda::NcclCommHandle;
using pipelive::cuda::NcclConfig;
using pipelive::cuda::NcclResult;
using pipelive::cuda::NcclUniqueId;

namespace pipelive::cuda {
struct ncclComm {};
}  // namespace pipelive::cuda

namespace {

void check(const void* data, std::size_t count) {
  if (data != nullptr && count > 0 && count <= PIPELIVE_FUZZ_PIECE) return;
  std::fprintf(stderr, "broken rule: a transfer of %zu bytes stays inside the piece\n", count);
  std::abort();
}

}  // namespace

FAKE_EXPORT NcclResult ncclGetVersion(int* version) {
  *version = 22703;
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclGetUniqueId(NcclUniqueId* id) {
  std::memset(id, 0, sizeof *id);
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclCommInitRankConfig(NcclCommHandle* comm, int, NcclUniqueId, int,
                                              NcclConfig*) {
  *comm = new pipelive::cuda::ncclComm();
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclCommAbort(NcclCommHandle comm) {
  delete comm;
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclCommGetAsyncError(NcclCommHandle, NcclResult* state) {
  *state = kNcclSuccess;
  return kNcclSuccess;
}
FAKE_EXPORT const char* ncclGetErrorString(NcclResult) {
  return "some error";
}
FAKE_EXPORT const char* ncclGetLastError(NcclCommHandle) {
  return "";
}
FAKE_EXPORT NcclResult ncclSend(const void* data, std::size_t count, int, int, NcclCommHandle,
                                void*) {
  check(data, count);
  unsigned char sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum ^= static_cast<const unsigned char*>(data)[i];
  static_cast<void>(*const_cast<volatile unsigned char*>(&sum));
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclRecv(void* data, std::size_t count, int, int, NcclCommHandle, void*) {
  check(data, count);
  std::memset(data, 0, count);
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclGroupStart() {
  return kNcclSuccess;
}
FAKE_EXPORT NcclResult ncclGroupEnd() {
  return kNcclSuccess;
}
