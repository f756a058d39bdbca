// Thin layer over openat and its relatives; short reads, short writes and EINTR end here.
// SPDX-License-Identifier: Apache-2.0
#include "cache/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>
#include <utility>

#include "cache/fault.h"

namespace torchkiln::cache {
namespace {

constexpr mode_t kDirectoryMode = 0700;
constexpr mode_t kFileMode = 0600;
constexpr mode_t kWritableByOthers = S_IWGRP | S_IWOTH;
// Small enough that a test can stop a writer in the middle of a file.
constexpr std::size_t kWriteChunkBytes = std::size_t{64} << 10;

std::string refusal_of(const struct stat& status, std::size_t max_bytes) {
  if (!S_ISREG(status.st_mode)) return "it is not a regular file";
  if (!only_we_can_write(status)) return "another user owns it or may write to it";
  if (static_cast<std::size_t>(status.st_size) > max_bytes) return "it is longer than allowed";
  return {};
}

// Fills `bytes`; returns how many there were, or -1 with errno.
ssize_t read_up_to(int fd, std::string& bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = ::read(fd, bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return static_cast<ssize_t>(done);
}

}  // namespace

Descriptor::Descriptor(int opened) : fd_(opened), error_(opened < 0 ? errno : 0) {}

Descriptor Descriptor::failed(int error) {
  Descriptor none;
  none.error_ = error;
  return none;
}

Descriptor::Descriptor(Descriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), error_(other.error_) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(error_, other.error_);
  return *this;
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

bool only_we_can_write(const struct stat& status) {
  return (status.st_uid == ::geteuid() || status.st_uid == 0) &&
         (status.st_mode & kWritableByOthers) == 0;
}

Descriptor open_directory(int parent, const std::string& name) {
  Descriptor directory(
      ::openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!directory) return directory;
  struct stat status{};
  if (::fstat(directory.get(), &status) != 0) return Descriptor::failed(errno);
  return only_we_can_write(status) ? std::move(directory) : Descriptor::failed(EPERM);
}

Descriptor make_directory(int parent, const std::string& name) {
  if (::mkdirat(parent, name.c_str(), kDirectoryMode) == 0) {
    // A umask such as 0777 would lock us out of our own directory.
    if (::fchmodat(parent, name.c_str(), kDirectoryMode, 0) != 0) return Descriptor::failed(errno);
  } else if (errno != EEXIST) {
    // Some read-only file systems say EROFS even when the directory is there.
    const int error = errno;
    Descriptor existing = open_directory(parent, name);
    return existing ? std::move(existing) : Descriptor::failed(error);
  }
  return open_directory(parent, name);
}

FileContents read_file(int directory, const std::string& name, std::size_t max_bytes) {
  FileContents contents;
  // O_NONBLOCK: opening a FIFO that somebody put there must not hang. Regular files ignore it.
  const Descriptor file(
      ::openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file.error() == ELOOP) {
    contents.refusal = "it is a symbolic link";
    return contents;
  }
  contents.error = file ? fault_at("read") : file.error();
  if (contents.error == 0 && ::fstat(file.get(), &contents.status) != 0) contents.error = errno;
  if (contents.error != 0) return contents;

  contents.refusal = refusal_of(contents.status, max_bytes);
  if (!contents.refusal.empty()) return contents;
  contents.bytes.resize(static_cast<std::size_t>(contents.status.st_size));
  const ssize_t got = read_up_to(file.get(), contents.bytes);
  if (got < 0) {
    contents.error = errno;
  } else if (static_cast<std::size_t>(got) != contents.bytes.size()) {
    contents.refusal = "it became shorter while it was read";
  }
  return contents;
}

Descriptor create_file(int directory, const std::string& name) {
  Descriptor file(::openat(directory, name.c_str(),
                           O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, kFileMode));
  if (file) ::fchmod(file.get(), kFileMode);
  return file;
}

int write_all(int fd, std::string_view bytes) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && bytes.size() > limit.rlim_cur) return EFBIG;
  while (!bytes.empty()) {
    if (const int error = fault_at("write")) return error;
    const ssize_t written =
        ::write(fd, bytes.data(), std::min<std::size_t>(bytes.size(), kWriteChunkBytes));
    if (written < 0 && errno != EINTR) return errno;
    if (written == 0) return EIO;  // not even an error: asking again might never end
    if (written > 0) bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return 0;
}

FileTime modified(const struct stat& status) {
  const auto since_epoch = std::chrono::seconds(status.st_mtim.tv_sec) +
                           std::chrono::nanoseconds(status.st_mtim.tv_nsec);
  return FileTime(std::chrono::duration_cast<FileTime::duration>(since_epoch));
}

FileTime stamp(int directory, const std::string& name) {
  const Descriptor file(::openat(directory, name.c_str(),
                                 O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC,
                                 kFileMode));
  struct stat status{};
  const bool stamped = file && ::futimens(file.get(), nullptr) == 0 &&
                       ::fchmod(file.get(), kFileMode) == 0 && ::fstat(file.get(), &status) == 0;
  return stamped ? modified(status) : std::chrono::system_clock::now();
}

std::vector<std::string> names_in(int directory) {
  // A descriptor of its own: the read position belongs to the open file, not to the number.
  const int fd = ::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return {};
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(fd), &::closedir);
  if (!stream) {
    ::close(fd);
    return {};
  }
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(stream.get())) {
    const std::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
  }
  return names;
}

std::string error_text(int error) { return std::generic_category().message(error); }

}  // namespace torchkiln::cache
