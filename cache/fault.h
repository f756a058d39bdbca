// Named points at which a test can stop or fail the store; one relaxed load each otherwise.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

namespace torchkiln::cache {

namespace testing {

// Returns 0 to go on, or the errno with which the step fails. May also never return (SIGKILL).
// A plain pointer: it has no destructor that could run before the last thread has published.
using FaultHook = int (*)(const char* step);
extern std::atomic<FaultHook> fault_hook;

}  // namespace testing

inline int fault_at(const char* step) {
  const testing::FaultHook hook = testing::fault_hook.load(std::memory_order_relaxed);
  return hook == nullptr ? 0 : hook(step);
}

}  // namespace torchkiln::cache
