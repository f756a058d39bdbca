// Where the engine's few sentences to people go: Python's logging once the control module has asked for it, else the
// standard error stream.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

namespace torchkiln::jit {

void warn(const std::string& sentence);
void set_warning_sink(std::function<void(const std::string&)> sink);

}  // namespace torchkiln::jit
