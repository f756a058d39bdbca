// Compiling ahead for programs without Python; the command line counts and draws on its own.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/engine.h"

namespace torchkiln::jit {

// Request: "operators" (all when null), "dtypes" (all when null), "targets" (sm_90). Brings every default of every generic
// variant into the cache. Reply: how many were "compiled", "present" already or "failed", and "errors", each sentence
// once.
nlohmann::json warm(Engine& engine, const nlohmann::json& request);

}  // namespace torchkiln::jit
