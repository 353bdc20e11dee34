// Where the slot kernels' code comes from: the fatbins of this build, or NVRTC. Nothing here
// depends on whether nvcc made fatbins.
#include <gmock/gmock.h>

#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <optional>

#include "fake_nvrtc.hpp"
#include "pipelive/cuda/fatbin.hpp"
#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/slot_copier.hpp"
#include "pipelive/transport/checksum.hpp"
#include "slots_fixture.hpp"

namespace pipelive::cuda {
namespace {

using ::testing::HasSubstr;

/// $XDG_CACHE_HOME is an empty folder while it lives.
class EmptyCache {
 public:
  EmptyCache() {
    if (const char* const value = std::getenv("XDG_CACHE_HOME")) before_ = value;
    if (mkdtemp(folder_.data()) == nullptr) ADD_FAILURE() << "no folder " << folder_;
    setenv("XDG_CACHE_HOME", folder_.c_str(), 1);
  }
  ~EmptyCache() {
    if (before_) {
      setenv("XDG_CACHE_HOME", before_->c_str(), 1);
    } else {
      unsetenv("XDG_CACHE_HOME");
    }
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  EmptyCache(const EmptyCache&) = delete;
  EmptyCache& operator=(const EmptyCache&) = delete;

 private:
  std::optional<std::string> before_;
  std::string folder_ = "/tmp/pipelive_images_XXXXXX";
};

constexpr auto kMajor = static_cast<int>(DeviceAttribute::compute_capability_major);
constexpr auto kMinor = static_cast<int>(DeviceAttribute::compute_capability_minor);

class SlotImages : public test::SlotDriverTest {
 protected:
  SlotImages() : nvrtc_(dlopen(PIPELIVE_FAKE_NVRTC, RTLD_NOW)) {
    if (nvrtc_ == nullptr) {
      ADD_FAILURE() << dlerror();
      return;
    }
    nvrtc<FakeNvrtcReset>("fake_nvrtc_reset")();
    set_nvrtc_libraries({PIPELIVE_FAKE_NVRTC});
  }
  ~SlotImages() override {
    set_nvrtc_libraries({});
    forget();
    if (nvrtc_ == nullptr) return;
    EXPECT_EQ(nvrtc<FakeNvrtcHeld>("fake_nvrtc_held")(), 0);
    dlclose(nvrtc_);
  }

  template <typename Function>
  Function* nvrtc(const char* name) {
    return reinterpret_cast<Function*>(dlsym(nvrtc_, name));
  }
  std::string compiled() { return nvrtc<FakeNvrtcCompiled>("fake_nvrtc_compiled")(); }

  static void forget() {
    CudaSlotCopier::forget();
    SlotKernels::forget();
    Kernels::forget();
  }
  /// A driver and a device of other versions, from here on.
  void become(int driver_version, int major, int minor) {
    forget();
    call<FakeDriverVersion>("fake_driver_version")(driver_version);
    call<FakeDriverAttribute>("fake_driver_attribute")(kMajor, major);
    call<FakeDriverAttribute>("fake_driver_attribute")(kMinor, minor);
    context = std::make_shared<const PrimaryContext>(Driver::open(PIPELIVE_FAKE_DRIVER), 0);
  }
  /// One that the stand-in compiles for, and of a driver that every nvcc is too new for.
  void become_old_driver() {
    become(1000, 9, 0);
    nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 0);
  }

  const EmptyCache cache_;

 private:
  void* nvrtc_;
};

TEST_F(SlotImages, ADriverOlderThanTheFatbinsGetsWhatNvrtcCompiles) {
  become_old_driver();
  CudaSlotCopier copier(context);
  EXPECT_EQ(compiled(),
            "slots_copy.cu --gpu-architecture=sm_90 --std=c++17 "
            "--device-as-default-execution-space\n"
            "slots_append.cu --gpu-architecture=sm_90 --std=c++17 "
            "--device-as-default-execution-space\n"
            "slots_marks.cu --gpu-architecture=sm_90 --std=c++17 "
            "--device-as-default-execution-space\n");
  std::vector<unsigned char> bytes(10'000);
  std::iota(bytes.begin(), bytes.end(), static_cast<unsigned char>(3));
  EXPECT_EQ(
      copier.crc(reinterpret_cast<DevicePointer>(bytes.data()), bytes.size(), 0, test::soon()),
      crc32c(std::as_bytes(std::span(bytes))));
}

TEST_F(SlotImages, WhatWasCompiledIsKeptForEachDevice) {
  become_old_driver();
  (void)SlotKernels::of(context);
  const std::string first = compiled();
  become_old_driver();
  (void)SlotKernels::of(context);
  EXPECT_EQ(compiled(), first);  // from the disk
  become(1000, 8, 0);
  (void)SlotKernels::of(context);
  EXPECT_THAT(compiled().substr(first.size()),
              HasSubstr("slots_marks.cu --gpu-architecture=sm_80"));
}

TEST_F(SlotImages, ADeviceThatNvrtcDoesNotKnowGetsPtx) {
  become(1000, 12, 0);
  nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 0);
  (void)SlotKernels::of(context);
  EXPECT_THAT(compiled(), HasSubstr("slots_copy.cu --gpu-architecture=compute_100"));
}

TEST_F(SlotImages, WithoutNvrtcTheErrorSaysWhatWouldHelp) {
  become(1000, 9, 0);  // every NVRTC that a machine may have is too new for this driver
  const int held_before = held();
  for (int attempt = 0; attempt < 2; ++attempt) {
    const auto [code, message] = error_of([&] { (void)SlotKernels::of(context); });
    EXPECT_EQ(code, ErrorCode::device);
    EXPECT_THAT(message, HasSubstr(fatbins().empty() ? "this build carries no kernels"
                                                     : "this one is of CUDA 1"));
    EXPECT_THAT(message, HasSubstr("is of CUDA 12, the driver of CUDA 1"));
    EXPECT_THAT(message, HasSubstr("nvidia-cuda-nvrtc-cu12"));
  }
  EXPECT_EQ(compiled(), "");
  EXPECT_EQ(held(), held_before);
  nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 0);
  EXPECT_NE(SlotKernels::of(context), nullptr);  // nothing of the failure stays
}

TEST_F(SlotImages, TheHintNamesThePackageOfTheDriversCuda) {
  for (const auto& [driver, package] :
       {std::pair{12, "(install nvidia-cuda-nvrtc-cu12)"}, {13, "(install nvidia-cuda-nvrtc)"}}) {
    EXPECT_THAT(error_of([&] { (void)Nvrtc::open({"libnot_there.so.7"}, driver); }).second,
                HasSubstr(package));
  }
}

// One that lies beside NVRTC is opened with it; of this version there is none.
TEST_F(SlotImages, TheLibraryThatNvrtcCompilesWithIsMissedBeforeItIsNeeded) {
  DeviceLimits limits;
  limits.major = 9;
  limits.driver_version = 1010;
  nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 0);
  EXPECT_EQ(kernel_problem(limits), "");
  EXPECT_THAT(compiled(), HasSubstr("probe.cu --gpu-architecture=sm_90"));
  nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 1);
  EXPECT_THAT(kernel_problem(limits), HasSubstr("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE"));
}

TEST_F(SlotImages, WhatTheCompilerSaysIsToldAndTheNextAttemptMayWork) {
  become_old_driver();
  (void)SlotKernels::of(context);  // so that only one file is compiled below
  const std::string before = compiled();
  become(1000, 8, 0);
  nvrtc<FakeNvrtcFail>("fake_nvrtc_fail")("slots_copy.cu(7): error: oops");
  const auto [code, message] = error_of([&] { (void)SlotKernels::of(context); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("slots_copy.cu(7): error: oops"));
  EXPECT_THAT(message, HasSubstr("sm_80"));
  EXPECT_NE(SlotKernels::of(context), nullptr);
}

TEST_F(SlotImages, SlotsAndAttentionAreDecidedAlike) {
  const KernelFile slots{"slots_copy", {}};
  const KernelFile attention{"attention_finish", {}};
  int carried = 0;
  for (const int driver : {1, 12, 13, 14, 99}) {
    for (const auto& [major, minor] : {std::pair{7, 5}, {8, 0}, {8, 9}, {9, 0}, {10, 0}, {12, 1}}) {
      SCOPED_TRACE("driver " + std::to_string(driver) + ", capability " + std::to_string(major) +
                   "." + std::to_string(minor));
      nvrtc<FakeNvrtcReset>("fake_nvrtc_reset")();
      nvrtc<FakeNvrtcVersion>("fake_nvrtc_version")(1, 0);
      const EmptyCache fresh;
      DeviceLimits limits;
      limits.major = major;
      limits.minor = minor;
      limits.driver_version = driver * 1000;
      const bool suits = why_not_carried(limits).empty();
      carried += suits ? 1 : 0;
      for (const KernelFile& file : {slots, attention}) {
        if (!suits && major == 7) {
          EXPECT_THAT(error_of([&] { (void)kernel_image(file, limits); }).second,
                      HasSubstr("compiles nothing for compute capability 7.5"));
          continue;
        }
        EXPECT_FALSE(kernel_image(file, limits).empty());
        EXPECT_EQ(compiled().find(file.name) == std::string::npos, suits);
      }
    }
  }
  EXPECT_EQ(carried > 0, !fatbins().empty());
}

TEST_F(SlotImages, FatbinsThatSuitAreTakenAsTheyAre) {
  if (fatbins().empty()) GTEST_SKIP() << "this build carries no kernels";
  int compiler = 0;
  const std::string_view version = fatbin_compiler();
  std::from_chars(version.data(), version.data() + version.size(), compiler);
  become(compiler * 1000, 9, 0);
  (void)SlotKernels::of(context);
  EXPECT_EQ(compiled(), "");
  become((compiler - 1) * 1000 + 990, 9, 0);  // the newest driver that is too old
  (void)SlotKernels::of(context);
  EXPECT_THAT(compiled(), HasSubstr("slots_copy.cu"));
}

TEST_F(SlotImages, ADeviceLoadsItsKernelsOnce) {
  become_old_driver();
  const std::uint64_t before = count("cuModuleLoadData");
  const auto first = SlotKernels::of(context);
  const auto other = std::make_shared<const PrimaryContext>(Driver::open(PIPELIVE_FAKE_DRIVER), 0);
  EXPECT_EQ(SlotKernels::of(other), first);
  EXPECT_EQ(Kernels::of(other), Kernels::of(context));
  EXPECT_EQ(count("cuModuleLoadData") - before, 3);
}

TEST_F(SlotImages, LentCopiersAreUsedAgain) {
  become_old_driver();
  auto first_lent = CudaSlotCopier::lend(context);
  const CudaSlotCopier* const address = first_lent.get();
  const auto second_lent = CudaSlotCopier::lend(context);
  EXPECT_NE(second_lent.get(), address);
  first_lent.reset();
  const std::uint64_t allocated = count("cuMemAlloc");
  const auto again = CudaSlotCopier::lend(context);
  EXPECT_EQ(again.get(), address);
  EXPECT_EQ(count("cuMemAlloc"), allocated);
  forget();  // those that are lent end on their own
}

// Stands in for a compiler: what the stand-in checks of headers must hold for every file.
TEST_F(SlotImages, EverySourceOfThisBuildIsWhole) {
  const auto library = Nvrtc::open({PIPELIVE_FAKE_NVRTC}, 12);
  int files = 0;
  for (const KernelSource& source : kernel_sources()) {
    if (!source.name.ends_with(".cu")) continue;
    ++files;
    const KernelFile file{std::string(source.name.substr(0, source.name.size() - 3)), {}};
    EXPECT_FALSE(library->compile(file, 90).empty()) << source.name;
  }
  EXPECT_GE(files, 8);
}

}  // namespace
}  // namespace pipelive::cuda
