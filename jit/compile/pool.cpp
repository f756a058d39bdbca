// The queue, its threads, fork and exit.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/pool.h"

#include <cxxabi.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "jit/error.h"

// The handle of this library, for exit handlers; from the C++ ABI.
extern "C" __attribute__((visibility("hidden"))) void* __dso_handle;

namespace torchkiln::jit {

struct CompilePool::State {
  std::mutex mutex;  // guards all below but `owner`
  std::condition_variable work_or_stop;
  std::condition_variable fewer_running;
  std::array<std::deque<Task>, 2> queues;  // by priority
  unsigned threads = 0;
  unsigned idle = 0;
  unsigned running = 0;
  bool stopped = false;
  bool exit_handler_after_work = false;
  // Process whose threads these are; 0 before the first. Atomic because a forked child must not
  // touch the mutex, which may be locked for ever there.
  std::atomic<pid_t> owner{0};
};

namespace {

using State = CompilePool::State;
using Task = CompilePool::Task;

constexpr std::size_t kStackBytes = std::size_t{16} << 20;  // NVRTC crashes with 256 KB
constexpr std::uint64_t kPlenty = std::uint64_t{1} << 40;
constexpr unsigned kMostJobs = 8;
constexpr std::uint64_t kBytesPerJob = std::uint64_t{250} << 20;
constexpr auto kPatienceAtExit = std::chrono::seconds(5);

thread_local bool is_pool_thread = false;
thread_local const std::shared_ptr<CompilePool::State>* state_of_thread = nullptr;

Error exiting() {
  return Error(TORCHKILN_ERROR_COMPILER,
               "compiler: the process must keep running to compile a kernel; got a compile request "
               "while it is exiting.");
}

Error forked() {
  return Error(TORCHKILN_ERROR_COMPILER,
               "compiler: a kernel that is not in the cache cannot compile in a forked child "
               "process: the compile threads of its parent do not exist here. Warm it before the "
               "fork, or start workers by spawn.");
}

bool was_forked(const State& state) {
  const pid_t owner = state.owner.load();
  return owner != 0 && owner != ::getpid();
}

std::deque<Task> stop(State& state) {
  std::deque<Task> dropped;
  {
    const std::scoped_lock lock(state.mutex);
    state.stopped = true;
    for (auto& queue : state.queues) {
      std::move(queue.begin(), queue.end(), std::back_inserter(dropped));
      queue.clear();
    }
  }
  state.work_or_stop.notify_all();
  return dropped;
}

void stop_and_wait(State& state) {
  if (was_forked(state) || is_pool_thread) return;
  // Never freed: that would wake whoever waits for the dropped work, into a process that is being
  // taken down.
  new std::deque<Task>(stop(state));
  std::unique_lock lock(state.mutex);
  state.fewer_running.wait_for(lock, kPatienceAtExit, [&] { return state.running == 0; });
}

// NVRTC registers exit handlers of its own during its first compile, and they would run before
// any that we registered earlier. But exit() destroys the thread-local objects of its thread before
// it runs any handler; and that thread is the main one, nearly always.
struct MainThreadGuard {
  std::vector<std::weak_ptr<State>> pools;

  ~MainThreadGuard() {
    for (const auto& pool : pools) {
      if (const auto state = pool.lock()) stop_and_wait(*state);
    }
  }
};
thread_local MainThreadGuard main_thread_guard;

void guard_main_thread(const std::shared_ptr<State>& state) {
  if (::syscall(SYS_gettid) != ::getpid()) return;
  auto& pools = main_thread_guard.pools;
  const auto same = [&](const std::weak_ptr<State>& pool) { return pool.lock() == state; };
  std::erase_if(pools, [](const std::weak_ptr<State>& pool) { return pool.expired(); });
  if (std::none_of(pools.begin(), pools.end(), same)) pools.push_back(state);
}

// For an exit() of another thread, or where the main thread never met the pool. Runs in exit();
// `argument` is a shared_ptr that is never freed, so it is safe to come late.
void stop_at_exit(void* argument) {
  stop_and_wait(**static_cast<std::shared_ptr<State>*>(argument));
}

// Handlers run in reverse order: only one that is younger than NVRTC's own runs before them.
void register_exit_handler(const std::shared_ptr<State>& state) {
  abi::__cxa_atexit(&stop_at_exit, new std::shared_ptr<State>(state), &__dso_handle);
}

// Interactive work first, oldest first.
std::deque<Task>* next_queue(State& state) {
  for (auto& queue : state.queues) {
    if (!queue.empty()) return &queue;
  }
  return nullptr;
}

void work(const std::shared_ptr<State>& state) {
  is_pool_thread = true;
  state_of_thread = &state;
  std::unique_lock lock(state->mutex);
  for (;;) {
    std::deque<Task>* queue = nullptr;
    ++state->idle;
    state->work_or_stop.wait(
        lock, [&] { return (queue = next_queue(*state)) != nullptr || state->stopped; });
    --state->idle;
    if (queue == nullptr) break;
    Task task = std::move(queue->front());
    queue->pop_front();
    ++state->running;
    lock.unlock();
    task.run();
    task = {};  // what it captured dies before the next wait
    lock.lock();
    --state->running;
    if (!state->exit_handler_after_work && !state->stopped) {
      state->exit_handler_after_work = true;
      register_exit_handler(state);
    }
    state->fewer_running.notify_all();
  }
  --state->threads;
  state->fewer_running.notify_all();
}

void* thread_main(void* argument) {
  const std::unique_ptr<std::shared_ptr<State>> state(
      static_cast<std::shared_ptr<State>*>(argument));
  work(*state);
  return nullptr;
}

// Signals belong to the program's own threads: Python's Ctrl-C must not land in a compile. Faults
// stay deliverable, for crash handlers.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    ::sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP})
      ::sigdelset(&all, fault);
    ::pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

// Under the mutex. False when the system gives no thread.
bool start_thread(const std::shared_ptr<State>& state) {
  const SignalsBlocked inherited;
  pthread_attr_t attributes;
  if (::pthread_attr_init(&attributes) != 0) return false;
  ::pthread_attr_setstacksize(&attributes, kStackBytes);
  ::pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  auto argument = std::make_unique<std::shared_ptr<State>>(state);
  pthread_t thread{};
  const bool started = ::pthread_create(&thread, &attributes, &thread_main, argument.get()) == 0;
  ::pthread_attr_destroy(&attributes);
  if (!started) return false;
  static_cast<void>(argument.release());  // the thread's now
  ++state->threads;
  return true;
}

// The first number of a file, or `otherwise`; "max" in a cgroup file is no number.
std::uint64_t number_in(const char* path, const std::string& label, std::uint64_t otherwise) {
  std::ifstream file(path);
  std::string word;
  while (!label.empty() && file >> word && word != label) {
  }
  std::uint64_t value = 0;
  return file >> value ? value : otherwise;
}

std::uint64_t free_memory() {
  const std::uint64_t machine = number_in("/proc/meminfo", "MemAvailable:", kPlenty >> 10) << 10;
  const std::uint64_t limit = number_in("/sys/fs/cgroup/memory.max", "", kPlenty);
  const std::uint64_t used = number_in("/sys/fs/cgroup/memory.current", "", 0);
  return std::min({machine, limit > used ? limit - used : 0, free_address_space()});
}

}  // namespace

void renew_exit_handler() {
  if (state_of_thread != nullptr) register_exit_handler(*state_of_thread);
}

std::uint64_t free_address_space() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kPlenty;
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t used = number_in("/proc/self/statm", "", 0) * page;
  return limit.rlim_cur > used ? limit.rlim_cur - used : 0;
}

unsigned default_compile_jobs() {
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  const std::uint64_t by_memory = std::max<std::uint64_t>(1, free_memory() / kBytesPerJob);
  return static_cast<unsigned>(std::min<std::uint64_t>({cores, kMostJobs, by_memory}));
}

CompilePool::CompilePool(unsigned jobs)
    : jobs_(jobs == 0 ? default_compile_jobs() : jobs), state_(std::make_shared<State>()) {
  guard_main_thread(state_);
}

CompilePool::~CompilePool() {
  if (was_forked(*state_)) return;
  for (const Task& task : stop(*state_)) task.drop(std::make_exception_ptr(exiting()));
  std::unique_lock lock(state_->mutex);
  state_->fewer_running.wait(lock, [&] { return state_->threads == 0; });
}

void CompilePool::stop_for_exit() { stop_and_wait(*state_); }

void CompilePool::enqueue(Priority priority, Task task) {
  if (was_forked(*state_)) throw forked();
  if (is_pool_thread) return task.run();
  guard_main_thread(state_);
  std::unique_lock lock(state_->mutex);
  if (state_->stopped) throw exiting();
  if (state_->owner.load() == 0) {
    state_->owner.store(::getpid());
    register_exit_handler(state_);
  }
  auto& queue = state_->queues[priority == Priority::kInteractive ? 0 : 1];
  queue.push_back(std::move(task));
  const std::size_t waiting = state_->queues[0].size() + state_->queues[1].size();
  if (waiting > state_->idle && state_->threads < jobs_ && !start_thread(state_) &&
      state_->threads == 0) {
    queue.pop_back();
    throw Error(TORCHKILN_ERROR_COMPILER,
                "compiler: a thread with a stack of 16 MB must start to compile a kernel; got none "
                "from the system. Raise the limit on threads or memory (ulimit -u, ulimit -v).");
  }
  lock.unlock();
  state_->work_or_stop.notify_one();
}

}  // namespace torchkiln::jit
