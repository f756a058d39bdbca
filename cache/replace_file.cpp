// Temporary file beside the target, fsync, rename, fsync of the directory.
// SPDX-License-Identifier: Apache-2.0
#include "cache/replace_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

#include "cache/fault.h"
#include "cache/files.h"
#include "cache/names.h"

namespace torchkiln::cache {
namespace {

constexpr mode_t kReadableForAll = 0644;

// ".app.json.<host>-<pid>-<random>": hidden, and the sweeper knows whose it is.
std::string prefix_of(const std::filesystem::path& path) {
  return "." + path.filename().string() + ".";
}

void sweep(int directory, const std::string& prefix) {
  for (const std::string& name : names_in(directory)) {
    if (name.starts_with(prefix) && writer_is_gone(name.substr(prefix.size()))) {
      ::unlinkat(directory, name.c_str(), 0);
    }
  }
}

int fill(const Descriptor& file, std::string_view bytes) {
  if (const int error = fault_at("replacement_created")) return error;
  if (const int error = write_all(file.get(), bytes)) return error;
  if (::fchmod(file.get(), kReadableForAll) != 0) return errno;
  if (const int error = fault_at("replacement_written")) return error;
  // EINVAL: the file system has no fsync.
  return ::fsync(file.get()) == 0 || errno == EINVAL ? 0 : errno;
}

}  // namespace

int replace_file(const std::filesystem::path& path, std::string_view bytes) {
  const auto parent = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const Descriptor directory(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return directory.error();
  const std::string prefix = prefix_of(path);
  sweep(directory.get(), prefix);
  const std::string temporary = prefix + temporary_name();
  const Descriptor file = create_file(directory.get(), temporary);
  if (!file) return file.error();
  int error = fill(file, bytes);
  if (error == 0 && ::renameat(directory.get(), temporary.c_str(), directory.get(),
                               path.filename().c_str()) != 0) {
    error = errno;
  }
  if (error != 0) {
    ::unlinkat(directory.get(), temporary.c_str(), 0);
    return error;
  }
  fault_at("replaced");
  ::fsync(directory.get());
  return 0;
}

}  // namespace torchkiln::cache
