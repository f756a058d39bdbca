// What lies in the store, its space on disk and last use; and how it is made smaller.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cache/files.h"
#include "cache/names.h"

namespace torchkiln::cache {

struct StoredObject {
  ObjectId id;
  std::string shard;
  std::string name;
  struct stat status{};

  // On disk, which is what limits are about; small files take a whole block.
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(status.st_blocks) * 512; }
  FileTime used() const { return modified(status); }
};

// Regular files with a name of ours, in no particular order.
std::vector<StoredObject> stored_objects(int objects);

// All functions below return the bytes freed.
std::uint64_t remove_objects(int objects);
std::uint64_t remove_files(int directory);
// Does nothing up to the limit; above it removes the least recently used objects until 80 % of the
// limit are left, none used in the hour before `now` or, by the present state of the file, since it was listed. Several
// processes may do it at once.
std::uint64_t remove_oldest(int objects, std::uint64_t limit_bytes, FileTime now);

// Notes that the file was used; writes at most once in six hours. Errors do not matter.
void note_use(int directory, const std::string& name, const struct stat& status);

}  // namespace torchkiln::cache
