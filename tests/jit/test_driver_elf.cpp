// Reading ELF files, whole and damaged.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "jit/driver/elf.h"
#include "tests/jit/support/fake_cubin.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

using testing::FakeCubin;
using testing::TemporaryFolder;

TEST(Cubin, TellsArchitectureSymbolAndCode) {
  for (const int abi : {7, 8}) {
    for (const int architecture : {75, 90, 121}) {
      const FakeCubin cubin{.architecture = architecture, .abi_version = abi};
      const CubinFacts facts = inspect_cubin(cubin.bytes(), cubin.kernel);
      EXPECT_TRUE(facts.is_elf);
      EXPECT_EQ(facts.machine, kCudaMachine);
      EXPECT_EQ(facts.architecture, architecture);
      EXPECT_TRUE(facts.has_symbol);
      EXPECT_EQ(facts.text_bytes, cubin.text.size());
    }
  }
}

TEST(Cubin, DoesNotGuess) {
  const FakeCubin cubin;
  EXPECT_FALSE(inspect_cubin(cubin.bytes(), "_Z8backwardv").has_symbol);
  EXPECT_EQ(inspect_cubin(cubin.bytes(), "_Z8backwardv").text_bytes, 0U);
  EXPECT_EQ(inspect_cubin(FakeCubin{.abi_version = 9}.bytes()).architecture, 0);
  EXPECT_EQ(inspect_cubin(FakeCubin{.text = ""}.bytes(), cubin.kernel).text_bytes, 0U);
  EXPECT_FALSE(inspect_cubin("").is_elf);
  EXPECT_FALSE(
      inspect_cubin("not an ELF file, but longer than the header of one would have been").is_elf);
}

TEST(Cubin, SurvivesEveryFlipAndTruncation) {
  const std::string whole = FakeCubin{.text = std::string(1500, 'x')}.bytes();
  for (std::size_t at = 0; at < whole.size(); ++at) {
    for (const char flip : {'\x01', '\x80', '\xff'}) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      const CubinFacts facts = inspect_cubin(damaged, "_Z7forwardv");
      EXPECT_LE(facts.text_bytes, whole.size());
    }
    // A copy of exactly this size: a sanitizer sees a read past its end.
    const std::string cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(at));
    EXPECT_FALSE(inspect_cubin(cut, "_Z7forwardv").has_symbol);
  }
}

TEST(Cubin, SurvivesRandomBytes) {
  std::mt19937 random(1);
  const std::string whole = FakeCubin{}.bytes();
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = whole;
    for (int n = 0; n < 8; ++n) bytes[random() % bytes.size()] = static_cast<char>(random());
    EXPECT_LE(inspect_cubin(bytes, "_Z7forwardv").text_bytes, bytes.size());
  }
}

TEST(BuildId, IsReadFromTheNote) {
  const TemporaryFolder folder;
  const std::string id = "\x12\x34\xab\xcd\x01\x02\x03\x04";
  const std::string file = folder.write("lib.so", testing::fake_library(id));
  EXPECT_EQ(build_id(file), "1234abcd01020304");
  EXPECT_EQ(file_identity(file), "1234abcd01020304");
}

TEST(BuildId, FallsBackToADigest) {
  const TemporaryFolder folder;
  const std::string bare = folder.write("bare.so", testing::fake_library(""));
  const std::string other = folder.write("other.so", testing::fake_library("") + "more");
  EXPECT_EQ(build_id(bare), std::nullopt);
  EXPECT_EQ(file_identity(bare)->size(), 64U);
  EXPECT_NE(file_identity(bare), file_identity(other));
}

TEST(BuildId, RefusesWhatIsNoFile) {
  const TemporaryFolder folder;
  EXPECT_EQ(build_id((folder.path() / "missing").string()), std::nullopt);
  EXPECT_EQ(file_identity((folder.path() / "missing").string()), std::nullopt);
  EXPECT_EQ(file_identity(folder.path().string()), std::nullopt);
  EXPECT_EQ(file_identity(folder.write("empty", "")), std::nullopt);
}

TEST(BuildId, SurvivesDamage) {
  const TemporaryFolder folder;
  const std::string whole = testing::fake_library("0123456789abcdef");
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(~damaged[at]);
    build_id(folder.write("damaged.so", damaged));
    EXPECT_EQ(build_id(folder.write("cut.so", whole.substr(0, at))), std::nullopt);
  }
}

}  // namespace
}  // namespace torchkiln::jit
