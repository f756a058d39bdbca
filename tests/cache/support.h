// What the tests of cache/ share: directories that vanish, child processes, private mounts, keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "cache/fault.h"
#include "cache/sha256.h"
#include "cache/store.h"

namespace torchkiln::cache::support {

namespace fs = std::filesystem;

inline const std::string kCompiler = "nvrtc-13.0-0123456789abcdef-01234567";
inline const std::string kOtherCompiler = "nvrtc-12.8-fedcba9876543210-76543210";

// 0700, below the sticky /tmp: the case in which the store accepts a shared ancestor.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "torchkiln-test-XXXXXX").string();
    if (::mkdtemp(name.data()) != nullptr) path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    set(value);
  }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;
  ~ScopedVariable() { set(old_ ? old_->c_str() : nullptr); }

 private:
  void set(const char* value) {
    if (value != nullptr) {
      ::setenv(name_, value, 1);
    } else {
      ::unsetenv(name_);
    }
  }
  const char* name_;
  std::optional<std::string> old_;
};

class ScopedFault {
 public:
  explicit ScopedFault(testing::FaultHook hook) { testing::fault_hook = hook; }
  ScopedFault(const ScopedFault&) = delete;
  ScopedFault& operator=(const ScopedFault&) = delete;
  ~ScopedFault() { testing::fault_hook = nullptr; }
};

inline std::string key_of(const std::string& text) { return sha256_hex(text); }

inline Object object_with(const std::string& payload) { return {{{"registers", 32}}, payload}; }

// As publish writes it.
inline std::string encoded(const std::string& key, const std::string& compiler,
                           const std::string& payload) {
  return encode_object(Object{{{"key", key}, {"compiler", compiler}}, payload});
}

inline fs::path object_path(const fs::path& root, const std::string& key,
                            const std::string& compiler = kCompiler) {
  return root / "v1" / "objects" / key.substr(0, 2) / (key.substr(2) + "." + compiler + ".kernel");
}

inline void write_file(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline std::string read_bytes(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::size_t files_in(const fs::path& directory) {
  std::error_code none;
  std::size_t count = 0;
  for (auto at = fs::directory_iterator(directory, none); at != fs::directory_iterator(); ++at) {
    ++count;
  }
  return count;
}

inline mode_t mode_of(const fs::path& path) {
  struct stat status{};
  return ::lstat(path.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
}

inline void set_age(const fs::path& path, std::chrono::seconds age) {
  timespec when{};
  when.tv_sec = std::time(nullptr) - age.count();
  const timespec both[2] = {when, when};
  ::utimensat(AT_FDCWD, path.c_str(), both, AT_SYMLINK_NOFOLLOW);
}

// Runs `body` in a forked child, which exits with what it returns.
inline pid_t start_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  return child;
}

inline int wait_status(pid_t child) {
  int status = -1;
  ::waitpid(child, &status, 0);
  return status;
}

// Exit code, or -1 when the child was killed.
inline int exit_code(const std::function<int()>& body) {
  const int status = wait_status(start_child(body));
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// In the calling (child) process only: a tmpfs that nobody else sees and that dies with it.
inline bool mount_private_tmpfs(const fs::path& where, const char* options) {
  return ::unshare(CLONE_NEWNS) == 0 &&
         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", where.c_str(), "tmpfs", 0, options) == 0;
}

inline bool can_mount() {
  const TemporaryDirectory directory;
  return exit_code([&] { return mount_private_tmpfs(directory.path(), "mode=700") ? 0 : 1; }) == 0;
}

// Collects warnings.
struct Warnings {
  std::vector<std::string> texts;
  Store::Warn collector() {
    return [this](const std::string& text) { texts.push_back(text); };
  }
};

}  // namespace torchkiln::cache::support
