#include "pipelive/cuda/nvrtc.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <mutex>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/fatbin.hpp"

namespace pipelive::cuda {

using Program = struct ProgramOpaque*;  // nvrtcProgram

#define PIPELIVE_NVRTC_FUNCTIONS(X)                                                \
  X(version, nvrtcVersion, int, (int* major, int* minor))                          \
  X(error_string, nvrtcGetErrorString, const char*, (int result))                  \
  X(num_archs, nvrtcGetNumSupportedArchs, int, (int* count))                       \
  X(archs, nvrtcGetSupportedArchs, int, (int* archs))                              \
  X(create, nvrtcCreateProgram, int,                                               \
    (Program * program, const char* source, const char* name, int num_headers,     \
     const char* const* headers, const char* const* include_names))                \
  X(destroy, nvrtcDestroyProgram, int, (Program * program))                        \
  X(compile, nvrtcCompileProgram, int,                                             \
    (Program program, int num_options, const char* const* options))                \
  X(log_bytes, nvrtcGetProgramLogSize, int, (Program program, std::size_t* bytes)) \
  X(log, nvrtcGetProgramLog, int, (Program program, char* log))                    \
  X(cubin_bytes, nvrtcGetCUBINSize, int, (Program program, std::size_t* bytes))    \
  X(cubin, nvrtcGetCUBIN, int, (Program program, char* image))                     \
  X(ptx_bytes, nvrtcGetPTXSize, int, (Program program, std::size_t* bytes))        \
  X(ptx, nvrtcGetPTX, int, (Program program, char* image))

struct Nvrtc::Api {
#define PIPELIVE_NVRTC_MEMBER(member, symbol, type, parameters) type(*member) parameters = nullptr;
  PIPELIVE_NVRTC_FUNCTIONS(PIPELIVE_NVRTC_MEMBER)
#undef PIPELIVE_NVRTC_MEMBER
};

namespace {

/// Opens the library that NVRTC compiles with, of the folder that holds NVRTC itself. NVRTC opens
/// it by its bare name at the first compilation, and not every package tells the loader where it
/// lies; once it is open, that name is enough. Where it cannot be opened from there NVRTC looks for
/// it itself, and says so if it finds none.
void open_builtins(const void* symbol, int major, int minor) noexcept {
  Dl_info found{};
  if (dladdr(symbol, &found) == 0 || found.dli_fname == nullptr) return;
  const std::string_view file = found.dli_fname;
  const std::size_t folder = file.rfind('/');
  if (folder == std::string_view::npos) return;
  const std::string path = std::string(file.substr(0, folder + 1)) + "libnvrtc-builtins.so." +
                           std::to_string(major) + "." + std::to_string(minor);
  // Kept open on purpose: NVRTC holds on to it anyway, from its first compilation on.
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) == nullptr) dlerror();
}

/// The package that brings an NVRTC for a driver.
std::string package_for(int driver_major) {
  return driver_major < 13 ? "nvidia-cuda-nvrtc-cu12" : "nvidia-cuda-nvrtc";
}

}  // namespace

void Nvrtc::Closer::operator()(void* library) const noexcept {
  dlclose(library);
}

std::vector<std::string> Nvrtc::default_libraries() {
  return {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"};
}

std::shared_ptr<const Nvrtc> Nvrtc::open(const std::vector<std::string>& libraries,
                                         int newest_major) {
  std::string problems;
  const auto note = [&](const std::string& problem) {
    problems += (problems.empty() ? "" : "; ") + problem;
  };
  for (const std::string& library : libraries) {
    std::shared_ptr<Nvrtc> nvrtc(new Nvrtc());
    nvrtc->name_ = library;
    nvrtc->handle_.reset(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE));
    if (nvrtc->handle_ == nullptr) {
      const char* message = dlerror();
      note(message != nullptr ? message : library + " cannot be opened");
      continue;
    }
    auto api = std::make_shared<Api>();
    std::string missing;
#define PIPELIVE_NVRTC_LOAD(member, symbol, type, parameters)                               \
  api->member = reinterpret_cast<type(*) parameters>(dlsym(nvrtc->handle_.get(), #symbol)); \
  if (api->member == nullptr) missing = #symbol;
    PIPELIVE_NVRTC_FUNCTIONS(PIPELIVE_NVRTC_LOAD)
#undef PIPELIVE_NVRTC_LOAD
    if (!missing.empty()) {
      note(library + " lacks " + missing);
      continue;
    }
    nvrtc->api_ = std::move(api);
    if (nvrtc->api_->version(&nvrtc->major_, &nvrtc->minor_) != 0) {
      note(library + " does not tell its version");
      continue;
    }
    if (nvrtc->major_ > newest_major) {
      note(library + " is of CUDA " + std::to_string(nvrtc->major_) + ", the driver of CUDA " +
           std::to_string(newest_major));
      continue;
    }
    open_builtins(reinterpret_cast<const void*>(nvrtc->api_->version), nvrtc->major_,
                  nvrtc->minor_);
    return nvrtc;
  }
  throw Error(ErrorCode::device, "no NVRTC to compile CUDA kernels with (install " +
                                     package_for(newest_major) + "): " + problems);
}

void Nvrtc::check(int result, const char* call) const {
  if (result == 0) return;
  const char* text = api_->error_string(result);
  throw Error(ErrorCode::device, std::string(call) + " of " + name_ + ": " +
                                     (text != nullptr ? text : std::to_string(result)));
}

std::string Nvrtc::target_for(int capability) const {
  int count = 0;
  check(api_->num_archs(&count), "nvrtcGetNumSupportedArchs");
  std::vector<int> archs(static_cast<std::size_t>(std::max(count, 0)));
  if (count > 0) check(api_->archs(archs.data()), "nvrtcGetSupportedArchs");
  if (std::ranges::find(archs, capability) != archs.end()) {
    return "sm_" + std::to_string(capability);
  }
  int newest = 0;
  for (const int arch : archs) {
    if (arch < capability) newest = std::max(newest, arch);
  }
  if (newest == 0) {
    throw Error(ErrorCode::device, name_ + " compiles nothing for compute capability " +
                                       std::to_string(capability / 10) + "." +
                                       std::to_string(capability % 10));
  }
  return "compute_" + std::to_string(newest);
}

std::vector<std::byte> Nvrtc::compile(const KernelFile& file, int capability) const {
  const std::string main = file.name + ".cu";
  // The texts are not terminated where they lie.
  std::string source;
  Headers headers;
  for (const KernelSource& entry : kernel_sources()) {
    if (entry.name == main) source = entry.text;
    if (entry.name.ends_with(".cu")) continue;
    headers.emplace_back(entry.name, entry.text);
  }
  if (source.empty()) {
    throw Error(ErrorCode::device, "the CUDA source " + main + " is not in this build");
  }
  return compile_text(main, source, headers, file.macros, capability);
}

void Nvrtc::try_out(int capability) const {
  (void)compile_text("probe.cu", "extern \"C\" __global__ void pipelive_probe() {}\n", {}, {},
                     capability);
}

std::vector<std::byte> Nvrtc::compile_text(const std::string& main, const std::string& source,
                                           const Headers& headers,
                                           const std::vector<std::string>& macros,
                                           int capability) const {
  const std::string target = target_for(capability);
  std::vector<const char*> texts;
  std::vector<const char*> names;
  for (const auto& [name, text] : headers) {
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  std::vector<std::string> options{"--gpu-architecture=" + target, "--std=c++17",
                                   "--device-as-default-execution-space"};
  for (const std::string& macro : macros) options.push_back("--define-macro=" + macro);
  std::vector<const char*> option_texts;
  for (const std::string& option : options) option_texts.push_back(option.c_str());

  Program program = nullptr;
  check(api_->create(&program, source.c_str(), main.c_str(), static_cast<int>(headers.size()),
                     texts.data(), names.data()),
        "nvrtcCreateProgram");
  struct Destroy {
    const Api& api;
    Program program;
    ~Destroy() { api.destroy(&program); }
  } const destroy{*api_, program};

  if (const int result =
          api_->compile(program, static_cast<int>(option_texts.size()), option_texts.data())) {
    std::string log;
    std::size_t bytes = 0;
    if (api_->log_bytes(program, &bytes) == 0 && bytes > 0) {
      log.resize(bytes);
      if (api_->log(program, log.data()) != 0) log.clear();
    }
    const char* text = api_->error_string(result);
    throw Error(ErrorCode::device, "nvrtcCompileProgram(" + main + ", " + target + ") of " + name_ +
                                       ": " + (text != nullptr ? text : "") + "\n" + log);
  }
  const bool machine_code = target.starts_with("sm_");
  std::size_t bytes = 0;
  check(machine_code ? api_->cubin_bytes(program, &bytes) : api_->ptx_bytes(program, &bytes),
        "nvrtcGetCUBINSize");
  std::vector<std::byte> image(bytes);
  char* const out = reinterpret_cast<char*>(image.data());
  check(machine_code ? api_->cubin(program, out) : api_->ptx(program, out), "nvrtcGetCUBIN");
  if (image.empty()) throw Error(ErrorCode::device, name_ + " made nothing of " + main);
  return image;
}

bool runs_on(std::span<const std::string_view> archs, int capability) noexcept {
  return std::ranges::any_of(archs, [capability](std::string_view arch) {
    const bool machine_code = arch.starts_with("sm_");
    arch.remove_prefix(std::min(arch.size(), arch.find('_') + 1));
    int value = 0;
    const auto [end, error] = std::from_chars(arch.data(), arch.data() + arch.size(), value);
    // What is made for one device alone ("90a") is not asked for by anyone.
    if (error != std::errc{} || end != arch.data() + arch.size()) return false;
    return value <= capability && (!machine_code || value / 10 == capability / 10);
  });
}

namespace {

std::mutex libraries_mutex;

std::vector<std::string>& known_libraries() {
  static std::vector<std::string> libraries;
  return libraries;
}

int capability_of(const DeviceLimits& limits) {
  return limits.major * 10 + limits.minor;
}

/// The compiler for a device whose driver takes what it makes.
std::shared_ptr<const Nvrtc> open_for(const DeviceLimits& limits) {
  std::vector<std::string> libraries;
  {
    const std::lock_guard lock(libraries_mutex);
    libraries = known_libraries();
  }
  for (std::string& name : Nvrtc::default_libraries()) libraries.push_back(std::move(name));
  return Nvrtc::open(libraries, limits.driver_version / 1000);
}

}  // namespace

void set_nvrtc_libraries(std::vector<std::string> libraries) {
  const std::lock_guard lock(libraries_mutex);
  known_libraries() = std::move(libraries);
}

std::string why_not_carried(const DeviceLimits& limits) {
  if (fatbins().empty()) return "this build carries no kernels";
  int compiler = 0;
  const std::string_view version = fatbin_compiler();
  std::from_chars(version.data(), version.data() + version.size(), compiler);
  if (const int driver = limits.driver_version / 1000; compiler > driver) {
    return "this build's kernels need a driver of CUDA " + std::to_string(compiler) +
           ", this one is of CUDA " + std::to_string(driver);
  }
  if (!runs_on(fatbin_archs(), capability_of(limits))) {
    return "this build carries no kernels for compute capability " + std::to_string(limits.major) +
           "." + std::to_string(limits.minor);
  }
  return "";
}

std::vector<std::byte> kernel_image(const KernelFile& file, const DeviceLimits& limits) {
  const std::string reason = why_not_carried(limits);
  if (reason.empty()) {
    for (const Fatbin& entry : fatbins()) {
      if (entry.name == file.name) return {entry.bytes.begin(), entry.bytes.end()};
    }
    throw Error(ErrorCode::device, "there are no CUDA kernels '" + file.name + "'");
  }
  try {
    const auto nvrtc = open_for(limits);
    const int capability = capability_of(limits);
    const KernelCache cache(KernelCache::default_folder());
    const std::string key = cache_key(file, capability, nvrtc->major(), nvrtc->minor());
    std::vector<std::byte> image = cache.find(key);
    if (image.empty()) {
      image = nvrtc->compile(file, capability);
      cache.keep(key, image);
    }
    return image;
  } catch (const Error& error) {
    throw Error(error.code(), reason + ", and " + error.what());
  }
}

std::string kernel_problem(const DeviceLimits& limits) {
  const std::string reason = why_not_carried(limits);
  if (reason.empty()) return "";
  try {
    open_for(limits)->try_out(capability_of(limits));
    return "";
  } catch (const Error& error) {
    return reason + ", and " + error.what();
  }
}

}  // namespace pipelive::cuda
