// LD_PRELOAD: file operations below one folder, as on a network file system or a broken disk.
//   TORCHKILN_ATTACK_FILES="root=<folder>;delay_ms=<n>;stale=<n>;fail=<call>:<errno>;short=1"
// delay_ms: what other processes made is not there for so long, and what was missing stays missing for so long.
// stale: one call in n fails with ESTALE. fail: each such call fails; `create` is openat with O_CREAT.
// short: write takes and read gives at most 7 bytes.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>

namespace {

using Clock = std::chrono::steady_clock;

// The value of `name` in the variable; "" when it is not there.
std::string option(std::string_view name) {
  const char* value = std::getenv("TORCHKILN_ATTACK_FILES");
  std::string_view rest = value == nullptr ? "" : value;
  while (!rest.empty()) {
    const std::string_view field = rest.substr(0, rest.find(';'));
    rest.remove_prefix(std::min(field.size() + 1, rest.size()));
    if (field.substr(0, field.find('=')) == name) return std::string(field.substr(name.size() + 1));
  }
  return "";
}

int number(std::string_view name) {
  const std::string text = option(name);
  return text.empty() ? 0 : std::stoi(text);
}

struct State {
  const std::string root = option("root");
  const std::chrono::milliseconds delay{number("delay_ms")};
  const int stale = number("stale");
  const std::string fail = option("fail");
  const bool is_short = number("short") != 0;
  std::atomic<int> calls = static_cast<int>(::getpid());  // processes fail at different calls

  std::mutex mutex;  // guards what follows
  std::set<ino_t> made;
  std::map<std::string, Clock::time_point> missing;
};

State& state() {
  static State& instance = *new State;
  return instance;
}

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

std::string path_of(int fd) {
  std::array<char, PATH_MAX> buffer{};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t size = ::readlink(link.c_str(), buffer.data(), buffer.size());
  return size <= 0 ? "" : std::string(buffer.data(), static_cast<std::size_t>(size));
}

std::string path_of(int directory, const char* name) {
  if (name[0] == '/') return name;
  return (directory == AT_FDCWD ? std::string() : path_of(directory)) + "/" + name;
}

int error_named(std::string_view name) {
  constexpr std::pair<std::string_view, int> kErrors[] = {
      {"EIO", EIO},       {"ESTALE", ESTALE}, {"EXDEV", EXDEV},   {"EROFS", EROFS},
      {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EMFILE", EMFILE}, {"EACCES", EACCES},
      {"EPERM", EPERM},   {"EMLINK", EMLINK}, {"EINTR", EINTR}};
  const auto found = std::find_if(std::begin(kErrors), std::end(kErrors),
                                  [&](const auto& row) { return row.first == name; });
  if (found == std::end(kErrors)) ::abort();
  return found->second;
}

bool is_ours(const std::string& path) {
  return !state().root.empty() && path.starts_with(state().root);
}

// The error that this call meets, or 0.
int fault_of(std::string_view call, const std::string& path) {
  State& s = state();
  if (!is_ours(path)) return 0;
  const std::size_t colon = s.fail.find(':');
  if (!s.fail.empty() && s.fail.substr(0, colon) == call)
    return error_named(s.fail.substr(colon + 1));
  return s.stale > 0 && ++s.calls % s.stale == 0 ? ESTALE : 0;
}

int failed(int error) {
  errno = error;
  return -1;
}

bool still_missing(const std::string& path) {
  State& s = state();
  const std::scoped_lock lock(s.mutex);
  const auto found = s.missing.find(path);
  return found != s.missing.end() && Clock::now() - found->second < s.delay;
}

void remember_missing(const std::string& path) {
  const std::scoped_lock lock(state().mutex);
  state().missing[path] = Clock::now();
}

void forget_missing(const std::string& path) {
  const std::scoped_lock lock(state().mutex);
  state().missing.erase(path);
}

// A young file of somebody else.
bool not_yet_visible(int fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return false;
  {
    const std::scoped_lock lock(state().mutex);
    if (state().made.contains(status.st_ino)) return false;
  }
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  const auto age = std::chrono::seconds(now.tv_sec - status.st_ctim.tv_sec) +
                   std::chrono::nanoseconds(now.tv_nsec - status.st_ctim.tv_nsec);
  return age < state().delay;
}

void remember_made(int fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) return;
  const std::scoped_lock lock(state().mutex);
  state().made.insert(status.st_ino);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int openat(int directory, const char* name, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list list;
    va_start(list, flags);
    mode = static_cast<mode_t>(va_arg(list, int));
    va_end(list);
  }
  static const auto next = real<int (*)(int, const char*, int, ...)>("openat");
  const std::string path = path_of(directory, name);
  if (!is_ours(path)) return next(directory, name, flags, mode);
  const bool creates = (flags & O_CREAT) != 0;
  if (const int error = fault_of(creates ? "create" : "openat", path)) return failed(error);
  if (!creates && still_missing(path)) return failed(ENOENT);
  const int fd = next(directory, name, flags, mode);
  if (fd < 0) {
    if (errno == ENOENT) remember_missing(path);
    return fd;
  }
  if (creates) {
    remember_made(fd);
  } else if (not_yet_visible(fd)) {
    ::close(fd);
    return failed(ENOENT);
  }
  return fd;
}

int mkdirat(int directory, const char* name, mode_t mode) {
  static const auto next = real<int (*)(int, const char*, mode_t)>("mkdirat");
  const std::string path = path_of(directory, name);
  if (const int error = fault_of("mkdirat", path)) return failed(error);
  const int result = next(directory, name, mode);
  if (result == 0) forget_missing(path);
  return result;
}

int linkat(int from, const char* old_name, int to, const char* name, int flags) {
  static const auto next = real<int (*)(int, const char*, int, const char*, int)>("linkat");
  const std::string path = path_of(to, name);
  if (const int error = fault_of("linkat", path)) return failed(error);
  const int result = next(from, old_name, to, name, flags);
  if (result == 0) forget_missing(path);
  return result;
}

int renameat(int from, const char* old_name, int to, const char* name) {
  static const auto next = real<int (*)(int, const char*, int, const char*)>("renameat");
  if (const int error = fault_of("renameat", path_of(to, name))) return failed(error);
  return next(from, old_name, to, name);
}

int unlinkat(int directory, const char* name, int flags) {
  static const auto next = real<int (*)(int, const char*, int)>("unlinkat");
  if (const int error = fault_of("unlinkat", path_of(directory, name))) return failed(error);
  return next(directory, name, flags);
}

int fsync(int fd) {
  static const auto next = real<int (*)(int)>("fsync");
  if (const int error = fault_of("fsync", path_of(fd))) return failed(error);
  return next(fd);
}

ssize_t write(int fd, const void* bytes, size_t count) {
  static const auto next = real<ssize_t (*)(int, const void*, size_t)>("write");
  const std::string path = path_of(fd);
  if (const int error = fault_of("write", path)) return failed(error);
  const bool is_cut = state().is_short && is_ours(path);
  return next(fd, bytes, is_cut ? std::min<size_t>(count, 7) : count);
}

ssize_t read(int fd, void* bytes, size_t count) {
  static const auto next = real<ssize_t (*)(int, void*, size_t)>("read");
  const std::string path = path_of(fd);
  if (const int error = fault_of("read", path)) return failed(error);
  const bool is_cut = state().is_short && is_ours(path);
  return next(fd, bytes, is_cut ? std::min<size_t>(count, 7) : count);
}

}  // extern "C"
#pragma GCC visibility pop
