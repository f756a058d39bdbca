// The core with a fake compiler, under attack: damage, forks, threads, exits, small stacks. The processes that are
// killed or starved are in tests/deploy/attack.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "jit/log.h"
#include "tests/cache/damage.h"
#include "tests/cache/support.h"
#include "tests/jit/support/fake_nvrtc.h"

namespace torchkiln::jit {
namespace {

using cache::support::attack_rounds;
namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr Target kTarget{.architecture = 90};

// What a process has in memory; several on one root are as good as several processes, but for locks.
struct Core {
  explicit Core(const fs::path& root, const fs::path& work, std::chrono::milliseconds compile = 0ms)
      : nvrtc(work, compile, work / "compiles") {
    settings.cache_dir = root.string();
    settings.compile_jobs = 2;
    objects.emplace(settings, sources, nvrtc.source(sources), statistics);
  }
  Found get(int index) {
    return objects->get(testing::scale_specialization(index), kTarget, Priority::kInteractive);
  }
  // As the engine does it.
  void before_fork() {
    sources.before_fork();
    objects->before_fork();
  }
  void after_fork_in_parent() {
    objects->after_fork_in_parent();
    sources.after_fork();
  }
  void after_fork_in_child() {
    objects->after_fork_in_child();
    sources.after_fork();
  }
  bool is_right(int index) { return testing::is_right_kernel(*get(index).object, index); }

  Settings settings;
  TemplateSources sources = testing::scale_sources();
  Statistics statistics;
  testing::FakeNvrtc nvrtc;
  std::optional<Objects> objects;
};

class AttackTest : public ::testing::Test {
 protected:
  void SetUp() override {
    set_log_sink([](void*, std::int32_t, const char*) {}, nullptr);
  }
  void TearDown() override { set_log_sink(nullptr, nullptr); }

  fs::path path_of(const Found& found) const {
    const auto compiler = found.object->header.at("compiler").get<std::string>();
    return cache::support::object_path(root_, found.key, compiler);
  }

  cache::support::TemporaryDirectory directory_;
  const fs::path root_ = directory_.path() / "root";
  const cache::support::ScopedVariable runtime_{"XDG_RUNTIME_DIR", directory_.path().c_str()};
};

// Every damage is noticed, gives the right kernel all the same, and is mended on the disk.
TEST_F(AttackTest, DamagedObjectsHeal) {
  constexpr int kObjects = 4;
  std::vector<fs::path> files;
  std::vector<std::string> sound;
  {
    Core core(root_, directory_.path());
    for (int i = 0; i < kObjects; ++i) files.push_back(path_of(core.get(i)));
  }
  for (const fs::path& file : files) sound.push_back(cache::support::read_bytes(file));
  cache::support::Damage damage(20240611);
  const int rounds = attack_rounds(300);
  for (int round = 0; round < rounds; ++round) {
    const std::size_t victim = damage.below(kObjects);
    const std::size_t other = (victim + 1 + damage.below(kObjects - 1)) % kObjects;
    std::string kind;
    cache::support::write_file(files[victim], damage.of(sound[victim], sound[other], kind));
    Core first(root_, directory_.path());
    ASSERT_TRUE(first.is_right(static_cast<int>(victim))) << round << ": " << kind;
    ASSERT_EQ(first.statistics.compiles, 1U) << round << ": " << kind << " was not noticed";
    Core second(root_, directory_.path());
    ASSERT_TRUE(second.is_right(static_cast<int>(victim))) << round << ": " << kind;
    ASSERT_EQ(second.statistics.compiles, 0U) << round << ": " << kind << " was not mended";
  }
  RecordProperty("damages", rounds);
  std::printf("[ damages  ] %d objects\n", rounds);
}

// The fork handlers of the engine, on the objects of this test.
Core* forking = nullptr;

TEST_F(AttackTest, ForksWhileAnotherThreadCompiles) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the allocators of g++'s sanitizers are not safe across fork()";
#endif
  Core core(root_, directory_.path(), 1ms);
  ASSERT_TRUE(core.is_right(0));
  forking = &core;
  ::pthread_atfork(
      [] {
        if (forking != nullptr) forking->before_fork();
      },
      [] {
        if (forking != nullptr) forking->after_fork_in_parent();
      },
      [] {
        if (forking != nullptr) forking->after_fork_in_child();
      });
  std::atomic<bool> enough = false;
  std::atomic<int> next = 1;
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      while (!enough) core.get(next++);
    });
  }
  constexpr int forks = 1000;
  int bad = 0;
  for (int i = 0; i < forks; ++i) {
    const int missing = 1'000'000 + i;
    const pid_t child = cache::support::start_child([&] {
      ::alarm(20);  // a dead-lock ends by SIGALRM
      if (!core.objects->find(testing::scale_specialization(0), kTarget)) return 1;
      Core fresh(root_, directory_.path());  // nothing in its memory: from the disk
      if (!fresh.objects->find(testing::scale_specialization(0), kTarget)) return 2;
      try {
        core.get(missing);
      } catch (const Error& error) {
        return std::string(error.what()).find("forked child") == std::string::npos ? 3 : 0;
      }
      return 4;
    });
    const int status = cache::support::wait_status(child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      ++bad;
      ADD_FAILURE() << "child " << i << ": status " << status;
      if (bad > 3) break;
    }
  }
  enough = true;
  for (std::thread& thread : threads) thread.join();
  forking = nullptr;
  EXPECT_EQ(bad, 0);
  EXPECT_GT(core.statistics.compiles, 1U) << "nothing was compiled meanwhile";
  std::printf("[ forks    ] %d\n", forks);
}

TEST_F(AttackTest, ThreadsOnFiftyKeys) {
  constexpr int kThreads = 32, kKeys = 50;
  Core core(root_, directory_.path(), 1ms);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kKeys; ++i) {
        const int key = (i * 7 + t * 11) % kKeys;
        if (!core.is_right(key)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(core.statistics.compiles, static_cast<std::uint64_t>(kKeys));
}

// Two stores of one root prune, publish and find at once.
TEST_F(AttackTest, EvictionBesidePublishingLosesNothingButWork) {
  Core core(root_, directory_.path());
  std::atomic<bool> enough = false;
  std::thread evictor([&] {
    Core other(root_, directory_.path());
    while (!enough) {
      // All but the newest look old.
      for (const cache::Entry& entry : other.objects->store().list()) {
        cache::support::set_age(entry.path, std::chrono::hours(2));
      }
      other.objects->store().prune(1 << 14);
    }
  });
  for (int round = 0; round < 40; ++round) {
    Core fresh(root_, directory_.path());
    for (int i = 0; i < 10; ++i) EXPECT_TRUE(fresh.is_right(i));
    EXPECT_EQ(fresh.objects->store().counters().damaged, 0U);
  }
  enough = true;
  evictor.join();
}

TEST_F(AttackTest, PrunesOnceADayAndAfterManyPublishes) {
  const auto stamp = root_ / "v1" / "pruned";
  Core first(root_, directory_.path());
  first.settings.cache_max_bytes = 1;
  const Found old = first.get(0);
  ASSERT_TRUE(fs::exists(stamp)) << "the days count from the first publish";
  cache::support::set_age(path_of(old), std::chrono::hours(2));
  Core same_day(root_, directory_.path());
  same_day.settings.cache_max_bytes = 1;
  same_day.get(1);
  EXPECT_TRUE(fs::exists(path_of(old))) << "somebody pruned today";
  cache::support::set_age(stamp, std::chrono::hours(25));
  Core next_day(root_, directory_.path());
  next_day.settings.cache_max_bytes = 1;
  next_day.get(2);
  EXPECT_FALSE(fs::exists(path_of(old)));
  EXPECT_EQ(next_day.objects->store().list().size(), 2U) << "what is young stays";
  const Found again = next_day.get(0);
  cache::support::set_age(path_of(again), std::chrono::hours(2));
  for (int i = 3; i < 65; ++i) next_day.get(i);
  EXPECT_FALSE(fs::exists(path_of(again))) << "64 publishes without a look at the limit";
}

TEST_F(AttackTest, ExactPolicyStillCompilesOnce) {
  Core any(root_, directory_.path());
  const Found found = any.get(0);
  // The same kernel by another compiler is all that is stored.
  const cache::Object foreign{found.object->header, std::string(found.object->payload)};
  any.objects->store().clear();
  any.objects->store().publish(found.key, "nvrtc-12.0-another", foreign);
  std::vector<std::thread> threads;
  std::atomic<int> compiles = 0;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      Core core(root_, directory_.path(), 50ms);
      core.settings.compiler_policy = "exact";
      core.get(0);
      compiles += static_cast<int>(core.statistics.compiles);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiles, 1);
}

// Runs `body` on a thread with the given stack.
void on_thread(std::size_t stack_bytes, std::function<void()> body) {
  pthread_attr_t attributes;
  ASSERT_EQ(::pthread_attr_init(&attributes), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&attributes, stack_bytes), 0);
  pthread_t thread{};
  ASSERT_EQ(::pthread_create(
                &thread, &attributes,
                [](void* argument) -> void* {
                  (*static_cast<std::function<void()>*>(argument))();
                  return nullptr;
                },
                &body),
            0);
  ::pthread_attr_destroy(&attributes);
  ASSERT_EQ(::pthread_join(thread, nullptr), 0);
}

TEST_F(AttackTest, CallerMayHaveASmallStack) {
  for (const bool cold : {true, false}) {
    bool right = false;
    on_thread(std::size_t{64} << 10, [&] {
      Core core(root_, directory_.path());
      right = core.is_right(0) && core.statistics.compiles == (cold ? 1U : 0U);
    });
    EXPECT_TRUE(right) << cold;
  }
}

TEST_F(AttackTest, FileSizeLimitMeansNotStored) {
  Core core(root_, directory_.path());
  const int code = cache::support::exit_code([&] {
    rlimit limit{1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::signal(SIGXFSZ, SIG_DFL);
    return core.is_right(0) && core.objects->store().counters().publish_failures == 1 ? 0 : 1;
  });
  EXPECT_EQ(code, 0) << "-1: killed by SIGXFSZ";
}

}  // namespace
}  // namespace torchkiln::jit
