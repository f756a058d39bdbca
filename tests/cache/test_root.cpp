// Choice and examination of the root directory.
// SPDX-License-Identifier: Apache-2.0
#include "cache/root.h"
#include "tests/cache/support.h"

namespace torchkiln::cache {
namespace {

using support::ScopedVariable;
using support::TemporaryDirectory;
namespace fs = std::filesystem;

constexpr uid_t kNobodysUid = 54321;

void expect_refused(const std::string& configured, const std::string& reason) {
  const Root root = resolve_root(configured);
  EXPECT_TRUE(root.path.empty()) << root.path;
  EXPECT_NE(root.refusal.find(reason), std::string::npos) << root.refusal;
  EXPECT_NE(root.refusal.find("TORCHKILN_CACHE_DIR"), std::string::npos) << root.refusal;
}

TEST(RootTest, ConfiguredWinsThenXdgThenHome) {
  const TemporaryDirectory home, xdg, configured;
  const ScopedVariable set_home("HOME", home.path().c_str());
  {
    const ScopedVariable set_xdg("XDG_CACHE_HOME", xdg.path().c_str());
    EXPECT_EQ(resolve_root(configured.path() / "x/").path, configured.path() / "x");
    EXPECT_EQ(resolve_root("").path, xdg.path() / "torchkiln");
  }
  const ScopedVariable no_xdg("XDG_CACHE_HOME", nullptr);
  EXPECT_EQ(resolve_root("").path, home.path() / ".cache" / "torchkiln");
  const ScopedVariable relative_xdg("XDG_CACHE_HOME", "cache");
  EXPECT_EQ(resolve_root("").path, home.path() / ".cache" / "torchkiln");
  EXPECT_EQ(support::files_in(home.path()), 0U) << "resolving makes nothing";
}

TEST(RootTest, RelativeIsRefused) {
  expect_refused("cache", "relative");
  expect_refused("./cache", "relative");
  expect_refused("~/cache", "relative");
}

TEST(RootTest, SharedDirectoryItselfIsRefused) {
  expect_refused("/tmp", "writable by other users");
  expect_refused("/tmp/", "writable by other users");
}

TEST(RootTest, NoHomeMeansMemoryOnly) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become a user without a passwd entry";
  EXPECT_EQ(support::exit_code([] {
              ::unsetenv("XDG_CACHE_HOME");
              ::setenv("HOME", "/nonexistent", 1);
              if (::setuid(kNobodysUid) != 0) return 1;
              const Root root = resolve_root("");
              return root.path.empty() && root.refusal.find("no home") != std::string::npos ? 0 : 2;
            }),
            0);
}

TEST(RootTest, UnsetHomeFallsBackToPasswd) {
  const ScopedVariable no_home("HOME", nullptr);
  const ScopedVariable no_xdg("XDG_CACHE_HOME", nullptr);
  const Root root = resolve_root("");
  EXPECT_NE(root.path.empty(), root.refusal.empty());
  EXPECT_TRUE(root.path.empty() || root.path.is_absolute());
}

TEST(RootTest, SymbolicLinkIsRefused) {
  const TemporaryDirectory directory;
  fs::create_directory(directory.path() / "real");
  fs::create_directory_symlink(directory.path() / "real", directory.path() / "link");
  expect_refused(directory.path() / "link", "symbolic link");
  expect_refused(directory.path() / "link/", "symbolic link");
}

TEST(RootTest, SymbolicLinkAboveTheRootIsFollowedAndExamined) {
  const TemporaryDirectory directory;
  fs::create_directories(directory.path() / "open" / "mine");
  fs::create_directory(directory.path() / "fine");
  fs::create_directory_symlink("fine", directory.path() / "to_fine");
  fs::create_directory_symlink("open/mine", directory.path() / "to_open");
  fs::create_directory_symlink(directory.path() / "open", directory.path() / "to_open_absolute");
  fs::create_directory_symlink("loop", directory.path() / "loop");
  ::chmod((directory.path() / "open").c_str(), 0777);
  EXPECT_EQ(resolve_root(directory.path() / "to_fine" / "root").refusal, "");
  expect_refused(directory.path() / "to_open" / "root", "writable by other users");
  expect_refused(directory.path() / "to_open_absolute" / "root", "writable by other users");
  expect_refused(directory.path() / "loop" / "root", "cannot be followed");
}

TEST(RootTest, WritableAncestorIsRefused) {
  const TemporaryDirectory directory;
  const fs::path open = directory.path() / "open";
  fs::create_directory(open);
  for (const mode_t mode : {0777, 0770, 0702}) {
    ::chmod(open.c_str(), mode);
    expect_refused(open / "root", "chmod go-w");
    expect_refused(open, "chmod go-w");
  }
}

TEST(RootTest, StickyAncestorNeedsAPrivateDirectoryBelow) {
  const TemporaryDirectory directory;
  const fs::path sticky = directory.path() / "sticky";
  fs::create_directories(sticky / "mine");
  ::chmod(sticky.c_str(), 01777);
  ::chmod((sticky / "mine").c_str(), 0755);
  expect_refused(sticky / "mine", "chmod 700");
  EXPECT_EQ(resolve_root(sticky / "mine" / "missing").refusal, "");
  ::chmod((sticky / "mine").c_str(), 0700);
  EXPECT_EQ(resolve_root(sticky / "mine").refusal, "");
  EXPECT_EQ(resolve_root(sticky / "missing").refusal, "");
}

TEST(RootTest, ForeignOwnerIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  const TemporaryDirectory directory;
  const fs::path foreign = directory.path() / "foreign";
  fs::create_directory(foreign);
  ASSERT_EQ(::chown(foreign.c_str(), kNobodysUid, kNobodysUid), 0);
  expect_refused(foreign, "belongs to another user");
  expect_refused(foreign / "root", "belongs to another user");
}

TEST(RootTest, FileInTheWayIsRefused) {
  const TemporaryDirectory directory;
  support::write_file(directory.path() / "file", "x");
  expect_refused(directory.path() / "file", "not a directory");
  expect_refused(directory.path() / "file" / "root", "not a directory");
}

}  // namespace
}  // namespace torchkiln::cache
