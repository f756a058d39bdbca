// Bad files are moved aside, where people but no look-up find them; only the newest are kept.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>

#include <string>

namespace torchkiln::cache {

// Moves `name` of `shard` into `quarantine` and keeps the 16 newest files there; where there is no
// room for that (or `quarantine` is -1) removes it, because a bad file would bar its name for ever.
// 0 or errno; ENOENT also when the name meanwhile belongs to another file than `judged` (nullptr: no comparison),
// because a sound one may have been published since.
int move_to_quarantine(int shard, const std::string& shard_name, const std::string& name,
                       const struct stat* judged, int quarantine);

}  // namespace torchkiln::cache
