// Signal handlers, on a stack of their own.
// SPDX-License-Identifier: Apache-2.0
#include "tests/emulated/emulator/faults.h"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "tests/emulated/emulator/memory.h"

namespace torchkiln::emulator {

thread_local volatile bool in_kernel = false;

namespace {

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
constexpr int kTick = SIGVTALRM;
constexpr long kTickMilliseconds = 20;
constexpr std::size_t kHandlerStack = std::size_t{256} << 10;

std::array<struct sigaction, 64> previous;
FaultWatch::Fail fail_launch = nullptr;
FaultWatch::Switch switch_fiber = nullptr;
volatile long ticks = 0;
long patience = 60'000;

struct Page {
  const char* begin;
  const char* end;
};
std::vector<Page>& stack_pages() {
  static auto& pages = *new std::vector<Page>;
  return pages;
}

bool is_below_a_stack(const void* address) {
  const auto* at = static_cast<const char*>(address);
  return std::any_of(stack_pages().begin(), stack_pages().end(),
                     [at](const Page& page) { return page.begin <= at && at < page.end; });
}

const char* verb_of(const void* context) {
#if defined(__x86_64__)
  constexpr long long kWrite = 2;
  const auto* registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
  return (registers[REG_ERR] & kWrite) != 0 ? "writes" : "reads";
#else
  (void)context;
  return "reads or writes";
#endif
}

std::string sentence_of(int signal, const siginfo_t& facts, const void* context) {
  switch (signal) {
    case SIGFPE:
      return "divides by zero";
    case SIGILL:
    case SIGTRAP:
      return "uses an index outside of its array, or an address that is not aligned to its type";
    default:
      if (is_below_a_stack(facts.si_addr)) return "uses more local memory than its stack has";
      return std::string(verb_of(context)) + " " + describe(facts.si_addr);
  }
}

void hand_on(int signal, siginfo_t* facts, void* context) {
  const struct sigaction& before = previous[static_cast<std::size_t>(signal)];
  if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != nullptr) {
    before.sa_sigaction(signal, facts, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else {
    ::signal(signal, SIG_DFL);
    ::raise(signal);
  }
}

void on_fault(int signal, siginfo_t* facts, void* context) {
  if (!in_kernel) return hand_on(signal, facts, context);
  in_kernel = false;
  fail_launch(sentence_of(signal, *facts, context));
}

// On the stack of the fiber that it interrupts.
void on_tick(int) {
  ticks = ticks + 1;
  if (!in_kernel) return;
  in_kernel = false;
  switch_fiber();
  in_kernel = true;
}

// Handlers may not run on a stack that has overflowed.
void provide_handler_stack() {
  thread_local const auto memory = std::make_unique<char[]>(kHandlerStack);
  stack_t stack{};
  stack.ss_sp = memory.get();
  stack.ss_size = kHandlerStack;
  ::sigaltstack(&stack, nullptr);
}

void install_handlers() {
  for (const int signal : kFaults) {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    // A fault leaves its handler by a jump, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    ::sigaction(signal, &action, &previous[static_cast<std::size_t>(signal)]);
  }
  struct sigaction action{};
  action.sa_handler = on_tick;
  action.sa_flags = SA_NODEFER | SA_RESTART;
  ::sigaction(kTick, &action, nullptr);
}

}  // namespace

void set_patience(long milliseconds) { patience = milliseconds; }

bool has_lasted_too_long() { return ticks > patience / kTickMilliseconds; }

void watch_stack(const void* page, std::size_t bytes) {
  const auto* begin = static_cast<const char*>(page);
  stack_pages().push_back({begin, begin + bytes});
}

FaultWatch::FaultWatch(Fail fail, Switch switch_thread) {
  static std::once_flag once;
  std::call_once(once, install_handlers);
  provide_handler_stack();
  fail_launch = fail;
  switch_fiber = switch_thread;
  ticks = 0;
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = kTick;
  event._sigev_un._tid = static_cast<pid_t>(::syscall(SYS_gettid));
  // Time of this thread's own, so that nothing that runs beside it makes a launch look endless.
  if (::timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) != 0) {
    throw std::runtime_error("no timer could be created");
  }
  const timespec tick = {.tv_sec = 0, .tv_nsec = kTickMilliseconds * 1'000'000};
  const itimerspec time = {.it_interval = tick, .it_value = tick};
  ::timer_settime(timer_, 0, &time, nullptr);
}

FaultWatch::~FaultWatch() { ::timer_delete(timer_); }

}  // namespace torchkiln::emulator
