// How recorded choices travel: as programs to compile, and as records inside bundles.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cache/bundle.h"
#include "jit/engine.h"

namespace torchkiln::jit {

// Adds the choices recorded for GPUs of these architectures to a list of specialisations with "operator" and "text":
// those of the same programs, each with the "arch" it is for.
void add_winners(Engine& engine, const std::vector<std::string>& architectures,
                 nlohmann::json& list);

// Adds the records whose choices are among the programs of a bundle ("specialization" and "target" each): without them a
// launch would not know what was chosen.
void add_records(Engine& engine, const nlohmann::json& items, cache::BundleObjects& objects);

// One object out of two with records of the same device and template.
std::string merge_records(const std::string& object, const cache::ObjectView& other);

}  // namespace torchkiln::jit
