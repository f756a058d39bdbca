// Where the engine's few sentences to people go: the sink that a program has set (Python's logging, for one), else the
// standard error stream.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

void log(torchkiln_log_level level, const std::string& sentence);
inline void warn(const std::string& sentence) { log(TORCHKILN_LOG_WARNING, sentence); }

// Null for the standard error stream. Returns when no thread is inside the sink before.
void set_log_sink(torchkiln_log_sink sink, void* context);

// Another thread's lock does not exist in the child.
void log_after_fork_in_child();

}  // namespace torchkiln::jit
