// Commands of the command line and the control module: JSON in, JSON out. None of them is on a hot path.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "jit/engine.h"

namespace torchkiln::jit {

// Throws Error; Error(VALUE) for an unknown command.
nlohmann::json control(Engine& engine, const std::string& command, const nlohmann::json& request);

}  // namespace torchkiln::jit
