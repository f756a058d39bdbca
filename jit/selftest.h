// Active checks of the cache folder for `torchkiln doctor`: write, find, damage, heal, lock, in the real place.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/settings.h"

namespace torchkiln::jit {

// {"checks": [{"name", "ok", "fact"}]}; leaves nothing behind.
nlohmann::json test_store(const Settings& settings);

}  // namespace torchkiln::jit
