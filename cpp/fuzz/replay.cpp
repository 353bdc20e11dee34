// Stands in for libFuzzer: runs a target over files, and over all files of a folder.
#include <algorithm>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz_tools.hpp"

namespace {

std::vector<std::filesystem::path> files_of(int count, char** names) {
  std::vector<std::filesystem::path> files;
  for (int i = 1; i < count; ++i) {
    if (!std::filesystem::is_directory(names[i])) {
      files.emplace_back(names[i]);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(names[i])) {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

int replay(int count, char** names) {
  const std::vector<std::filesystem::path> files = files_of(count, names);
  for (const std::filesystem::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    // Exactly as long as the input, so that a sanitizer sees what is read behind it.
    const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
    if (!file.is_open()) {
      std::fprintf(stderr, "cannot read %s\n", path.c_str());
      return 1;
    }
    std::printf("%s (%zu bytes)\n", path.c_str(), text.size());
    std::fflush(stdout);
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  }
  std::printf("%zu inputs\n", files.size());
  return files.empty() ? 1 : 0;
}

}  // namespace

int main(int count, char** names) {
  try {
    return replay(count, names);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
