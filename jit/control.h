// Commands of the command line and the control module: JSON in, JSON out. None of them is on a hot path.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "jit/engine.h"

namespace torchkiln::jit {

// torchkiln_type of "float32" and the like; throws Error(VALUE).
std::vector<std::int64_t> parse_dtypes(const nlohmann::json& names);

// Throws Error; Error(VALUE) for an unknown command.
nlohmann::json control(Engine& engine, const std::string& command, const nlohmann::json& request);

// The values that a parameter is declared with: numbers, or names of types.
nlohmann::json values_to_json(const torchkiln_param& param);

}  // namespace torchkiln::jit
