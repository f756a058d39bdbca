// The pool of compile threads: order, errors, fork, exit.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "jit/compile/pool.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

using namespace std::chrono_literals;

TEST(Pool, ReturnsValues) {
  CompilePool pool(2);
  EXPECT_EQ(pool.run(Priority::kInteractive, [] { return 41 + 1; }), 42);
  EXPECT_EQ(pool.submit(Priority::kPrewarm, [] { return std::string("x"); }).get(), "x");
  pool.run(Priority::kInteractive, [] {});
}

TEST(Pool, CarriesExceptions) {
  CompilePool pool(1);
  EXPECT_THROW(pool.run(Priority::kInteractive, []() -> int { throw std::runtime_error("x"); }),
               std::runtime_error);
  EXPECT_EQ(pool.run(Priority::kInteractive, [] { return 1; }), 1) << "the thread goes on";
}

TEST(Pool, InteractiveGoesFirst) {
  CompilePool pool(1);
  std::latch gate(1);
  auto blocker = pool.submit(Priority::kInteractive, [&] { gate.wait(); });
  std::string order;
  std::vector<std::shared_future<void>> futures;
  for (const char name : {'a', 'b'}) {
    futures.push_back(pool.submit(Priority::kPrewarm, [&order, name] { order += name; }));
  }
  for (const char name : {'1', '2'}) {
    futures.push_back(pool.submit(Priority::kInteractive, [&order, name] { order += name; }));
  }
  gate.count_down();
  for (const auto& future : futures) future.wait();
  EXPECT_EQ(order, "12ab");
}

TEST(Pool, StartsNoMoreThreadsThanJobs) {
  CompilePool pool(3);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::vector<std::shared_future<void>> futures;
  for (int i = 0; i < 64; ++i) {
    futures.push_back(pool.submit(Priority::kPrewarm, [&] {
      const std::scoped_lock lock(mutex);
      seen.insert(std::this_thread::get_id());
    }));
  }
  for (const auto& future : futures) future.get();
  EXPECT_LE(seen.size(), 3U);
  EXPECT_EQ(seen.count(std::this_thread::get_id()), 0U);
}

TEST(Pool, RunsJobsAtTheSameTime) {
  CompilePool pool(4);
  std::latch all(4);
  std::vector<std::shared_future<void>> futures;
  // Ends only if four threads meet.
  for (int i = 0; i < 4; ++i) {
    futures.push_back(pool.submit(Priority::kPrewarm, [&] { all.arrive_and_wait(); }));
  }
  for (const auto& future : futures) future.get();
}

TEST(Pool, ServesThirtyTwoCallers) {
  CompilePool pool(4);
  std::atomic<int> sum = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < 32; ++i) {
    callers.emplace_back([&, i] {
      for (int n = 0; n < 50; ++n) {
        const Priority priority = n % 2 == 0 ? Priority::kInteractive : Priority::kPrewarm;
        sum += pool.run(priority, [i] { return i; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 31 * 32 / 2 * 50);
}

TEST(Pool, WorkMaySubmitWork) {
  CompilePool pool(1);
  const int value = pool.run(Priority::kInteractive,
                             [&] { return pool.run(Priority::kInteractive, [] { return 7; }); });
  EXPECT_EQ(value, 7);
}

TEST(Pool, StacksAreLarge) {
  CompilePool pool(1);
  const std::size_t bytes = pool.run(Priority::kInteractive, [] {
    pthread_attr_t attributes;
    std::size_t size = 0;
    ::pthread_getattr_np(::pthread_self(), &attributes);
    ::pthread_attr_getstacksize(&attributes, &size);
    ::pthread_attr_destroy(&attributes);
    return size;
  });
  EXPECT_GE(bytes, std::size_t{16} << 20);
}

TEST(Pool, SignalsStayWithTheProgram) {
  CompilePool pool(1);
  const auto blocked = [] {
    sigset_t mask;
    ::pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    return std::pair(::sigismember(&mask, SIGINT), ::sigismember(&mask, SIGSEGV));
  };
  EXPECT_EQ(pool.run(Priority::kInteractive, blocked), std::pair(1, 0));
  EXPECT_EQ(blocked(), std::pair(0, 0)) << "the caller's mask is as before";
}

TEST(Pool, DestructionDropsWhatHasNotBegun) {
  std::latch begun(1);
  std::atomic<bool> finished = false;
  std::shared_future<void> running, waiting;
  {
    CompilePool pool(1);
    running = pool.submit(Priority::kInteractive, [&] {
      begun.count_down();
      std::this_thread::sleep_for(50ms);
      finished = true;
    });
    begun.wait();
    waiting = pool.submit(Priority::kInteractive, [] {});
  }
  EXPECT_TRUE(finished);
  EXPECT_NO_THROW(running.get());
  EXPECT_THROW(waiting.get(), Error);
}

TEST(Pool, JobsAreBounded) {
  EXPECT_GE(default_compile_jobs(), 1U);
  EXPECT_LE(default_compile_jobs(), 8U);
  EXPECT_EQ(CompilePool(5).jobs(), 5U);
  EXPECT_EQ(CompilePool().jobs(), default_compile_jobs());
}

// Runs `body` in a forked child, which ends with its result; 255 when it did not end by itself.
template <class Body>
int in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    ::_exit(body());
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

TEST(Pool, ForkedChildIsToldSo) {
  CompilePool pool(2);
  pool.run(Priority::kInteractive, [] {});
  std::latch gate(1);
  auto busy = pool.submit(Priority::kInteractive, [&] { gate.wait(); });
  EXPECT_EQ(in_child([&] {
              try {
                pool.run(Priority::kInteractive, [] {});
              } catch (const Error& error) {
                const std::string text = error.what();
                const bool said =
                    text.find("cannot compile in a forked child process") != text.npos &&
                    text.find("start workers by spawn") != text.npos;
                return error.kind() == TORCHKILN_ERROR_COMPILER && said ? 3 : 1;
              }
              return 2;
            }),
            3);
  gate.count_down();
  EXPECT_EQ(pool.run(Priority::kInteractive, [] { return 5; }), 5) << "the parent goes on";
}

TEST(Pool, ForkBeforeTheFirstWorkIsHarmless) {
  CompilePool pool(1);
  EXPECT_EQ(in_child([&] { return pool.run(Priority::kInteractive, [] { return 7; }); }), 7);
}

TEST(Pool, ExitWaitsForARunningJobAndDropsTheRest) {
  constexpr int kFinished = 9;
  EXPECT_EQ(in_child([] {
              static std::atomic<int> state = 0;
              // Registered before the pool's handler, so it runs after it.
              std::atexit([] { ::_exit(state == 2 ? kFinished : 1); });
              auto* pool = new CompilePool(1);  // never destroyed, as the engine's
              pool->submit(Priority::kInteractive, [] {
                state = 1;
                std::this_thread::sleep_for(200ms);
                state = 2;
              });
              pool->submit(Priority::kInteractive, [] { std::this_thread::sleep_for(1h); });
              while (state == 0) std::this_thread::sleep_for(1ms);
              std::exit(0);
              return 0;
            }),
            kFinished);
}

}  // namespace
}  // namespace torchkiln::jit
