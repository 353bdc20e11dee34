#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string_view>

#include "pipelive/cuda/fatbin.hpp"
#include "pipelive/cuda/nvrtc.hpp"

namespace pipelive::cuda {
namespace {

constexpr std::uint64_t kMagic = 0x31304e52454b5650;  // "PVKERN01"

struct Header {
  std::uint64_t magic;
  std::uint64_t bytes;
  std::uint64_t hash;
};

/// FNV-1a, from a start of one's own.
class Hash {
 public:
  explicit Hash(std::uint64_t start) : value_(start) {}
  void add(const void* data, std::size_t bytes) {
    const auto* const at = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < bytes; ++i) value_ = (value_ ^ at[i]) * 0x100000001b3;
  }
  /// With its length, so that no two lists of texts run together.
  void add(std::string_view text) {
    const std::uint64_t bytes = text.size();
    add(&bytes, sizeof bytes);
    add(text.data(), text.size());
  }
  [[nodiscard]] std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_;
};

constexpr std::uint64_t kStart = 0xcbf29ce484222325;

}  // namespace

std::string cache_key(const KernelFile& file, int capability, int compiler_major,
                      int compiler_minor) {
  std::string key;
  for (const std::uint64_t start : {kStart, ~kStart}) {
    Hash hash(start);
    for (const KernelSource& source : kernel_sources()) {
      if (source.name.ends_with(".cu") && source.name != file.name + ".cu") continue;
      hash.add(source.name);
      hash.add(source.text);
    }
    for (const std::string& macro : file.macros) hash.add(macro);
    hash.add(std::to_string(capability) + " " + std::to_string(compiler_major) + "." +
             std::to_string(compiler_minor));
    constexpr char kDigits[] = "0123456789abcdef";
    for (int shift = 60; shift >= 0; shift -= 4) key += kDigits[hash.value() >> shift & 15];
  }
  return file.name + "-" + key;
}

std::string KernelCache::default_folder() {
  // Only absolute paths count, as the XDG specification has it.
  const auto read = [](const char* name) {
    const char* const value = std::getenv(name);
    return value != nullptr && value[0] == '/' ? std::string(value) : std::string();
  };
  std::string base = read("XDG_CACHE_HOME");
  if (base.empty()) {
    base = read("HOME");
    if (base.empty()) return "";
    base += "/.cache";
  }
  return base + "/pipelive_kv/kernels";
}

std::vector<std::byte> KernelCache::find(const std::string& key) const {
  if (folder_.empty()) return {};
  const std::string path = folder_ + "/" + key;
  // The driver runs what it is given: no one else's file.
  struct stat status{};
  if (stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_uid != geteuid() ||
      (status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return {};
  }
  std::ifstream file(path, std::ios::binary);
  Header header{};
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header) || header.magic != kMagic ||
      header.bytes + sizeof header != static_cast<std::uint64_t>(status.st_size)) {
    return {};
  }
  std::vector<std::byte> image(header.bytes);
  if (!file.read(reinterpret_cast<char*>(image.data()),
                 static_cast<std::streamsize>(image.size()))) {
    return {};
  }
  Hash hash(kStart);
  hash.add(image.data(), image.size());
  if (hash.value() != header.hash) return {};
  return image;
}

void KernelCache::keep(const std::string& key, const std::vector<std::byte>& image) const noexcept {
  if (folder_.empty()) return;
  try {
    std::error_code error;
    std::filesystem::create_directories(folder_, error);
    if (error) return;
    Hash hash(kStart);
    hash.add(image.data(), image.size());
    const Header header{kMagic, image.size(), hash.value()};
    // Whole or not at all: written elsewhere, then renamed.
    std::string path = folder_ + "/" + key + ".XXXXXX";
    const int fd = mkstemp(path.data());
    if (fd < 0) return;
    const auto write_all = [fd](const void* data, std::size_t bytes) {
      const auto* at = static_cast<const char*>(data);
      while (bytes > 0) {
        const ssize_t done = write(fd, at, bytes);
        if (done <= 0) return false;
        at += done;
        bytes -= static_cast<std::size_t>(done);
      }
      return true;
    };
    const bool written = write_all(&header, sizeof header) && write_all(image.data(), image.size());
    const bool closed = close(fd) == 0;
    if (!written || !closed || rename(path.c_str(), (folder_ + "/" + key).c_str()) != 0) {
      unlink(path.c_str());
    }
  } catch (...) {
    // The next process compiles again.
  }
}

}  // namespace pipelive::cuda
