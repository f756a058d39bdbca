// Temporary file, fsync, link, fsync of the directory. link() decides who is first.
// SPDX-License-Identifier: Apache-2.0
#include "cache/publish.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "cache/fault.h"
#include "cache/files.h"
#include "cache/names.h"

namespace torchkiln::cache {
namespace {

constexpr std::chrono::seconds kDeadWriterAge = std::chrono::hours(1);
constexpr std::chrono::seconds kAnyWriterAge = std::chrono::hours(24);

// Removes its name when it goes out of scope, unless the name was given away by a rename.
class Temporary {
 public:
  explicit Temporary(int directory)
      : directory_(directory), name_(temporary_name()), file_(create_file(directory, name_)) {}
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    if (file_ && named_) ::unlinkat(directory_, name_.c_str(), 0);
  }

  int fill(std::string_view bytes) const {
    // EEXIST would read as "somebody has published this", which it does not mean here.
    if (!file_) return file_.error() == EEXIST ? EAGAIN : file_.error();
    if (const int error = fault_at("tmp_created")) return error;
    if (const int error = write_all(file_.get(), bytes)) return error;
    if (const int error = fault_at("tmp_written")) return error;
    // EINVAL: the file system has no fsync. The digest finds what a power cut would leave then.
    if (::fsync(file_.get()) != 0 && errno != EINVAL) return errno;
    return fault_at("tmp_synced");
  }

  int link_as(int target, const std::string& name) const {
    if (const int error = fault_at("link")) return error;
    return ::linkat(directory_, name_.c_str(), target, name.c_str(), 0) == 0 ? 0 : errno;
  }

  // For file systems without hard links. A plain rename would replace a file that somebody may have
  // published in between: harmless, both are whole objects of the same key.
  int rename_to(int target, const std::string& name) {
    int error = 0;
    if (::renameat2(directory_, name_.c_str(), target, name.c_str(), RENAME_NOREPLACE) != 0) {
      error = errno;
    }
    if (error == EINVAL || error == ENOSYS) {
      if (::faccessat(target, name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) return EEXIST;
      error = ::renameat(directory_, name_.c_str(), target, name.c_str()) == 0 ? 0 : errno;
    }
    named_ = error != 0;
    return error;
  }

 private:
  int directory_;
  std::string name_;
  Descriptor file_;
  bool named_ = true;
};

bool has_no_hard_links(int link_error) {
  return link_error == EPERM || link_error == EOPNOTSUPP || link_error == ENOSYS ||
         link_error == EMLINK;
}

}  // namespace

int publish_file(int temporary_directory, int target_directory, const std::string& name,
                 std::string_view bytes) {
  {
    Temporary temporary(temporary_directory);
    if (const int error = temporary.fill(bytes)) return error;
    int error = temporary.link_as(target_directory, name);
    if (has_no_hard_links(error)) error = temporary.rename_to(target_directory, name);
    if (error != 0) return error;
    fault_at("linked");
  }
  fault_at("tmp_unlinked");
  // Should this fail, the object is still whole and visible; a power cut may merely lose it.
  ::fsync(target_directory);
  fault_at("directory_synced");
  return 0;
}

void sweep_temporaries(int temporary_directory) {
  struct stat directory{};
  if (::fstat(temporary_directory, &directory) != 0) return;
  const FileTime now = modified(directory);
  for (const std::string& name : names_in(temporary_directory)) {
    struct stat status{};
    if (::fstatat(temporary_directory, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
    const auto age = now - modified(status);
    if (age > kAnyWriterAge || (age > kDeadWriterAge && writer_is_gone(name))) {
      ::unlinkat(temporary_directory, name.c_str(), 0);
    }
  }
}

}  // namespace torchkiln::cache
