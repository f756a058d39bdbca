// Options of a compile: the canonical ones, which are part of the cache key, and the flags that one
// NVRTC gets for them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "jit/settings.h"
#include "jit/spec/specialization.h"

namespace torchkiln::jit {

// The same for every NVRTC, so that the key does not depend on which one is installed.
std::vector<std::string> canonical_options(const Settings& settings);

// `embedded`: nothing but templates of ours. `version` is 13050 for 13.5. `key` seeds the names that
// NVRTC makes up, so that equal keys give equal bytes. Throws Error(INTERNAL) for a canonical option
// that is not in the table.
std::vector<std::string> nvrtc_options(const std::vector<std::string>& canonical,
                                       const Target& target, bool embedded, int version,
                                       const std::string& key);

}  // namespace torchkiln::jit
