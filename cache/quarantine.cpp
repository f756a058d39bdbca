// Names in quarantine start with the time, so that their order is their age.
// SPDX-License-Identifier: Apache-2.0
#include "cache/quarantine.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "cache/files.h"

namespace torchkiln::cache {
namespace {

constexpr std::size_t kKept = 16;

// A directory in the place of an object is the other thing that can have been moved here.
int remove(int directory, const std::string& name) {
  const bool removed = ::unlinkat(directory, name.c_str(), 0) == 0 ||
                       ::unlinkat(directory, name.c_str(), AT_REMOVEDIR) == 0;
  return removed ? 0 : errno;
}

void keep_newest(int quarantine) {
  auto names = names_in(quarantine);
  if (names.size() <= kKept) return;
  std::sort(names.begin(), names.end());
  names.resize(names.size() - kKept);
  for (const std::string& name : names) remove(quarantine, name);
}

}  // namespace

int move_to_quarantine(int shard, const std::string& shard_name, const std::string& name,
                       const struct stat* judged, int quarantine) {
  struct stat now{};
  if (::fstatat(shard, name.c_str(), &now, AT_SYMLINK_NOFOLLOW) != 0) return errno;
  const bool same =
      judged == nullptr || (now.st_dev == judged->st_dev && now.st_ino == judged->st_ino);
  if (!same) return ENOENT;
  const auto time = std::chrono::system_clock::now().time_since_epoch();
  const auto stamp = std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  const std::string target = std::to_string(stamp) + '-' + shard_name + name;
  if (quarantine < 0 || ::renameat(shard, name.c_str(), quarantine, target.c_str()) != 0) {
    return remove(shard, name);
  }
  keep_newest(quarantine);
  return 0;
}

}  // namespace torchkiln::cache
