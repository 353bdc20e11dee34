#pragma once

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "pipelive/cuda/nccl_comm.hpp"
#include "pipelive/device/host_device.hpp"

namespace pipelive::cuda::test {

/// The fake's own controls, found in the library that Nccl::open has loaded.
class FakeNccl {
 public:
  FakeNccl() : library_(dlopen(PIPELIVE_FAKE_NCCL, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    set_ = reinterpret_cast<void (*)(const char*, int)>(dlsym(library_, "fake_nccl_set"));
    count_ = reinterpret_cast<int (*)(const char*)>(dlsym(library_, "fake_nccl_count"));
    for (const char* name : {"stall", "stall_init", "fail_init", "fail_issue", "async_error",
                             "version", "slow_abort_ms"}) {
      set(name, 0);
    }
    violations_ = count("violations");
  }
  void set(const char* name, int value) const { set_(name, value); }
  [[nodiscard]] int count(const char* name) const { return count_(name); }
  /// Since this object was made.
  [[nodiscard]] int violations() const { return count("violations") - violations_; }

 private:
  void* library_;
  void (*set_)(const char*, int) = nullptr;
  int (*count_)(const char*) = nullptr;
  int violations_ = 0;
};

inline std::shared_ptr<const Nccl> open_fake() {
  const std::string candidates[] = {PIPELIVE_FAKE_NCCL};
  return Nccl::open(candidates);
}

/// A place for a rank whose device is plain memory; its issuing thread stands for a GPU.
inline NcclComm::Place host_place(std::shared_ptr<NcclIssuer> issuer = nullptr,
                                  std::shared_ptr<Device> device = nullptr) {
  NcclComm::Place place;
  place.nccl = open_fake();
  place.issuer = issuer ? std::move(issuer) : std::make_shared<NcclIssuer>(nullptr);
  place.device = device ? std::move(device) : std::make_shared<HostDevice>();
  return place;
}

}  // namespace pipelive::cuda::test
