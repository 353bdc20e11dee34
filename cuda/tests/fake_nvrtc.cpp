#include "fake_nvrtc.hpp"

#include <dlfcn.h>

#include <cstddef>
#include <cstring>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidInput = 3;
constexpr int kCompilationError = 6;
constexpr int kBuiltinOperationFailure = 7;
constexpr int kArchs[] = {80, 90, 100};

struct Program {
  std::string name;
  std::string source;
  std::map<std::string, std::string> headers;
  std::string log;
  std::string cubin;
  std::string ptx;
};

struct State {
  int major = 12;
  int minor = 9;
  std::string compiled;
  std::string failure;
  std::set<Program*> programs;
};
State& state() {
  static State instance;
  return instance;
}

/// Whether the library that the real one compiles with is open. Not looked for here: a package may
/// have left out where the loader should.
bool builtins_open() {
  const std::string name =
      "libnvrtc-builtins.so." + std::to_string(state().major) + "." + std::to_string(state().minor);
  void* const open = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (open != nullptr) dlclose(open);
  return open != nullptr;
}

/// The first header that is included and not there; empty where all are.
std::string missing_header(const Program& program, const std::string& text,
                           std::set<std::string>& seen) {
  std::istringstream lines(text);
  int depth = 0;  // of #if
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string directive;
    words >> directive;
    if (directive.starts_with("#if")) ++depth;
    if (directive == "#endif") --depth;
    if (directive != "#include" || depth > 0) continue;
    std::string name;
    words >> name;
    if (name.size() < 2) return line;
    name = name.substr(1, name.size() - 2);
    if (!seen.insert(name).second) continue;
    const auto found = program.headers.find(name);
    if (found == program.headers.end()) return name;
    if (std::string missing = missing_header(program, found->second, seen); !missing.empty()) {
      return missing;
    }
  }
  return "";
}

int give_bytes(const std::string& text, std::size_t* bytes) {
  *bytes = text.size();
  return kSuccess;
}
int give(const std::string& text, char* out) {
  std::memcpy(out, text.data(), text.size());
  return kSuccess;
}

}  // namespace

FAKE_EXPORT void fake_nvrtc_reset() {
  for (Program* program : state().programs) delete program;
  state() = State();
}
FAKE_EXPORT void fake_nvrtc_version(int major, int minor) {
  state().major = major;
  state().minor = minor;
}
FAKE_EXPORT const char* fake_nvrtc_compiled() {
  return state().compiled.c_str();
}
FAKE_EXPORT void fake_nvrtc_fail(const char* log) {
  state().failure = log;
}
FAKE_EXPORT int fake_nvrtc_held() {
  return static_cast<int>(state().programs.size());
}

FAKE_EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = state().major;
  *minor = state().minor;
  return kSuccess;
}
FAKE_EXPORT const char* nvrtcGetErrorString(int result) {
  if (result == kCompilationError) return "NVRTC_ERROR_COMPILATION";
  return result == kBuiltinOperationFailure ? "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE"
                                            : "NVRTC_ERROR_INVALID_INPUT";
}
FAKE_EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = static_cast<int>(std::size(kArchs));
  return kSuccess;
}
FAKE_EXPORT int nvrtcGetSupportedArchs(int* archs) {
  std::memcpy(archs, kArchs, sizeof kArchs);
  return kSuccess;
}
FAKE_EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char* name,
                                   int num_headers, const char* const* headers,
                                   const char* const* include_names) {
  if (source == nullptr || name == nullptr) return kInvalidInput;
  *program = new Program{name, source, {}, {}, {}, {}};
  for (int i = 0; i < num_headers; ++i) (*program)->headers[include_names[i]] = headers[i];
  state().programs.insert(*program);
  return kSuccess;
}
FAKE_EXPORT int nvrtcDestroyProgram(Program** program) {
  if (state().programs.erase(*program) == 0) return kInvalidInput;
  delete *program;
  *program = nullptr;
  return kSuccess;
}
FAKE_EXPORT int nvrtcCompileProgram(Program* program, int num_options, const char* const* options) {
  if (!builtins_open()) return kBuiltinOperationFailure;
  std::string call = program->name;
  for (int i = 0; i < num_options; ++i) call += std::string(" ") + options[i];
  state().compiled += call + '\n';
  std::set<std::string> seen;
  program->log = std::exchange(state().failure, "");
  if (const std::string missing = missing_header(*program, program->source, seen);
      !missing.empty()) {
    program->log = "cannot open source file \"" + missing + "\"";
  }
  if (!program->log.empty()) return kCompilationError;
  const bool virtual_arch = call.find("--gpu-architecture=compute_") != std::string::npos;
  (virtual_arch ? program->ptx : program->cubin) = call;
  return kSuccess;
}
FAKE_EXPORT int nvrtcGetProgramLogSize(Program* program, std::size_t* bytes) {
  return give_bytes(program->log, bytes);
}
FAKE_EXPORT int nvrtcGetProgramLog(Program* program, char* log) {
  return give(program->log, log);
}
FAKE_EXPORT int nvrtcGetCUBINSize(Program* program, std::size_t* bytes) {
  return give_bytes(program->cubin, bytes);
}
FAKE_EXPORT int nvrtcGetCUBIN(Program* program, char* image) {
  return give(program->cubin, image);
}
FAKE_EXPORT int nvrtcGetPTXSize(Program* program, std::size_t* bytes) {
  return give_bytes(program->ptx, bytes);
}
FAKE_EXPORT int nvrtcGetPTX(Program* program, char* image) {
  return give(program->ptx, image);
}
