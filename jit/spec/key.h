// The cache key: SHA-256 over typed, length-prefixed fields of everything that decides the machine code, and nothing
// else (no driver, path, time, user, GPU name or library version).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "jit/spec/specialization.h"

namespace torchkiln::jit {

// Raised whenever the meaning of a key changes; old objects are then never found.
inline constexpr int kKeySchema = 1;

// `options` are the canonical options (compile/options.h), the same for every NVRTC version.
std::string cache_key(const Specialization& specialization, const Target& target,
                      const std::string& template_digest, const std::vector<std::string>& options);

}  // namespace torchkiln::jit
