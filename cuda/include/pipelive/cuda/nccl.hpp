#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pipelive/cuda/nccl_api.hpp"

namespace pipelive::cuda {

inline constexpr std::string_view kNcclLibrary = "libnccl.so.2";
inline constexpr int kNcclOldest = 21800;        ///< non-blocking communicators that can be aborted
inline constexpr int kNcclLaunchOrder = 22600;   ///< NCCL_LAUNCH_ORDER_IMPLICIT
inline constexpr int kNcclMultiRankGpu = 23000;  ///< NCCL_MULTI_RANK_GPU_ENABLE

/// "2.27.3" for 22703; releases before 2.9 had another code.
[[nodiscard]] std::string nccl_version_text(int version);

/// libnccl, opened at run time. Immutable, so it may be used by several threads; what may not is
/// said at the functions.
class Nccl {
 public:
  /// The library that this process has loaded already, if there is one: two copies in one process
  /// would not know of each other. Else the first of `candidates` (paths, or names that the loader
  /// searches) that opens, has every entry point and is new enough. Throws Error(device) that says
  /// for each why it was not, or that NCCL_COMM_BLOCKING is set.
  [[nodiscard]] static std::shared_ptr<const Nccl> open(std::span<const std::string> candidates);

  [[nodiscard]] const NcclApi& api() const noexcept { return api_; }
  /// 10000 * major + 100 * minor + patch.
  [[nodiscard]] int version() const noexcept { return version_; }
  /// Where the loader found it.
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

  /// Throws Error(device) for any result but success and in progress: "ncclSend:
  /// ncclInvalidUsage (5): invalid usage; ...".
  void check(NcclResult result, std::string_view call, NcclCommHandle comm = nullptr) const;
  /// As check, of a communicator that is up: throws Error(closed) for the results that a lost
  /// connection or a peer that died shows as (remote, system and internal error).
  void check_transfer(NcclResult result, std::string_view call,
                      NcclCommHandle comm = nullptr) const;
  [[nodiscard]] std::string describe(NcclResult result, std::string_view call,
                                     NcclCommHandle comm) const;

  [[nodiscard]] NcclUniqueId unique_id() const;

 private:
  struct Closer {
    void operator()(void* library) const noexcept;
  };

  Nccl() = default;
  void load(void* library, const std::string& name);

  std::unique_ptr<void, Closer> library_;
  NcclApi api_;
  int version_ = 0;
  std::string path_;
};

/// What `Nccl::open` would find, for reports; never throws for a library that is missing or broken.
struct NcclProbe {
  std::optional<int> version;
  std::string path;
  bool launch_order = false;    ///< launches of several communicators can be ordered implicitly
  bool multi_rank_gpu = false;  ///< two ranks on one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1
  std::string problem;          ///< why it cannot be used, and what was tried; empty where it can
};
[[nodiscard]] NcclProbe probe_nccl(std::span<const std::string> candidates);

}  // namespace pipelive::cuda
