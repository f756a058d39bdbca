// The one variable behind the fault points.
// SPDX-License-Identifier: Apache-2.0
#include "cache/fault.h"

namespace torchkiln::cache::testing {

std::atomic<FaultHook> fault_hook = nullptr;

}  // namespace torchkiln::cache::testing
