// Compiling ahead for programs without Python; the command line counts and draws on its own.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/engine.h"

namespace torchkiln::jit {

// Request: "targets" (sm_90), and "manifests", files of what programs used, or "operators" (all when null) with "dtypes"
// (all when null): every default of every generic variant. Brings them into the cache. Reply: how many were "compiled", "present" already or "failed", and "errors", each sentence
// once.
nlohmann::json warm(Engine& engine, const nlohmann::json& request);

}  // namespace torchkiln::jit
