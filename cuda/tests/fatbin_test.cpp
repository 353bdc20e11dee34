#include "pipelive/cuda/fatbin.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace pipelive::cuda {
namespace {

TEST(FatbinTest, EveryKernelFileIsWholeOrNoneIsThere) {
  EXPECT_EQ(fatbins().empty(), fatbin_archs().empty());
  EXPECT_EQ(fatbins().empty(), fatbin_compiler().empty());
  for (const Fatbin& entry : fatbins()) {
    SCOPED_TRACE(std::string(entry.name));
    // A fatbin begins with a magic number, then versions and header size, then the size of the
    // rest.
    constexpr std::uint32_t kMagic = 0xBA55ED50;
    struct {
      std::uint32_t magic;
      std::uint16_t version;
      std::uint16_t header_bytes;
      std::uint64_t body_bytes;
    } header{};
    ASSERT_GT(entry.bytes.size(), sizeof header);
    std::memcpy(&header, entry.bytes.data(), sizeof header);
    EXPECT_EQ(header.magic, kMagic);
    EXPECT_EQ(header.header_bytes + header.body_bytes, entry.bytes.size());
  }
}

}  // namespace
}  // namespace pipelive::cuda
