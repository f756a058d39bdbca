// Choice of the root, and a walk that examines every directory which could redirect its path.
// SPDX-License-Identifier: Apache-2.0
#include "cache/root.h"

#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace torchkiln::cache {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxLinks = 40;  // as the kernel (path_resolution(7))
constexpr const char* kAnotherRoot = "set TORCHKILN_CACHE_DIR to a private directory of yours";

std::string absolute_variable(const char* name) {
  const char* value = ::secure_getenv(name);
  return value != nullptr && value[0] == '/' ? value : "";
}

std::string home_in_passwd() {
  std::vector<char> buffer(std::size_t{16} << 10);
  passwd entry{};
  passwd* found = nullptr;
  if (::getpwuid_r(::geteuid(), &entry, buffer.data(), buffer.size(), &found) != 0) return {};
  return found != nullptr && found->pw_dir != nullptr ? found->pw_dir : "";
}

// A home that does not exist is not made: service accounts have one on purpose.
fs::path home_directory() {
  for (const std::string& home : {absolute_variable("HOME"), home_in_passwd()}) {
    std::error_code ignored;
    if (!home.empty() && home[0] == '/' && fs::is_directory(home, ignored)) return home;
  }
  return {};
}

fs::path without_trailing_slash(const fs::path& path) {
  const fs::path normal = path.lexically_normal();
  return normal.has_filename() ? normal : normal.parent_path();
}

// Follows one path from "/" down and examines each directory on it. Symbolic links above the root
// (a home directory on another disk is often one) are followed by hand for that reason.
class Walk {
 public:
  explicit Walk(const fs::path& root) : root_(root) { put_in_front(root.native()); }

  // Empty, or why the path cannot be trusted.
  std::string refusal() {
    std::string why = examine("/");
    while (why.empty() && !pending_.empty() && !missing_) {
      const std::string name = std::move(pending_.back());
      pending_.pop_back();
      why = step(name);
    }
    if (!why.empty() || missing_ || exposed_.empty()) return why;
    return root_.string() + " lies below " + exposed_ +
           ", which all users share, and is not private; run 'chmod 700 " + root_.string() +
           "' or " + kAnotherRoot;
  }

 private:
  // By hand: every look-up walks, and an iterator of a path makes a path of each name.
  void put_in_front(std::string_view path) {
    while (!path.empty()) {
      const std::size_t name = path.rfind('/') + 1;  // 0 without a slash
      if (name < path.size()) pending_.emplace_back(path.substr(name));
      path = path.substr(0, name == 0 ? 0 : name - 1);
    }
  }

  std::string step(const std::string& name) {
    if (name.empty() || name == ".") return {};
    if (name == "..") {
      at_.resize(at_.empty() ? 0 : at_.rfind('/'));
      return {};
    }
    struct stat status{};
    const std::string next = at_ + '/' + name;
    if (::lstat(next.c_str(), &status) == 0) {
      if (S_ISLNK(status.st_mode)) return follow(next, status);
      at_ = next;
      return judge(next, status);
    }
    return examine(next);
  }

  std::string follow(const std::string& link, const struct stat& status) {
    if (pending_.empty()) {
      return link + " is a symbolic link; give the directory it points to, or " + kAnotherRoot;
    }
    if (!owner_is_trusted(status)) return foreign(link);
    std::error_code error;
    const fs::path target = fs::read_symlink(link, error);
    if (error || ++links_ > kMaxLinks) {
      return link + " cannot be followed; " + kAnotherRoot;
    }
    if (target.is_absolute()) at_.clear();
    put_in_front(target.native());
    return {};
  }

  std::string examine(const std::string& directory) {
    struct stat status{};
    if (::lstat(directory.c_str(), &status) == 0) return judge(directory, status);
    missing_ = errno == ENOENT;  // whatever is missing will be made by us, 0700
    if (missing_) return {};
    return directory + " cannot be used (" + error_text(errno) + "); " + kAnotherRoot;
  }

  std::string judge(const std::string& directory, const struct stat& status) {
    if (!S_ISDIR(status.st_mode)) return directory + " is not a directory; " + kAnotherRoot;
    if (!owner_is_trusted(status)) return foreign(directory);
    if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) return examine_shared(directory, status);
    const bool is_private = (status.st_mode & (S_IRWXG | S_IRWXO)) == 0;
    if (status.st_uid == user_ && is_private) exposed_.clear();
    return {};
  }

  // In a sticky directory nobody can rename what is ours, so it is harmless above a directory of
  // ours.
  std::string examine_shared(const std::string& directory, const struct stat& status) {
    if (pending_.empty() || (status.st_mode & S_ISVTX) == 0) {
      return directory + " is writable by other users; run 'chmod go-w " + directory + "' or " +
             kAnotherRoot;
    }
    exposed_ = directory;
    return {};
  }

  bool owner_is_trusted(const struct stat& status) const {
    return status.st_uid == user_ || status.st_uid == 0;
  }

  static std::string foreign(const std::string& path) {
    return path + " belongs to another user; " + kAnotherRoot;
  }

  const uid_t user_ = ::geteuid();
  const fs::path& root_;
  std::vector<std::string> pending_;  // names still to walk, from at_ on; the next one last
  std::string at_;                    // without the slash at the end
  std::string exposed_;  // last sticky directory that has no private directory of ours below it yet
  bool missing_ = false;
  int links_ = 0;
};

int make_with_ancestors(const fs::path& directory) {
  fs::path at = "/";
  for (const fs::path& name : directory.relative_path()) {
    at /= name;
    if (::mkdir(at.c_str(), 0700) == 0) {
      ::chmod(at.c_str(), 0700);  // see make_directory: the umask may have taken our own bits
      continue;
    }
    // Not only EEXIST: a read-only file system may say EROFS about a directory that is there.
    const int error = errno;
    struct stat status{};
    if (error != EEXIST && ::stat(at.c_str(), &status) != 0) return error;
  }
  return 0;
}

}  // namespace

Root resolve_root(const std::string& configured) {
  fs::path chosen;
  if (!configured.empty()) {
    chosen = configured;
    if (!chosen.is_absolute()) {
      return {{},
              "the cache directory '" + configured +
                  "' is relative to the working directory; set TORCHKILN_CACHE_DIR to an "
                  "absolute path"};
    }
  } else if (const std::string base = absolute_variable("XDG_CACHE_HOME"); !base.empty()) {
    chosen = fs::path(base) / "torchkiln";
  } else if (const fs::path home = home_directory(); !home.empty()) {
    chosen = home / ".cache" / "torchkiln";
  } else {
    return {{}, std::string("this user has no home directory; ") + kAnotherRoot};
  }
  chosen = without_trailing_slash(chosen);
  std::string refusal = why_untrusted(chosen);
  if (!refusal.empty()) return {{}, std::move(refusal)};
  return {std::move(chosen), {}};
}

std::string why_untrusted(const fs::path& root) { return Walk(root).refusal(); }

Descriptor open_root(const fs::path& root, Missing missing) {
  const auto untrusted = [&root] { return !why_untrusted(root).empty(); };
  if (untrusted()) return Descriptor::failed(EPERM);
  Descriptor opened = open_directory(AT_FDCWD, root);
  if (opened || opened.error() != ENOENT || missing == Missing::kFail) return opened;
  if (const int error = make_with_ancestors(root)) return Descriptor::failed(error);
  if (untrusted()) return Descriptor::failed(EPERM);
  return open_directory(AT_FDCWD, root);
}

}  // namespace torchkiln::cache
