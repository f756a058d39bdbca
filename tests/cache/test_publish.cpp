// Publishing in bad conditions: death at every step, errors, full or read-only disks, many writers.
// SPDX-License-Identifier: Apache-2.0
#include <signal.h>

#include <thread>

#include "cache/names.h"
#include "cache/publish.h"
#include "tests/cache/support.h"

namespace torchkiln::cache {
namespace {

using std::chrono::hours;
using support::files_in;
using support::kCompiler;
using support::key_of;
using support::object_with;
namespace fs = std::filesystem;
using Published = Store::Published;

constexpr std::size_t kLargePayload = 100'000;  // two chunks, so that "write" is passed twice

// The step of the hooks below; a hook is a plain function.
std::string armed_step;
int armed_error = 0;
int kill_at_armed_step(const char* step) { return armed_step == step ? ::raise(SIGKILL) : 0; }
int fail_at_armed_step(const char* step) { return armed_step == step ? armed_error : 0; }
int kill_at_second_write(const char* step) {
  static int writes = 0;
  return std::string_view(step) == "write" && ++writes == 2 ? ::raise(SIGKILL) : 0;
}

class PublishTest : public ::testing::Test {
 protected:
  // Kills a child that publishes; returns what a reader then finds.
  std::optional<Object> publish_and_die(testing::FaultHook hook) {
    const int status = support::wait_status(support::start_child([&] {
      testing::fault_hook = hook;
      Store writer(root_, nullptr);
      writer.publish(key_, kCompiler, object_with(std::string(kLargePayload, 'p')));
      return 0;
    }));
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << armed_step;
    return store_.find(key_, kCompiler, false, nullptr);
  }
  void age_temporaries(std::chrono::seconds age) const {
    for (const auto& file : fs::directory_iterator(temporaries())) support::set_age(file, age);
  }
  fs::path temporaries() const { return root_ / "v1" / "tmp"; }

  support::TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "root";
  support::Warnings warnings_;
  Store store_{root_, warnings_.collector()};
  const std::string key_ = key_of("a");
};

TEST_F(PublishTest, DeathAtAnyStepLeavesAWholeObjectOrNone) {
  struct Case {
    const char* step;
    bool visible;
    std::size_t leftover;
  };
  for (const Case& c : {Case{"tmp_created", false, 1},
                        {"tmp_written", false, 1},
                        {"tmp_synced", false, 1},
                        {"link", false, 1},
                        {"linked", true, 1},
                        {"tmp_unlinked", true, 0},
                        {"directory_synced", true, 0}}) {
    fs::remove_all(root_);
    armed_step = c.step;
    const auto found = publish_and_die(kill_at_armed_step);
    EXPECT_EQ(found ? found->payload.size() : 0, c.visible ? kLargePayload : 0) << c.step;
    EXPECT_EQ(files_in(temporaries()), c.leftover) << c.step;
    age_temporaries(hours(2));
    Store next(root_, nullptr);
    EXPECT_EQ(next.publish(key_, kCompiler, object_with(std::string(kLargePayload, 'p'))),
              c.visible ? Published::kAlreadyThere : Published::kYes);
    EXPECT_EQ(files_in(temporaries()), 0U) << "not swept after " << c.step;
  }
  EXPECT_EQ(store_.counters().damaged, 0U);
}

TEST_F(PublishTest, DeathInTheMiddleOfAWriteLeavesNothingVisible) {
  EXPECT_FALSE(publish_and_die(kill_at_second_write));
  EXPECT_EQ(files_in(temporaries()), 1U);
}

TEST_F(PublishTest, SweepSparesTheLivingAndTheYoung) {
  fs::create_directories(temporaries());
  const auto plant = [&](const std::string& name, std::chrono::seconds age) {
    support::write_file(temporaries() / name, "x");
    support::set_age(temporaries() / name, age);
    return temporaries() / name;
  };
  const std::string ours = temporary_name();
  const std::string host = ours.substr(0, ours.find('-'));
  const std::string dead = std::to_string(support::start_child([] { return 0; }));
  while (::waitpid(-1, nullptr, 0) > 0) continue;
  const fs::path living = plant(ours, hours(2));
  const fs::path young = plant(host + "-" + dead + "-1", std::chrono::minutes(50));
  const fs::path elsewhere = plant("other-" + dead + "-2", hours(23));
  const fs::path gone = plant(host + "-" + dead + "-3", hours(2));
  const fs::path ancient = plant("other-1-4", hours(25));
  store_.publish(key_, kCompiler, object_with("p"));
  EXPECT_TRUE(fs::exists(living));
  EXPECT_TRUE(fs::exists(young));
  EXPECT_TRUE(fs::exists(elsewhere));
  EXPECT_FALSE(fs::exists(gone));
  EXPECT_FALSE(fs::exists(ancient));
}

TEST_F(PublishTest, ErrorsAreWarnedOfOnceEachAndLeaveNothing) {
  const support::ScopedFault fault(fail_at_armed_step);
  std::size_t warned = 0;
  for (const int error : {EROFS, EACCES, ENOSPC, EDQUOT, ENAMETOOLONG, EIO}) {
    armed_error = error;
    ++warned;
    for (const char* step : {"tmp_created", "write", "tmp_synced", "link"}) {
      armed_step = step;
      EXPECT_EQ(store_.publish(key_, kCompiler, object_with("p")), Published::kNo) << step;
      EXPECT_EQ(files_in(temporaries()), 0U) << step;
    }
    EXPECT_EQ(warnings_.texts.size(), warned) << error_text(error);
    EXPECT_NE(warnings_.texts.back().find(error_text(error)), std::string::npos);
  }
  EXPECT_EQ(store_.counters().publish_failures, 24U);
  EXPECT_FALSE(store_.contains(key_));
}

TEST_F(PublishTest, WithoutHardLinksARenamePublishes) {
  const support::ScopedFault fault(fail_at_armed_step);
  armed_step = "link";
  armed_error = EPERM;
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("first")), Published::kYes);
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("second")), Published::kAlreadyThere);
  EXPECT_EQ(store_.find(key_, kCompiler, true, nullptr)->payload, "first");
  EXPECT_EQ(files_in(temporaries()), 0U);
}

TEST_F(PublishTest, ModesDoNotDependOnTheUmask) {
  for (const mode_t mask : {0000, 0777}) {
    fs::remove_all(directory_.path() / "deep");
    const fs::path root = directory_.path() / "deep" / "root";
    const mode_t before = ::umask(mask);
    Store store(root, nullptr);
    EXPECT_EQ(store.publish(key_, kCompiler, object_with("p")), Published::kYes);
    ::umask(before);
    EXPECT_EQ(support::mode_of(root.parent_path()), 0700U);
    EXPECT_EQ(support::mode_of(root), 0700U);
    for (const auto& entry : fs::recursive_directory_iterator(root)) {
      EXPECT_EQ(support::mode_of(entry.path()), entry.is_directory() ? 0700U : 0600U)
          << entry.path();
    }
  }
}

TEST_F(PublishTest, ReadOnlyRootIsReadAndBadFilesInItAreSkipped) {
  if (!support::can_mount()) GTEST_SKIP() << "this user may not mount a file system";
  const int code = support::exit_code([&] {
    const fs::path mount = directory_.path();
    if (!support::mount_private_tmpfs(mount, "mode=700")) return 1;
    const std::string bad_key = key_of("bad");
    if (store_.publish(key_, kCompiler, object_with("p")) != Published::kYes) return 2;
    store_.publish(bad_key, kCompiler, object_with("p"));
    support::write_file(support::object_path(root_, bad_key), "damaged");
    if (::mount("none", mount.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) != 0) return 3;

    support::Warnings warnings;
    Store store(root_, warnings.collector());
    if (!store.readable() || store.writable()) return 4;
    if (store.state().find("read-only") == std::string::npos) return 5;
    if (!store.find(key_, kCompiler, false, nullptr)) return 6;
    if (!store.contains(bad_key)) return 7;
    for (int i = 0; i < 3; ++i) {
      if (store.find(bad_key, kCompiler, false, nullptr)) return 8;
    }
    if (store.counters().damaged != 1 || store.contains(bad_key)) return 9;
    for (int i = 0; i < 3; ++i) {
      if (store.publish(key_of("new"), kCompiler, object_with("p")) != Published::kNo) return 10;
    }
    return warnings.texts.size() == 2 ? 0 : 11;  // the bad file, and that nothing can be written
  });
  EXPECT_EQ(code, 0);
}

TEST_F(PublishTest, FullDiskMeansNoAndLeavesNothing) {
  if (!support::can_mount()) GTEST_SKIP() << "this user may not mount a file system";
  const int code = support::exit_code([&] {
    if (!support::mount_private_tmpfs(directory_.path(), "mode=700,size=64k")) return 1;
    const Object large = object_with(std::string(kLargePayload, 'p'));
    if (store_.publish(key_, kCompiler, large) != Published::kNo) return 2;
    if (files_in(temporaries()) != 0 || store_.contains(key_)) return 3;
    if (warnings_.texts.size() != 1) return 4;
    if (store_.publish(key_, kCompiler, object_with("small")) != Published::kYes) return 5;
    return store_.find(key_, kCompiler, true, nullptr) ? 0 : 6;
  });
  EXPECT_EQ(code, 0);
}

TEST_F(PublishTest, NoFreeInodeMeansNoAndLeavesNothing) {
  if (!support::can_mount()) GTEST_SKIP() << "this user may not mount a file system";
  const int code = support::exit_code([&] {
    // The mount itself, root, v1, tmp, objects and one shard: none is left for the file.
    if (!support::mount_private_tmpfs(directory_.path(), "mode=700,nr_inodes=6")) return 1;
    for (int i = 0; i < 3; ++i) {
      if (store_.publish(key_, kCompiler, object_with("p")) != Published::kNo) return 2;
    }
    if (files_in(temporaries()) != 0 || store_.contains(key_)) return 3;
    return warnings_.texts.size() == 1 ? 0 : 4;
  });
  EXPECT_EQ(code, 0);
}

TEST_F(PublishTest, BadObjectOnAFullDiskIsReplaced) {
  if (!support::can_mount()) GTEST_SKIP() << "this user may not mount a file system";
  const int code = support::exit_code([&] {
    if (!support::mount_private_tmpfs(directory_.path(), "mode=700,nr_inodes=9")) return 1;
    if (store_.publish(key_, kCompiler, object_with("good")) != Published::kYes) return 2;
    support::write_file(support::object_path(root_, key_), "damaged");
    support::write_file(directory_.path() / "filler", "");
    if (store_.find(key_, kCompiler, true, nullptr)) return 3;
    if (fs::exists(root_ / "v1" / "quarantine")) return 6;  // then the disk was not full
    fs::remove(directory_.path() / "filler");
    if (store_.publish(key_, kCompiler, object_with("good")) != Published::kYes) return 4;
    return store_.find(key_, kCompiler, true, nullptr) ? 0 : 5;
  });
  EXPECT_EQ(code, 0);
}

// A file server's clock is not ours.
TEST_F(PublishTest, SweepJudgesAgeByTheClockOfTheFiles) {
  fs::create_directories(temporaries());
  const fs::path young = temporaries() / "other-1-1";
  support::write_file(young, "of a living writer");
  const Descriptor tmp = open_directory(AT_FDCWD, temporaries());
  // Our clock is 30 hours ahead of the one that stamps.
  support::set_age(young, hours(30));
  support::set_age(temporaries(), hours(30));
  sweep_temporaries(tmp.get());
  EXPECT_TRUE(fs::exists(young));
  support::set_age(temporaries(), hours(0));
  sweep_temporaries(tmp.get());
  EXPECT_FALSE(fs::exists(young));
}

TEST_F(PublishTest, AnotherSchemaInTheSameRootIsLeftAlone) {
  const fs::path theirs = root_ / "v2" / "objects" / "ab" / "name.kernel";
  const fs::path their_litter = root_ / "v2" / "tmp" / "other-1-1";
  for (const fs::path& file : {theirs, their_litter}) {
    fs::create_directories(file.parent_path());
    support::write_file(file, "another format");
    support::set_age(file, hours(1000));
  }
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("p")), Published::kYes);
  support::set_age(support::object_path(root_, key_), hours(2));
  EXPECT_EQ(store_.list().size(), 1U);
  EXPECT_GT(store_.prune(0), 0U);
  store_.clear();
  EXPECT_TRUE(fs::exists(theirs));
  EXPECT_TRUE(fs::exists(their_litter));
  EXPECT_FALSE(store_.contains(key_));
}

TEST_F(PublishTest, DirectoriesThatVanishMeanwhileAreMadeAgain) {
  static fs::path vanishing;
  vanishing = root_;
  store_.publish(key_of("before"), kCompiler, object_with("p"));
  static bool done;
  done = false;
  const support::ScopedFault fault([](const char* step) {
    if (std::string_view(step) == "link" && !done) {
      done = true;
      fs::remove_all(vanishing);
    }
    return 0;
  });
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("p")), Published::kYes);
  EXPECT_TRUE(store_.find(key_, kCompiler, true, nullptr));
  EXPECT_TRUE(warnings_.texts.empty());
}

// Compiles once: takes the lock, counts the "compile" in a file, publishes.
int find_or_compile(const fs::path& root, const fs::path& lock_file, const fs::path& counter,
                    const std::string& key) {
  Store store(root, nullptr);
  const auto find = [&] { return store.find(key, kCompiler, false, nullptr).has_value(); };
  bool ready = false;
  const auto lock = wait_for_lock(lock_file, key, hours(1), find, ready);
  if (ready) return 0;
  if (!lock) return 1;
  const int fd = ::open(counter.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (::write(fd, "x", 1) != 1) return 2;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  return store.publish(key, kCompiler, object_with("p")) == Published::kYes ? 0 : 3;
}

TEST_F(PublishTest, ManyProcessesCompileAKeyOnce) {
  const fs::path lock_file = directory_.path() / "locks";
  const fs::path counter = directory_.path() / "counter";
  std::vector<pid_t> children;
  for (int i = 0; i < 64; ++i) {
    children.push_back(
        support::start_child([&] { return find_or_compile(root_, lock_file, counter, key_); }));
  }
  for (const pid_t child : children) EXPECT_EQ(support::wait_status(child), 0);
  EXPECT_EQ(support::read_bytes(counter), "x");
}

TEST_F(PublishTest, ProcessesWithoutLocksAgreeOnOneObject) {
  std::vector<pid_t> children;
  for (int i = 0; i < 16; ++i) {
    children.push_back(support::start_child([&, i] {
      const auto result = store_.publish(key_, kCompiler, object_with(std::to_string(i)));
      return result == Published::kYes ? 1 : result == Published::kAlreadyThere ? 0 : 2;
    }));
  }
  int winners = 0;
  for (const pid_t child : children) winners += WEXITSTATUS(support::wait_status(child));
  EXPECT_EQ(winners, 1);
  EXPECT_TRUE(store_.find(key_, kCompiler, true, nullptr));
}

}  // namespace
}  // namespace torchkiln::cache
