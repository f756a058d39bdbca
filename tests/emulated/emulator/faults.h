// Signals while a kernel runs: an access that must not be becomes a sentence, and a thread that spins lets others run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <csignal>
#include <cstddef>
#include <ctime>
#include <string>

namespace torchkiln::emulator {

// Whether the code that runs is the kernel's own.
extern thread_local volatile bool in_kernel;

// How long a launch may take before it fails; a minute unless set.
void set_patience(long milliseconds);
bool has_lasted_too_long();

// A guard page below a stack.
void watch_stack(const void* page, std::size_t bytes);

// For the time of a launch, on the thread that runs it. `fail` must not return; `switch_thread` returns when the thread's
// turn has come again. Only what interrupts a kernel's own code gets there; other faults go to whoever had them before.
class FaultWatch {
 public:
  using Fail = void (*)(const std::string& what);
  using Switch = void (*)();
  FaultWatch(Fail fail, Switch switch_thread);
  FaultWatch(const FaultWatch&) = delete;
  FaultWatch& operator=(const FaultWatch&) = delete;
  ~FaultWatch();

 private:
  timer_t timer_{};
};

}  // namespace torchkiln::emulator
