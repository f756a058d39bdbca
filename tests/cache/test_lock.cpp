// Locks between processes: exclusion per key, release, and waiting with a bound.
// SPDX-License-Identifier: Apache-2.0
#include <signal.h>

#include <atomic>
#include <thread>

#include "cache/lock.h"
#include "tests/cache/support.h"

namespace torchkiln::cache {
namespace {

using std::chrono::milliseconds;
using support::key_of;
using support::TemporaryDirectory;
namespace fs = std::filesystem;

const auto kNever = [] { return false; };

class KeyLockTest : public ::testing::Test {
 protected:
  bool is_free(const std::string& key) const {
    return KeyLock::try_acquire(file_, key).has_value();
  }
  void wait_until_busy(const std::string& key) const {
    while (is_free(key)) std::this_thread::sleep_for(milliseconds(1));
  }
  pid_t start_holder(const std::string& key) const {
    const pid_t holder = support::start_child([&] {
      // Again and again: the parent's probing may hold the key for a moment.
      std::optional<KeyLock> lock;
      while (!lock) lock = KeyLock::try_acquire(file_, key);
      while (true) ::pause();
      return 0;
    });
    wait_until_busy(key);
    return holder;
  }
  static void kill_child(pid_t child) {
    ::kill(child, SIGKILL);
    support::wait_status(child);
  }

  TemporaryDirectory directory_;
  fs::path file_ = directory_.path() / "locks";
};

TEST_F(KeyLockTest, ExcludesTheSameKeyOnly) {
  const auto lock = KeyLock::try_acquire(file_, key_of("a"));
  ASSERT_TRUE(lock);
  EXPECT_FALSE(is_free(key_of("a")));
  EXPECT_TRUE(is_free(key_of("b")));
  EXPECT_EQ(fs::file_size(file_), 0U);
  EXPECT_EQ(support::mode_of(file_), 0600U);
}

TEST_F(KeyLockTest, KeysThatAreNotHexadecimalWork) {
  const auto lock = KeyLock::try_acquire(file_, "prune");
  EXPECT_TRUE(lock);
  EXPECT_FALSE(is_free("prune"));
  EXPECT_TRUE(is_free("tune"));
}

TEST_F(KeyLockTest, MoveKeepsAndDestructionReleases) {
  auto first = KeyLock::try_acquire(file_, key_of("a"));
  {
    const KeyLock moved = std::move(*first);
    first.reset();
    EXPECT_FALSE(is_free(key_of("a")));
  }
  EXPECT_TRUE(is_free(key_of("a")));
  auto a = KeyLock::try_acquire(file_, key_of("a"));
  a = KeyLock::try_acquire(file_, key_of("b"));
  EXPECT_TRUE(is_free(key_of("a")));
  EXPECT_FALSE(is_free(key_of("b")));
}

TEST_F(KeyLockTest, DeathReleases) {
  const pid_t holder = start_holder(key_of("a"));
  kill_child(holder);
  EXPECT_TRUE(is_free(key_of("a")));
}

TEST_F(KeyLockTest, ForkedChildNeitherKeepsNorReleases) {
  auto lock = KeyLock::try_acquire(file_, key_of("a"));
  const int code = support::exit_code([&] {
    lock.reset();
    return is_free(key_of("a")) ? 1 : 0;
  });
  EXPECT_EQ(code, 0) << "the child released its parent's lock";
  const pid_t sleeper = support::start_child([] { return ::pause(); });
  lock.reset();
  EXPECT_TRUE(is_free(key_of("a"))) << "the child kept its parent's lock";
  kill_child(sleeper);
}

TEST_F(KeyLockTest, AvailableTellsBusyFromImpossible) {
  const auto lock = KeyLock::try_acquire(file_, key_of("a"));
  EXPECT_TRUE(KeyLock::available(file_));
  EXPECT_FALSE(KeyLock::available({}));
  EXPECT_FALSE(KeyLock::available(directory_.path() / "missing" / "locks"));
  fs::create_symlink(file_, directory_.path() / "link");
  EXPECT_FALSE(KeyLock::available(directory_.path() / "link"));
}

TEST_F(KeyLockTest, WaitReturnsAtOnceWhereNoLockCanBeHad) {
  bool ready = true;
  EXPECT_FALSE(wait_for_lock({}, key_of("a"), std::chrono::hours(1), kNever, ready));
  EXPECT_FALSE(ready);
}

TEST_F(KeyLockTest, WaitAsksAgainAfterTheLock) {
  // Ready only from the second question on: the former holder finished between question and lock.
  int questions = 0;
  bool ready = false;
  const auto lock = wait_for_lock(
      file_, key_of("a"), std::chrono::hours(1), [&] { return ++questions == 2; }, ready);
  EXPECT_FALSE(lock);
  EXPECT_TRUE(ready);
  EXPECT_TRUE(is_free(key_of("a")));
}

TEST_F(KeyLockTest, WaitEndsWhenTheHolderDies) {
  const pid_t holder = start_holder(key_of("a"));
  std::thread killer([holder] {
    std::this_thread::sleep_for(milliseconds(20));
    kill_child(holder);
  });
  bool ready = true;
  EXPECT_TRUE(wait_for_lock(file_, key_of("a"), std::chrono::hours(1), kNever, ready));
  EXPECT_FALSE(ready);
  killer.join();
}

TEST_F(KeyLockTest, StoppedHolderDelaysOthersByTheBoundOnly) {
  const pid_t holder = start_holder(key_of("a"));
  ::kill(holder, SIGSTOP);
  bool ready = true;
  EXPECT_FALSE(wait_for_lock(file_, key_of("a"), milliseconds(100), kNever, ready));
  EXPECT_FALSE(ready);
  kill_child(holder);
}

TEST_F(KeyLockTest, UnrelatedKeysDoNotWait) {
  const pid_t holder = start_holder(key_of("slow"));
  for (int i = 0; i < 100; ++i) {
    int questions = 0;
    bool ready = true;
    const auto lock = wait_for_lock(
        file_, key_of("fast" + std::to_string(i)), std::chrono::hours(1),
        [&] { return ++questions > 2; }, ready);
    EXPECT_TRUE(lock) << "a third question means that it waited";
  }
  kill_child(holder);
}

TEST_F(KeyLockTest, ThreadsExcludeOneAnother) {
  std::atomic<int> inside = 0;
  std::atomic<int> passed = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      bool ready = false;
      const auto lock = wait_for_lock(file_, key_of("a"), std::chrono::hours(1), kNever, ready);
      if (++inside == 1) ++passed;
      std::this_thread::yield();
      --inside;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(passed, 8);
}

TEST_F(KeyLockTest, NodeLocalFileIsInAPrivateDirectory) {
  const support::ScopedVariable runtime("XDG_RUNTIME_DIR", directory_.path().c_str());
  EXPECT_EQ(node_local_lock_file(), directory_.path() / "torchkiln" / "locks");
  EXPECT_EQ(support::mode_of(directory_.path() / "torchkiln"), 0700U);
}

TEST_F(KeyLockTest, NodeLocalFileFallsBackWhenTheRuntimeDirectoryIsOpen) {
  fs::create_directory(directory_.path() / "torchkiln");
  ::chmod((directory_.path() / "torchkiln").c_str(), 0755);
  const support::ScopedVariable runtime("XDG_RUNTIME_DIR", directory_.path().c_str());
  const std::string shared = "/dev/shm/torchkiln-" + std::to_string(::geteuid());
  const bool was_there = fs::exists(shared);
  const fs::path file = node_local_lock_file();
  EXPECT_TRUE(file.empty() || file == shared + "/locks") << file;
  if (!was_there) ::rmdir(shared.c_str());
}

}  // namespace
}  // namespace torchkiln::cache
