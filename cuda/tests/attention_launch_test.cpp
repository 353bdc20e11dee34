// The launcher and the kernel loader against the fake driver, NVRTC where it is at hand.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "attention_cases.hpp"
#include "fake_driver.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/fatbin.hpp"
#include "pipelive/cuda/nvrtc.hpp"

namespace pipelive::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Call>
std::pair<ErrorCode, std::string> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "no error was raised";
  return {};
}

struct KernelRun {
  std::string name;
  unsigned grid;
  unsigned block;
  attention::Params params;
};
std::vector<KernelRun>& kernel_runs() {
  static std::vector<KernelRun> runs;
  return runs;
}

/// Stands in for a kernel: notes the launch, and runs the kernel's source.
void run_kernel(const char* name, unsigned grid, unsigned block, const void* parameter) {
  attention::Params params;
  std::memcpy(&params, parameter, sizeof params);
  kernel_runs().push_back({name, grid, block, params});
  const auto kernel = reinterpret_cast<void (*)(attention::Params)>(dlsym(RTLD_DEFAULT, name));
  ASSERT_NE(kernel, nullptr) << name;
  attention::emulator::Options options;
  options.grid = grid;
  options.shared_bytes = 227 << 10;
  EXPECT_EQ(attention::emulator::run(options, [&] { kernel(params); }), "");
}

class LaunchTest : public ::testing::Test {
 protected:
  LaunchTest() : library_(dlopen(PIPELIVE_FAKE_DRIVER, RTLD_NOW)) {
    symbol<FakeDriverReset>("fake_driver_reset")();
    kernel_runs().clear();
    for (const char* name : {"pipelive_attention_bf16_d64_r8", "pipelive_attention_finish_bf16"}) {
      symbol<FakeDriverKernel>("fake_driver_kernel")(name, sizeof(attention::Params), &run_kernel);
    }
    driver_ = Driver::open(PIPELIVE_FAKE_DRIVER);
    context_ = std::make_shared<const PrimaryContext>(driver_, 0);
    kernels_ = std::make_unique<Kernels>(
        context_, [this](const KernelFile& file, const DeviceLimits& limits) {
          files_.push_back(file.name);
          macros_.push_back(file.macros);
          EXPECT_EQ(limits.major, 9);
          return std::vector<std::byte>(16);
        });
  }
  ~LaunchTest() override {
    kernels_.reset();
    context_.reset();
    EXPECT_EQ(symbol<FakeDriverHeld>("fake_driver_held")(), 0);
    EXPECT_STREQ(symbol<FakeDriverMistakes>("fake_driver_mistakes")(), "");
    dlclose(library_);
  }

  template <typename Function>
  Function* symbol(const char* name) {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  std::uint64_t count(const char* call) {
    return symbol<FakeDriverCount>("fake_driver_count")(call);
  }

  void* library_;
  std::shared_ptr<const Driver> driver_;
  std::shared_ptr<const PrimaryContext> context_;
  std::unique_ptr<Kernels> kernels_;
  std::vector<std::string> files_;
  std::vector<std::vector<std::string>> macros_;
};

Problem long_problem() {
  Problem p;
  p.seq_lens = {1100, 20};
  p.query_lens = {1, 1};
  p.one_token_each = true;
  return p;
}

TEST_F(LaunchTest, TheWholePathGivesTheResult) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "threads on stacks of our own, which sanitizers do not know";
#endif
  Batch batch(long_problem());
  batch.reference();
  const AttentionLaunch launch = plan_attention(batch.args(), kernels_->limits());
  ASSERT_GT(launch.workspace_bytes, 0U);
  ASSERT_GT(launch.params.runs, 1);
  std::vector<float> workspace(launch.workspace_bytes / 4 + 4, NAN);
  auto* const memory = reinterpret_cast<std::byte*>(
      (reinterpret_cast<std::uintptr_t>(workspace.data()) + 15) / 16 * 16);
  for (int i = 0; i < 3; ++i) {
    paged_attention(*kernels_, batch.args(), memory, launch.workspace_bytes,
                    reinterpret_cast<StreamHandle>(kLegacyStream));
  }
  EXPECT_LT(batch.error(), 1e-2);
  // Two launches each; modules are loaded once, and only what is needed is compiled.
  ASSERT_EQ(kernel_runs().size(), 6U);
  EXPECT_EQ(kernel_runs()[0].name, "pipelive_attention_bf16_d64_r8");
  EXPECT_EQ(kernel_runs()[0].block, 128U);
  EXPECT_EQ(kernel_runs()[0].grid, launch.grid);
  EXPECT_EQ(kernel_runs()[1].name, "pipelive_attention_finish_bf16");
  EXPECT_THAT(files_, ElementsAre("attention_finish", "attention_bf16"));
  EXPECT_THAT(macros_[1], ElementsAre("PIPELIVE_HEAD_DIM=64"));
  EXPECT_EQ(count("cuModuleLoadData"), 2U);
  EXPECT_EQ(count("cuFuncSetAttribute"), 2U);
  EXPECT_EQ(count("cuMemAlloc"), 0U);
  EXPECT_EQ(count("cuStreamSynchronize") + count("cuCtxSynchronize"), 0U);
  // The workspace is laid out to its end.
  const attention::Params& p = kernel_runs()[0].params;
  const std::size_t rows = 2 * 4;
  const std::size_t splits = launch.workspace_bytes / 4 / rows / 66;
  EXPECT_EQ(splits, 3U);
  EXPECT_EQ(p.partial_stats, p.partial + splits * rows * 64);
}

TEST_F(LaunchTest, AWorkspaceThatIsTooSmallIsRefused) {
  Batch batch(long_problem());
  const std::size_t bytes = plan_attention(batch.args(), kernels_->limits()).workspace_bytes;
  alignas(16) std::byte memory[32];
  const auto attend = [&](std::byte* workspace, std::size_t size) {
    return error_of([&] { paged_attention(*kernels_, batch.args(), workspace, size, nullptr); });
  };
  EXPECT_THAT(attend(memory, bytes - 1).second,
              HasSubstr("workspace is " + std::to_string(bytes - 1) + " bytes"));
  EXPECT_THAT(attend(nullptr, bytes).second, HasSubstr("workspace is 0 bytes"));
  EXPECT_THAT(attend(memory + 4, bytes).second, HasSubstr("aligned"));
  EXPECT_EQ(attend(memory + 4, bytes).first, ErrorCode::invalid_argument);
  EXPECT_TRUE(kernel_runs().empty());
}

TEST_F(LaunchTest, AKernelThatIsMissingIsNamedAndNothingIsLaunched) {
  Problem p = long_problem();
  p.head_dim = 128;
  p.seq_lens = {30, 20};
  Batch batch(p);
  const auto [code, message] =
      error_of([&] { paged_attention(*kernels_, batch.args(), nullptr, 0, nullptr); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("pipelive_attention_bf16_d128_r8"));
  EXPECT_TRUE(kernel_runs().empty());
}

TEST_F(LaunchTest, FailuresOfTheDriverAreReported) {
  Problem p = long_problem();
  p.seq_lens = {30, 20};
  Batch batch(p);
  for (const char* call : {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute",
                           "cuLaunchKernel", "cuCtxPushCurrent"}) {
    kernels_ = std::make_unique<Kernels>(context_, [](const KernelFile&, const DeviceLimits&) {
      return std::vector<std::byte>(16);
    });
    symbol<FakeDriverFail>("fake_driver_fail")(call, kInvalidValue);
    const auto [code, message] =
        error_of([&] { paged_attention(*kernels_, batch.args(), nullptr, 0, nullptr); });
    EXPECT_EQ(code, ErrorCode::device) << call;
    EXPECT_THAT(message, HasSubstr(call));
  }
}

TEST(PlanAttentionTest, NothingDependsOnLengths) {
  Batch batch(long_problem());
  const DeviceLimits limits = batch.problem.limits;
  const AttentionLaunch before = plan_attention(batch.args(), limits);
  batch.lens = {3, 0};
  batch.args().seq_lens = batch.lens.data();
  const AttentionLaunch after = plan_attention(batch.args(), limits);
  EXPECT_EQ(before.grid, after.grid);
  EXPECT_EQ(before.workspace_bytes, after.workspace_bytes);
  // Not even that they can be read.
  batch.args().seq_lens = reinterpret_cast<const std::int32_t*>(16);
  batch.args().block_tables = reinterpret_cast<const std::int32_t*>(16);
  EXPECT_EQ(plan_attention(batch.args(), limits).grid, before.grid);
}

TEST(PlanAttentionTest, KernelsFollowFromShapes) {
  struct Case {
    DType dtype;
    DType query;
    int head_dim;
    int q_heads;
    std::string kernel;
  };
  for (const Case& c : std::vector<Case>{
           {DType::bfloat16, DType::bfloat16, 8, 16, "pipelive_attention_bf16_d64_r8"},
           {DType::bfloat16, DType::bfloat16, 128, 18, "pipelive_attention_bf16_d128_r32"},
           {DType::float16, DType::float16, 136, 64, "pipelive_attention_f16_d192_r16"},
           {DType::float16, DType::float16, 256, 2, "pipelive_attention_f16_d256_r8"},
           {DType::float16, DType::float32, 72, 64, "pipelive_attention_f32_f16_d128_r8"},
           {DType::float32, DType::float32, 80, 2, "pipelive_attention_f32_f32_d128_r8"}}) {
    Problem p;
    p.dtype = c.dtype;
    p.query_dtype = c.query;
    p.head_dim = c.head_dim;
    p.q_heads = c.q_heads;
    const Batch batch(p);
    const AttentionLaunch launch = plan_attention(batch.args(), p.limits);
    EXPECT_EQ(launch.kernel, c.kernel);
    EXPECT_NE(dlsym(RTLD_DEFAULT, launch.kernel.c_str()), nullptr);
    EXPECT_NE(dlsym(RTLD_DEFAULT, launch.finish_kernel.c_str()), nullptr);
    EXPECT_LE(launch.shared_bytes, 232448U);
  }
}

TEST(PlanAttentionTest, EveryDeviceSinceAmpereHoldsEveryKernel) {
  // The shared memory of a block and of a multiprocessor, for 8.0, 8.6, 9.0 and 12.0.
  for (const auto& [block, all] : std::vector<std::pair<int, int>>{
           {166912, 167936}, {101376, 102400}, {232448, 233472}, {101376, 102400}}) {
    for (const DType dtype : {DType::float32, DType::float16}) {
      for (const int dim : {64, 80, 96, 128, 192, 256}) {
        for (const int heads : {2, 64}) {
          Problem p;
          p.dtype = dtype;
          p.head_dim = dim;
          p.q_heads = heads;
          p.limits.shared_bytes_per_block = block;
          p.limits.shared_bytes_per_multiprocessor = all;
          const Batch batch(p);
          const AttentionLaunch launch = plan_attention(batch.args(), p.limits);
          EXPECT_LE(launch.shared_bytes, static_cast<unsigned>(block));
          EXPECT_GE(launch.params.stages, 1);
        }
      }
    }
  }
  Problem p;
  p.limits.shared_bytes_per_block = 16 << 10;
  p.limits.shared_bytes_per_multiprocessor = 16 << 10;
  const Batch batch(p);
  EXPECT_THAT(error_of([&] { (void)plan_attention(batch.args(), p.limits); }).second,
              HasSubstr("shared memory"));
}

TEST(PlanAttentionTest, RowsOfKVMustBeAligned) {
  Problem p;
  p.head_dim = 8;
  Batch batch(p);
  const auto message = [&] {
    return error_of([&] { (void)plan_attention(batch.args(), p.limits); }).second;
  };
  batch.args().kv.token_stride = 12;
  EXPECT_THAT(message(), HasSubstr("kv: token stride is 12, expected a multiple of 8 elements"));
  batch.args().kv.token_stride = 8;
  batch.args().kv.base += 8;
  EXPECT_THAT(message(), HasSubstr("kv is memory that is not aligned to 16 bytes"));
  batch.args().kv.base -= 8;
  batch.args().query.heads = 3;
  EXPECT_THAT(message(), HasSubstr("query: number of heads"));
}

TEST(PlanAttentionTest, LargeBatchesKeepTheirSplitsToThemselves) {
  Problem p;
  p.seq_lens = std::vector<int>(3, 3000);
  p.query_lens = {700, 1, 1};
  p.kv_heads = 1;
  p.q_heads = 64;
  const Batch batch(p);
  AttentionArgs args = batch.args();
  args.query.tokens = 1 << 20;
  // Only planned, so nothing is read there; where the batch's own memory lies is chance.
  args.query.data = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 46U);
  args.out = args.query;
  const AttentionLaunch launch = plan_attention(args, p.limits);
  EXPECT_EQ(launch.params.runs, 1);
  EXPECT_EQ(launch.workspace_bytes, 0U);
}

TEST(NvrtcTest, WhichCodeRunsWhere) {
  const std::vector<std::string_view> archs{"sm_80", "sm_90", "compute_90", "sm_100a"};
  EXPECT_TRUE(runs_on(archs, 80));
  EXPECT_TRUE(runs_on(archs, 89));
  EXPECT_TRUE(runs_on(archs, 90));
  EXPECT_TRUE(runs_on(archs, 120));  // by PTX
  EXPECT_FALSE(runs_on(archs, 75));
  const std::vector<std::string_view> one{"sm_90"};
  EXPECT_FALSE(runs_on(one, 100));
  EXPECT_FALSE(runs_on(one, 89));
}

TEST(NvrtcTest, WhatIsMissingIsNamed) {
  const auto [code, message] =
      error_of([] { (void)Nvrtc::open({"libnot_there.so.7", PIPELIVE_FAKE_DRIVER}, 12080); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("libnot_there.so.7"));
  EXPECT_THAT(message, HasSubstr("lacks nvrtc"));
  EXPECT_THAT(message, HasSubstr("nvidia-cuda-nvrtc-cu12"));
}

TEST(NvrtcTest, KeysDependOnEverything) {
  const KernelFile file{"attention_f16", {"PIPELIVE_HEAD_DIM=64"}};
  const std::string key = cache_key(file, 90, 12, 9);
  EXPECT_EQ(key, cache_key(file, 90, 12, 9));
  EXPECT_NE(key, cache_key(file, 80, 12, 9));
  EXPECT_NE(key, cache_key(file, 90, 12, 8));
  EXPECT_NE(key, cache_key({"attention_f16", {"PIPELIVE_HEAD_DIM=128"}}, 90, 12, 9));
  EXPECT_NE(key, cache_key({"attention_bf16", {"PIPELIVE_HEAD_DIM=64"}}, 90, 12, 9));
  EXPECT_EQ(key.find('/'), std::string::npos);
}

TEST(NvrtcTest, TheCacheKeepsWholeFilesOnly) {
  std::string folder = "/tmp/pipelive_cache_XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  const KernelCache cache(folder + "/a/b");
  const std::vector<std::byte> image(1000, std::byte{7});
  EXPECT_TRUE(cache.find("key").empty());
  cache.keep("key", image);
  EXPECT_EQ(cache.find("key"), image);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder + "/a/b"), {}), 1);
  const std::string path = folder + "/a/b/key";
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(500);
    file.put(8);
  }
  EXPECT_TRUE(cache.find("key").empty());
  cache.keep("key", image);
  EXPECT_EQ(cache.find("key"), image);
  std::filesystem::resize_file(path, 900);
  EXPECT_TRUE(cache.find("key").empty());
  cache.keep("key", image);
  std::filesystem::permissions(path, std::filesystem::perms::others_write,
                               std::filesystem::perm_options::add);
  EXPECT_TRUE(cache.find("key").empty());
  // Nowhere to write to is no error.
  KernelCache("/proc/nowhere").keep("key", image);
  KernelCache("").keep("key", image);
  EXPECT_TRUE(KernelCache("").find("key").empty());
  std::filesystem::remove_all(folder);
}

// With a real NVRTC, wherever one is found; PIPELIVE_NVRTC names one for this test.
TEST(NvrtcTest, CompilesEveryKernelFileWithoutAnyHeader) {
  std::vector<std::string> libraries = Nvrtc::default_libraries();
  if (const char* path = std::getenv("PIPELIVE_NVRTC")) libraries.insert(libraries.begin(), path);
  std::shared_ptr<const Nvrtc> nvrtc;
  try {
    nvrtc = Nvrtc::open(libraries, 99000);
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  for (const KernelSource& source : kernel_sources()) {
    if (!source.name.ends_with(".cu")) continue;
    KernelFile file{std::string(source.name.substr(0, source.name.size() - 3)), {}};
    if (file.name.starts_with("attention")) file.macros = {"PIPELIVE_HEAD_DIM=64"};
    for (const int capability : {80, 90, 100}) {
      SCOPED_TRACE(file.name + " for " + std::to_string(capability));
      const std::vector<std::byte> image = nvrtc->compile(file, capability);
      ASSERT_GT(image.size(), 4U);
      EXPECT_EQ(std::memcmp(image.data(),
                            "\x7f"
                            "ELF",
                            4),
                0);
    }
  }
  // A device that the compiler does not know yet gets PTX.
  const std::vector<std::byte> ptx = nvrtc->compile({"scale", {}}, 999);
  EXPECT_THAT(std::string(reinterpret_cast<const char*>(ptx.data()), ptx.size()),
              HasSubstr(".target sm_"));
  EXPECT_THAT(error_of([&] { (void)nvrtc->compile({"no_such_file", {}}, 90); }).second,
              HasSubstr("no_such_file.cu"));
  EXPECT_THAT(error_of([&] { (void)nvrtc->compile({"scale", {"float=oops"}}, 90); }).second,
              HasSubstr("error"));
}

}  // namespace
}  // namespace pipelive::cuda
