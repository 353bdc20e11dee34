#pragma once

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

/// Plain memory with one stream besides, in which the fake's transfers run.
class StreamDevice final : public Device {
 public:
  StreamDevice() : library_(dlopen(PIPELIVE_FAKE_NCCL, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    record_ = reinterpret_cast<std::uint64_t (*)(void*)>(dlsym(library_, "fake_nccl_record"));
    done_ = reinterpret_cast<int (*)(void*, std::uint64_t)>(dlsym(library_, "fake_nccl_done"));
    stream_.handle = reinterpret_cast<void* (*)()>(dlsym(library_, "fake_nccl_stream"))();
  }
  [[nodiscard]] Stream stream() const noexcept { return stream_; }

  [[nodiscard]] const DeviceInfo& info() const noexcept override { return host_.info(); }
  [[nodiscard]] DeviceUsage usage() const override { return host_.usage(); }
  [[nodiscard]] std::byte* reserve(std::size_t bytes, std::size_t alignment) override {
    return host_.reserve(bytes, alignment);
  }
  void release(std::byte* address, std::size_t bytes) noexcept override {
    host_.release(address, bytes);
  }
  [[nodiscard]] std::vector<PageHandle> create_pages(std::size_t page_bytes,
                                                     std::size_t count) override {
    return host_.create_pages(page_bytes, count);
  }
  void destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) override {
    host_.destroy_pages(page_bytes, pages);
  }
  void map(std::byte* address, std::size_t page_bytes, std::span<const PageHandle> pages) override {
    host_.map(address, page_bytes, pages);
  }
  void map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                    PageHandle page) override {
    host_.map_repeated(address, bytes, page_bytes, page);
  }
  void unmap(std::byte* address, std::size_t bytes) override { host_.unmap(address, bytes); }
  void copy(std::byte* target, const std::byte* source, std::size_t bytes, Stream stream) override {
    host_.copy(target, source, bytes, stream);
  }
  void fill(std::byte* target, int value, std::size_t bytes, Stream stream) override {
    host_.fill(target, value, bytes, stream);
  }
  [[nodiscard]] std::shared_ptr<Event> record(Stream stream) override {
    return std::make_shared<Mark>(*this, stream, record_(stream.handle));
  }
  void order_after(Stream /*stream*/, const std::shared_ptr<Event>& event) override {
    event->wait(Deadline::after(std::chrono::seconds(30)));
  }
  [[nodiscard]] ExportedPages export_page(std::size_t page_bytes, PageHandle page) override {
    return host_.export_page(page_bytes, page);
  }
  [[nodiscard]] std::unique_ptr<ImportedPages> import_run(std::span<const ExportedPages> exported,
                                                          PageAccess access) override {
    return host_.import_run(exported, access);
  }

 private:
  class Mark final : public Event {
   public:
    Mark(const StreamDevice& device, Stream stream, std::uint64_t ticket)
        : done_(device.done_), stream_(stream), ticket_(ticket) {}
    [[nodiscard]] bool done() const override { return done_(stream_.handle, ticket_) != 0; }
    void wait(Deadline deadline) const override {
      while (!done()) {
        if (deadline.passed()) throw Error(ErrorCode::timeout, "the fake's stream is not done");
        std::this_thread::yield();
      }
    }

   private:
    int (*done_)(void*, std::uint64_t);
    Stream stream_;
    std::uint64_t ticket_;
  };

  HostDevice host_;
  void* library_;
  std::uint64_t (*record_)(void*) = nullptr;
  int (*done_)(void*, std::uint64_t) = nullptr;
  Stream stream_;
};

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
                                  std::shared_ptr<StreamDevice> device = nullptr,
                                  std::shared_ptr<DeviceTurn> turn = nullptr) {
  NcclComm::Place place;
  place.nccl = open_fake();
  place.issuer = issuer ? std::move(issuer) : make_issuer();
  if (!device) device = std::make_shared<StreamDevice>();
  place.stream = device->stream();
  place.device = std::move(device);
  place.turn = std::move(turn);
  return place;
}

}  // namespace pipelive::cuda::test
