// The modification time of an object is its last use: nobody modifies an object.
// SPDX-License-Identifier: Apache-2.0
#include "cache/inventory.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace torchkiln::cache {
namespace {

constexpr std::chrono::hours kNeverYoungerThan{1};
constexpr std::chrono::hours kStampInterval{6};

bool same_version(const struct stat& a, const struct stat& b) {
  return a.st_ino == b.st_ino && a.st_mtim.tv_sec == b.st_mtim.tv_sec &&
         a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

enum class Removal { kRemoved, kKept, kGone };

// Looks again first: since the listing it may have been used, or replaced.
Removal remove_unless_changed(int objects, const StoredObject& object) {
  const Descriptor shard = open_directory(objects, object.shard);
  struct stat now{};
  if (!shard || ::fstatat(shard.get(), object.name.c_str(), &now, AT_SYMLINK_NOFOLLOW) != 0) {
    return Removal::kGone;
  }
  if (!same_version(now, object.status)) return Removal::kKept;
  if (::unlinkat(shard.get(), object.name.c_str(), 0) == 0) return Removal::kRemoved;
  return errno == ENOENT ? Removal::kGone : Removal::kKept;
}

void append_shard(int objects, const std::string& shard_name, std::vector<StoredObject>& found) {
  const Descriptor shard = open_directory(objects, shard_name);
  if (!shard) return;
  for (std::string& name : names_in(shard.get())) {
    auto id = parse_object_name(shard_name, name);
    struct stat status{};
    if (id && ::fstatat(shard.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        S_ISREG(status.st_mode)) {
      found.push_back({std::move(*id), shard_name, std::move(name), status});
    }
  }
}

}  // namespace

std::vector<StoredObject> stored_objects(int objects) {
  std::vector<StoredObject> found;
  for (const std::string& shard : names_in(objects)) append_shard(objects, shard, found);
  return found;
}

std::uint64_t remove_objects(int objects) {
  std::uint64_t freed = 0;
  for (const StoredObject& object : stored_objects(objects)) {
    // The directories stay: a writer may hold one open and is about to link into it.
    const Descriptor shard = open_directory(objects, object.shard);
    if (shard && ::unlinkat(shard.get(), object.name.c_str(), 0) == 0) freed += object.bytes();
  }
  return freed;
}

std::uint64_t remove_files(int directory) {
  std::uint64_t freed = 0;
  for (const std::string& name : names_in(directory)) {
    struct stat status{};
    if (::fstatat(directory, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        ::unlinkat(directory, name.c_str(), 0) == 0) {
      freed += static_cast<std::uint64_t>(status.st_blocks) * 512;
    }
  }
  return freed;
}

std::uint64_t remove_oldest(int objects, std::uint64_t limit_bytes, FileTime now) {
  auto found = stored_objects(objects);
  std::uint64_t total = 0;
  for (const StoredObject& object : found) total += object.bytes();
  if (total <= limit_bytes) return 0;

  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.used() < b.used(); });
  const std::uint64_t target = limit_bytes - limit_bytes / 5;
  const FileTime youngest = now - kNeverYoungerThan;
  std::uint64_t freed = 0;
  for (const StoredObject& object : found) {
    if (total <= target || object.used() > youngest) break;
    const Removal removal = remove_unless_changed(objects, object);
    if (removal != Removal::kKept) total -= object.bytes();
    if (removal == Removal::kRemoved) freed += object.bytes();
  }
  return freed;
}

void note_use(int directory, const std::string& name, const struct stat& status) {
  if (std::chrono::system_clock::now() - modified(status) < kStampInterval) return;
  ::utimensat(directory, name.c_str(), nullptr, AT_SYMLINK_NOFOLLOW);
}

}  // namespace torchkiln::cache
