// File operations below an open directory: follows no link, trusts nothing others can write.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace torchkiln::cache {

// Owns a file descriptor, or remembers why there is none.
class Descriptor {
 public:
  Descriptor() = default;
  // Takes what open() and its relatives returned; must be called before errno changes.
  explicit Descriptor(int opened);
  static Descriptor failed(int error);
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();

  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }
  int error() const { return error_; }

 private:
  int fd_ = -1;
  int error_ = 0;
};

// Owned by this user or by root, and neither group nor others may write to it.
bool only_we_can_write(const struct stat& status);

// Fails with EPERM for a directory that others can write to, and with ENOTDIR for a symbolic link.
Descriptor open_directory(int parent, const std::string& name);
// The same, made first (0700 whatever the umask) when it is missing.
Descriptor make_directory(int parent, const std::string& name);

struct FileContents {
  std::string bytes;
  struct stat status{};
  int error = 0;        // the file is missing or cannot be read
  std::string refusal;  // the file must not be trusted: not regular, not ours, too long, cut short
};
FileContents read_file(int directory, const std::string& name, std::size_t max_bytes);

// A new file (0600 whatever the umask); EEXIST when the name is taken.
Descriptor create_file(int directory, const std::string& name);
// Writes at the start of an empty file; 0 or errno. EFBIG where RLIMIT_FSIZE would not let it fit: the signal that
// crossing the limit raises ends a program that does not know it.
int write_all(int fd, std::string_view bytes);

using FileTime = std::chrono::system_clock::time_point;
FileTime modified(const struct stat& status);
// Stamps the file `name`, made when it is missing, and returns the stamp: the present by the clock that stamps all files
// of `directory`. That of a file server may differ from ours by hours. Falls back to ours.
FileTime stamp(int directory, const std::string& name);

// Without "." and "..", in no particular order; empty when the directory cannot be read.
std::vector<std::string> names_in(int directory);

// "No space left on device"
std::string error_text(int error);

}  // namespace torchkiln::cache
