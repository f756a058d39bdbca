// Where the store lives and whether that place can be trusted. Never the working directory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string>

#include "cache/files.h"

namespace torchkiln::cache {

struct Root {
  std::filesystem::path path;  // absolute; empty: memory only
  std::string refusal;  // why, in one sentence with a way out; set exactly when path is empty
};

// `configured` (the value of TORCHKILN_CACHE_DIR, may be empty), else $XDG_CACHE_HOME/torchkiln,
// else
// ~/.cache/torchkiln. Refused when it is relative or why_untrusted objects. Makes nothing.
Root resolve_root(const std::string& configured);

// Empty when nobody but us and root can change what lies at `root`: it and all its ancestors, as
// far as they exist, are owned by us or root and not writable by group or others. A sticky
// directory such as /tmp may stand above a 0700 directory of ours. The root itself may not be a
// symbolic link.
std::string why_untrusted(const std::filesystem::path& root);

enum class Missing { kFail, kMake };
// Opens the root after the test above, which is made again: what was missing at first may
// since have been put there by somebody else. EPERM when it cannot be trusted.
Descriptor open_root(const std::filesystem::path& root, Missing missing);

}  // namespace torchkiln::cache
