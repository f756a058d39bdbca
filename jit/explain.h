// `explain` and `dump`: which machine code an operator would run, from where and why; and that code in files.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/engine.h"

namespace torchkiln::jit {

// Request: "operator"; "target" (sm_90), or "device" (0); "dtypes"; "values", texts by name, of static parameters and
// sizes. Reply: "kernels", one row for each specialisation. Compiles nothing.
nlohmann::json explain(Engine& engine, const nlohmann::json& request);

// Request: "device", or "target" for one that is not here. Reply: "rungs" with target and reason, and "explanation".
nlohmann::json explain_ladder(Engine& engine, const nlohmann::json& request);

// Request: "specialization", "target", "folder" (absolute), "what" (source, ptx, cubin). Writes a folder for the
// specialisation; reply: "folder", "files" by what, and the facts of its machine code. Compiles what is in no layer.
nlohmann::json dump(Engine& engine, const nlohmann::json& request);

}  // namespace torchkiln::jit
