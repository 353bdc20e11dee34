#pragma once

#include <dlfcn.h>

#include <atomic>
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
                             "version", "fail_init_rank", "fail_first_rank", "hold_abort"}) {
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

/// Of a GPU of its own, as far as the fake knows: its threads enter that.
inline std::shared_ptr<NcclIssuer> make_issuer() {
  static std::atomic<int> next{0};
  return std::make_shared<NcclIssuer>([device = next++]() -> std::shared_ptr<void> {
    void* const library = dlopen(PIPELIVE_FAKE_NCCL, RTLD_NOW | RTLD_LOCAL);
    const auto enter = reinterpret_cast<void (*)(int)>(dlsym(library, "fake_nccl_enter"));
    enter(device);
    return {library, [enter](void* /*open*/) { enter(-1); }};
  });
}

/// A place for a rank whose device is plain memory; its issuer stands for a GPU.
inline NcclComm::Place host_place(std::shared_ptr<NcclIssuer> issuer = nullptr,
                                  std::shared_ptr<Device> device = nullptr,
                                  std::shared_ptr<DeviceTurn> turn = nullptr) {
  NcclComm::Place place;
  place.nccl = open_fake();
  place.issuer = issuer ? std::move(issuer) : make_issuer();
  place.device = device ? std::move(device) : std::make_shared<HostDevice>();
  place.turn = std::move(turn);
  return place;
}

}  // namespace pipelive::cuda::test
