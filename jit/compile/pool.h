// Threads for compiles, with stacks that NVRTC needs and the caller's thread may not have.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <type_traits>
#include <utility>

namespace torchkiln::jit {

enum class Priority {
  kInteractive,  // somebody waits for this kernel
  kPrewarm,      // runs when nobody does
};

// Thread-safe. Threads start with the first work. In a forked child of a process whose threads had
// started every call throws Error(COMPILER): they do not exist there, and NVRTC's locks may be held
// by one that does not exist either.
//
// At exit of the process work that has not begun is dropped, and a running compile is waited for (a
// few seconds at most, then its thread is abandoned): NVRTC must not run while its own exit handlers
// do.
class CompilePool {
 public:
  // 0: by cores and free memory.
  explicit CompilePool(unsigned jobs = 0);
  CompilePool(const CompilePool&) = delete;
  CompilePool& operator=(const CompilePool&) = delete;
  // Drops what has not begun (its futures throw Error(COMPILER)) and waits for what has.
  ~CompilePool();

  // Exceptions of `work` travel through the future. Called from a thread of the pool, it runs at
  // once: waiting for itself would never end.
  template <class Work>
  auto submit(Priority priority, Work work) -> std::shared_future<std::invoke_result_t<Work&>> {
    using Value = std::invoke_result_t<Work&>;
    auto promise = std::make_shared<std::promise<Value>>();
    auto future = promise->get_future().share();
    enqueue(priority, {.run =
                           [promise, work = std::move(work)]() mutable {
                             try {
                               if constexpr (std::is_void_v<Value>) {
                                 work();
                                 promise->set_value();
                               } else {
                                 promise->set_value(work());
                               }
                             } catch (...) {
                               promise->set_exception(std::current_exception());
                             }
                           },
                       .drop = [promise](std::exception_ptr why) { promise->set_exception(why); }});
    return future;
  }

  // Submits and waits.
  template <class Work>
  auto run(Priority priority, Work work) {
    return submit(priority, std::move(work)).get();
  }

  // What exit does, for who knows earlier that the process will end: from here on nothing compiles.
  void stop_for_exit();

  unsigned jobs() const { return jobs_; }

  struct Task {
    std::function<void()> run;                     // does not throw
    std::function<void(std::exception_ptr)> drop;  // instead of run
  };
  struct State;

 private:
  void enqueue(Priority priority, Task task);

  unsigned jobs_;
  // Shared with the threads: an abandoned one may outlive the pool.
  std::shared_ptr<State> state_;
};

// At least 1, at most 8: beyond that NVRTC gains little and memory runs out (250 MB a compile).
unsigned default_compile_jobs();

// For a thread of a pool, after its work has registered an exit handler: the pool's must be younger,
// or it would run later. Does nothing on other threads.
void renew_exit_handler();

// Bytes that RLIMIT_AS still allows this process to map; very many without a limit.
std::uint64_t free_address_space();

}  // namespace torchkiln::jit
