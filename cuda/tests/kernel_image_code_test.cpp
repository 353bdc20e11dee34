// What nvcc made of the kernels, as far as it must not get worse unseen: read with the toolkit's
// cuobjdump, where there is one ($PIPELIVE_CUOBJDUMP, beside nvcc, or in $PATH).
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "pipelive/cuda/fatbin.hpp"

namespace pipelive::cuda {
namespace {

namespace fs = std::filesystem;

std::string find_cuobjdump() {
  std::vector<fs::path> places;
  if (const char* const named = std::getenv("PIPELIVE_CUOBJDUMP")) places.emplace_back(named);
  places.push_back(fs::path(PIPELIVE_NVCC_PATH).parent_path() / "cuobjdump");
  std::error_code ignored;
  places.push_back(fs::canonical(PIPELIVE_NVCC_PATH, ignored).parent_path() / "cuobjdump");
  std::istringstream path(std::getenv("PATH") == nullptr ? "" : std::getenv("PATH"));
  for (std::string folder; std::getline(path, folder, ':');) {
    places.push_back(fs::path(folder) / "cuobjdump");
  }
  for (const fs::path& place : places) {
    if (access(place.c_str(), X_OK) == 0 && !fs::is_directory(place, ignored)) return place;
  }
  return "";
}

class KernelCode : public ::testing::Test {
 protected:
  void SetUp() override {
    if (fatbins().empty()) GTEST_SKIP() << "this build carries no kernels";
    tool_ = find_cuobjdump();
    if (tool_.empty()) GTEST_SKIP() << "there is no cuobjdump beside nvcc, nor in PATH";
    ASSERT_NE(mkdtemp(folder_.data()), nullptr);
  }
  ~KernelCode() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  /// What the tool says of all of a file's machine code.
  std::vector<std::string> lines(const Fatbin& fatbin, const std::string& option) {
    const fs::path file = fs::path(folder_) / (std::string(fatbin.name) + ".fatbin");
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(fatbin.bytes.data()),
               static_cast<std::streamsize>(fatbin.bytes.size()));
    const std::string command = "'" + tool_ + "' " + option + " '" + file.string() + "' 2>&1";
    std::vector<std::string> result;
    FILE* const pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) {
      ADD_FAILURE() << command;
      return result;
    }
    std::array<char, 4096> line{};
    while (std::fgets(line.data(), line.size(), pipe) != nullptr) result.emplace_back(line.data());
    pclose(pipe);
    return result;
  }

  /// The instructions of every kernel of a file for sm_90, by name; none where nvdisasm, which does
  /// this for cuobjdump, is missing or where the file holds nothing for sm_90.
  std::map<std::string, std::vector<std::string>> code(const std::string& name) {
    static const std::regex function(R"(Function : (\S+))");
    static const std::regex instruction(R"(/\*[0-9a-f]{4,}\*/\s+(.*?);)");
    std::map<std::string, std::vector<std::string>> result;
    for (const Fatbin& fatbin : fatbins()) {
      if (fatbin.name != name) continue;
      std::vector<std::string>* current = nullptr;
      for (const std::string& line : lines(fatbin, "-arch sm_90 -sass")) {
        std::smatch found;
        if (std::regex_search(line, found, function)) {
          current = &result[found[1]];
        } else if (current != nullptr && std::regex_search(line, found, instruction)) {
          current->push_back(found[1]);
        }
      }
    }
    return result;
  }

 private:
  std::string tool_;
  std::string folder_ = "/tmp/pipelive_code_XXXXXX";
};

bool has(const std::string& instruction, const char* what) {
  return instruction.find(what) != std::string::npos;
}

TEST_F(KernelCode, NoKernelKeepsRegistersInMemory) {
  static const std::regex usage(R"(REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+))");
  int kernels = 0;
  for (const Fatbin& fatbin : fatbins()) {
    std::string name;
    for (const std::string& line : lines(fatbin, "-res-usage")) {
      std::smatch found;
      if (line.find(" Function ") != std::string::npos) name = line;
      if (!std::regex_search(line, found, usage)) continue;
      ++kernels;
      EXPECT_EQ(found[1], "0") << name << line;
      EXPECT_EQ(found[2], "0") << name << line;
    }
  }
  EXPECT_GT(kernels, 50);
}

TEST_F(KernelCode, EightRowsOfQueriesAreMultipliedWithoutPredicates) {
  for (const char* const file : {"attention_bf16", "attention_f16"}) {
    const auto kernels = code(file);
    if (kernels.empty()) GTEST_SKIP() << "no code for sm_90, or no nvdisasm beside cuobjdump";
    int seen = 0;
    for (const auto& [name, instructions] : kernels) {
      if (!name.ends_with("_r8")) continue;
      ++seen;
      int products = 0;
      for (const std::string& each : instructions) {
        if (!has(each, "HMMA")) continue;
        ++products;
        EXPECT_FALSE(each.starts_with('@')) << name << ": " << each;
      }
      EXPECT_GT(products, 0) << name;
    }
    EXPECT_EQ(seen, 6);
  }
}

TEST_F(KernelCode, GatherAndScatterLoadFourVectorsBeforeTheyStoreOne) {
  const auto kernels = code("slots_copy");
  if (kernels.empty()) GTEST_SKIP() << "no code for sm_90, or no nvdisasm beside cuobjdump";
  for (const char* const name : {"pipelive_gather_16", "pipelive_scatter_16"}) {
    const std::vector<std::string>& instructions = kernels.at(name);
    // Straight code that ends with the first store; what it loads is payload, since addresses are
    // not 128 bits long and tables are read before a branch.
    int loads = 0;
    for (const std::string& each : instructions) {
      if (has(each, "BRA") || has(each, "BSYNC")) loads = 0;
      if (has(each, "LDG.E.128") || has(each, "LD.E.128")) ++loads;
      if (has(each, "STG.E") || has(each, "ST.E")) break;
    }
    EXPECT_EQ(loads, 4) << name;
  }
}

}  // namespace
}  // namespace pipelive::cuda
