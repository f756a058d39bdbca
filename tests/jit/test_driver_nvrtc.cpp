// Finding NVRTC in made-up folders, and loading the real one.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>

#include "jit/driver/dynamic_library.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/error.h"
#include "tests/jit/support/fake_cubin.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

using testing::fake_library;
using testing::TemporaryFolder;

// A folder with libnvrtc and its builtins, as packages have them.
std::string install(const TemporaryFolder& folder, const std::string& where, int major, int minor,
                    const std::string& id = "0123456789") {
  const std::string number = std::to_string(major) + "." + std::to_string(minor);
  folder.write(where + "/libnvrtc-builtins.so." + number, fake_library("builtins" + number));
  return folder.write(where + "/libnvrtc.so." + std::to_string(major), fake_library(id));
}

NvrtcSearch empty_search() {
  NvrtcSearch search;
  search.ask_loader = false;
  return search;
}

TEST(NvrtcFinder, KeepsTheOrder) {
  const TemporaryFolder folder;
  const auto place = [&](const char* name) { return (folder.path() / name).string(); };
  NvrtcSearch search;
  search.mapped = {"/lib/libc.so.6", install(folder, "torch/lib", 13, 0),
                   place("torch/lib/libnvrtc-builtins.so.13.0")};
  search.site_directories = {place("site")};
  const std::string old = install(folder, "site/nvidia/cuda_nvrtc/lib", 12, 9);
  const std::string current = install(folder, "site/nvidia/cu13/lib", 13, 5);
  search.conda_prefix = place("conda");
  const std::string conda = install(folder, "conda/lib", 12, 6);
  search.library_path = {place("ld")};
  const std::string ld = install(folder, "ld", 12, 4);
  search.toolkits = {place("cuda")};
  const std::string toolkit = install(folder, "cuda/lib64", 13, 1);

  std::vector<std::string> found;
  for (const NvrtcCandidate& candidate : search.find()) found.push_back(candidate.path);
  EXPECT_EQ(found, (std::vector<std::string>{search.mapped[1], current, old, conda, ld,
                                             "libnvrtc.so.13", "libnvrtc.so.12", toolkit}));

  search.explicit_path = ld;
  ASSERT_EQ(search.find().size(), 1U);
  EXPECT_EQ(search.find()[0].path, ld);
  EXPECT_EQ(search.find()[0].why, "TORCHKILN_NVRTC_PATH");
}

TEST(NvrtcFinder, TakesAFolderAsExplicitPath) {
  const TemporaryFolder folder;
  const std::string file = install(folder, "cuda/lib64", 13, 5);
  NvrtcSearch search = empty_search();
  for (const char* name : {"cuda", "cuda/lib64"}) {
    search.explicit_path = (folder.path() / name).string();
    ASSERT_EQ(search.find().size(), 1U) << name;
    EXPECT_EQ(search.find()[0].path, file);
  }
}

TEST(NvrtcFinder, ListsEachFileOnce) {
  const TemporaryFolder folder;
  const std::string file = install(folder, "conda/lib", 13, 5);
  NvrtcSearch search = empty_search();
  search.mapped = {file};
  search.conda_prefix = (folder.path() / "conda").string();
  search.library_path = {(folder.path() / "conda/lib").string()};
  EXPECT_EQ(search.find().size(), 1U);
}

TEST(NvrtcFinder, ReadsTheIdentityWithoutLoading) {
  const TemporaryFolder folder;
  const NvrtcCandidate candidate{install(folder, "lib", 13, 5), "test"};
  EXPECT_EQ(candidate.version(), 13050);
  EXPECT_EQ(candidate.compiler_id(), "nvrtc-13.5-3031323334353637-6275696c");
  const NvrtcCandidate other{install(folder, "other", 13, 5, "another!"), "test"};
  EXPECT_NE(other.compiler_id(), candidate.compiler_id());
  for (const std::string& path : mapped_libraries()) EXPECT_NE(path, candidate.path);
}

TEST(NvrtcFinder, IdentityOfALibraryWithoutBuildId) {
  const TemporaryFolder folder;
  const NvrtcCandidate candidate{install(folder, "lib", 12, 6, ""), "test"};
  EXPECT_TRUE(candidate.compiler_id().starts_with("nvrtc-12.6-"));
  EXPECT_EQ(candidate.compiler_id().size(), std::string("nvrtc-12.6-").size() + 16 + 1 + 8);
}

TEST(NvrtcFinder, ChoosesTheBuiltinsOfTheRealFileName) {
  const TemporaryFolder folder;
  const std::string link = install(folder, "lib", 12, 9);
  install(folder, "lib", 12, 4);
  EXPECT_EQ((NvrtcCandidate{link, ""}.version()), 12090) << "the newest without another hint";
  std::filesystem::rename(link, folder.path() / "lib/libnvrtc.so.12.4.127");
  std::filesystem::create_symlink("libnvrtc.so.12.4.127", link);
  EXPECT_EQ((NvrtcCandidate{link, ""}.version()), 12040);
  EXPECT_TRUE(builtins_beside(link).ends_with("libnvrtc-builtins.so.12.4"));
}

TEST(NvrtcFinder, DoesNotMixMajors) {
  const TemporaryFolder folder;
  install(folder, "lib", 13, 0);
  const NvrtcCandidate lonely{folder.write("lib/libnvrtc.so.12", fake_library("x")), ""};
  EXPECT_EQ(lonely.version(), 0);
  EXPECT_EQ(lonely.compiler_id(), "");
}

TEST(NvrtcFinder, SonamesHaveNoIdentityYet) {
  const NvrtcCandidate candidate{"libnvrtc.so.13", "system loader"};
  EXPECT_TRUE(candidate.by_soname());
  EXPECT_EQ(candidate.version(), 0);
  EXPECT_EQ(candidate.compiler_id(), "");
}

TEST(NvrtcFinder, NotFoundTellsWhereItLooked) {
  NvrtcSearch search = empty_search();
  search.site_directories = {"/absent/site"};
  search.conda_prefix = "/absent/conda";
  try {
    open_nvrtc(search);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), TORCHKILN_ERROR_COMPILER);
    EXPECT_STREQ(error.what(),
                 "compiler: NVRTC must be installed to compile a kernel; got none that loads from "
                 "libraries of this process, /absent/site/nvidia/*/lib, /absent/conda/lib. Run pip "
                 "install torchkiln[compiler], or set TORCHKILN_NVRTC_PATH.");
  }
}

TEST(NvrtcFinder, BrokenFileIsNamed) {
  const TemporaryFolder folder;
  NvrtcSearch search = empty_search();
  search.explicit_path = folder.write("libnvrtc.so.13", "not a library at all");
  try {
    open_nvrtc(search);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(
        std::string(error.what()).find(search.explicit_path + ": the library could not be loaded"),
        std::string::npos)
        << error.what();
    EXPECT_EQ(error.details().at("tried").size(), 1U);
  }
}

TEST(NvrtcApi, RealOneKnowsItself) {
  const auto candidates = testing::test_nvrtcs();
  if (candidates.empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
  for (const NvrtcCandidate& candidate : candidates) {
    const std::string id = candidate.compiler_id();
    const NvrtcApi nvrtc = load_nvrtc(candidate.path);
    EXPECT_EQ(nvrtc.version, candidate.version());
    EXPECT_EQ(compiler_id(nvrtc), id);
    EXPECT_GE(nvrtc.architectures.size(), 5U);
    EXPECT_TRUE(std::is_sorted(nvrtc.architectures.begin(), nvrtc.architectures.end()));
    EXPECT_NE(std::count(nvrtc.architectures.begin(), nvrtc.architectures.end(), 90), 0);
  }
}

}  // namespace
}  // namespace torchkiln::jit
