#include "pipelive/cuda/nccl.hpp"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive::cuda {
namespace {

// libnccl starts threads of its own; NODELETE keeps its code mapped for them.
constexpr int kMode = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;

std::string loader_message() {
  const char* message = dlerror();
  return message != nullptr ? message : "the loader gave no reason";
}

// NCCL lets its environment win over what a communicator is made with.
void check_environment() {
  const char* const value = std::getenv("NCCL_COMM_BLOCKING");
  if (value == nullptr || std::strtoll(value, nullptr, 0) == 0) return;
  throw Error(ErrorCode::device, "NCCL_COMM_BLOCKING is " + std::string(value) +
                                     ": its calls would block, and could not be ended at a limit");
}

std::string_view name_of(NcclResult result) {
  constexpr std::array<std::string_view, 9> kNames = {
      "ncclSuccess",       "ncclUnhandledCudaError", "ncclSystemError",
      "ncclInternalError", "ncclInvalidArgument",    "ncclInvalidUsage",
      "ncclRemoteError",   "ncclInProgress",         "ncclTimeout"};
  const auto index = static_cast<std::size_t>(result);
  return result >= 0 && index < kNames.size() ? kNames[index] : "unknown result";
}

}  // namespace

std::string nccl_version_text(int version) {
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int rest = version < 10000 ? version % 1000 : version % 10000;
  return std::to_string(major) + "." + std::to_string(rest / 100) + "." +
         std::to_string(rest % 100);
}

void Nccl::Closer::operator()(void* library) const noexcept {
  dlclose(library);
}

void Nccl::load(void* library, const std::string& name) {
  library_.reset(library);
#define PIPELIVE_NCCL_LOAD(member, symbol, type, parameters)                                  \
  api_.member = reinterpret_cast<type(*) parameters>(dlsym(library, symbol));                 \
  if (api_.member == nullptr) {                                                               \
    throw Error(ErrorCode::device, name + " lacks " symbol "; NCCL 2.18 or later is needed"); \
  }
  PIPELIVE_NCCL_FUNCTIONS(PIPELIVE_NCCL_LOAD)
#undef PIPELIVE_NCCL_LOAD
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(api_.get_version), &info) != 0 && info.dli_fname != nullptr) {
    path_ = info.dli_fname;
  }
  check(api_.get_version(&version_), "ncclGetVersion");
  if (version_ < kNcclOldest) {
    throw Error(ErrorCode::device, name + " is NCCL " + nccl_version_text(version_) + ", " +
                                       nccl_version_text(kNcclOldest) + " or later is needed");
  }
}

std::shared_ptr<const Nccl> Nccl::open(std::span<const std::string> candidates) {
  check_environment();
  std::string tried;
  const auto attempt = [&](const std::string& name, int mode,
                           const char* what) -> std::shared_ptr<const Nccl> {
    void* const library = dlopen(name.c_str(), kMode | mode);
    if (library == nullptr) {
      tried += tried.empty() ? "" : "; ";
      tried += mode != 0 ? name + " is not loaded in this process" : loader_message();
      static_cast<void>(dlerror());
      return nullptr;
    }
    try {
      std::shared_ptr<Nccl> nccl(new Nccl());
      nccl->load(library, name + what);
      return nccl;
    } catch (const Error& error) {
      tried += (tried.empty() ? "" : "; ") + std::string(error.what());
      return nullptr;
    }
  };
  if (auto nccl = attempt(std::string(kNcclLibrary), RTLD_NOLOAD, " (loaded already)")) return nccl;
  for (const std::string& candidate : candidates) {
    if (auto nccl = attempt(candidate, 0, "")) return nccl;
  }
  throw Error(ErrorCode::device, "no NCCL library can be used: " + tried);
}

std::string Nccl::describe(NcclResult result, std::string_view call, NcclCommHandle comm) const {
  const char* text = api_.get_error_string != nullptr ? api_.get_error_string(result) : nullptr;
  std::string message = std::string(call) + ": " + std::string(name_of(result)) + " (" +
                        std::to_string(result) + "): " + (text != nullptr ? text : "?");
  const char* last = api_.get_last_error != nullptr ? api_.get_last_error(comm) : nullptr;
  if (last != nullptr && *last != '\0') message += "; " + std::string(last);
  return message;
}

void Nccl::check(NcclResult result, std::string_view call, NcclCommHandle comm) const {
  if (result == kNcclSuccess || result == kNcclInProgress) return;
  throw Error(ErrorCode::device, describe(result, call, comm));
}

void Nccl::check_transfer(NcclResult result, std::string_view call, NcclCommHandle comm) const {
  if (result == kNcclRemoteError || result == kNcclSystemError || result == kNcclInternalError) {
    throw Error(ErrorCode::closed, describe(result, call, comm));
  }
  check(result, call, comm);
}

NcclUniqueId Nccl::unique_id() const {
  NcclUniqueId id{};
  check(api_.get_unique_id(&id), "ncclGetUniqueId");
  return id;
}

NcclProbe probe_nccl(std::span<const std::string> candidates) {
  NcclProbe probe;
  try {
    const std::shared_ptr<const Nccl> nccl = Nccl::open(candidates);
    probe.version = nccl->version();
    probe.path = nccl->path();
    probe.launch_order = nccl->version() >= kNcclLaunchOrder;
    probe.multi_rank_gpu = nccl->version() >= kNcclMultiRankGpu;
  } catch (const Error& error) {
    probe.problem = error.what();
  }
  return probe;
}

}  // namespace pipelive::cuda
