// OFD byte-range locks on one file that stays empty: the byte to lock is a prefix of the key.
// SPDX-License-Identifier: Apache-2.0
#include "cache/lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>

#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

constexpr std::chrono::milliseconds kFirstPause{2};
constexpr std::chrono::milliseconds kLongestPause{50};

// The first 62 bits of the key. Two keys with the same byte would merely wait for each other.
off_t offset_of(std::string_view key) {
  const auto parse = [](std::string_view digits, std::uint64_t& value) {
    const char* end = digits.data() + digits.size();
    return digits.size() == 16 && std::from_chars(digits.data(), end, value, 16).ptr == end;
  };
  std::uint64_t value = 0;
  if (!parse(key.substr(0, 16), value)) parse(sha256_hex(key).substr(0, 16), value);
  return static_cast<off_t>(value >> 2);
}

int set_lock(int fd, short type, off_t offset) {
  struct flock range{};  // l_pid must be 0 for OFD locks
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = offset;
  range.l_len = 1;
  return ::fcntl(fd, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

bool is_busy(int error) { return error == EAGAIN || error == EACCES; }

Descriptor open_lock_file(const std::filesystem::path& path) {
  if (path.empty()) return Descriptor::failed(ENOENT);
  Descriptor file(
      ::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600));
  if (!file) return file;
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) return Descriptor::failed(errno);
  const bool trusted = S_ISREG(status.st_mode) && status.st_uid == ::geteuid();
  return trusted ? std::move(file) : Descriptor::failed(EPERM);
}

// `name` in `parent`, ours and closed to everybody else; made when missing.
bool have_private_directory(const Descriptor& parent, const std::string& name) {
  if (!parent) return false;
  const Descriptor directory = make_directory(parent.get(), name);
  struct stat status{};
  return directory && ::fstat(directory.get(), &status) == 0 && status.st_uid == ::geteuid() &&
         (status.st_mode & (S_IRWXG | S_IRWXO)) == 0;
}

}  // namespace

std::optional<KeyLock> KeyLock::try_acquire(const std::filesystem::path& lock_file,
                                            std::string_view key_hex) {
  Descriptor file = open_lock_file(lock_file);
  const off_t offset = offset_of(key_hex);
  if (!file || set_lock(file.get(), F_WRLCK, offset) != 0) return std::nullopt;
  return KeyLock(std::move(file), offset);
}

bool KeyLock::available(const std::filesystem::path& lock_file) {
  const Descriptor file = open_lock_file(lock_file);
  if (!file) return false;
  // Asks for a byte that no key maps to (keys use 62 bits), and gives it back at once.
  const int error = set_lock(file.get(), F_WRLCK, off_t{1} << 62);
  return error == 0 || is_busy(error);
}

KeyLock::KeyLock(Descriptor file, off_t offset)
    : file_(std::move(file)), offset_(offset), owner_(::getpid()) {}

KeyLock& KeyLock::operator=(KeyLock&& other) noexcept {
  if (this != &other) {
    release();
    file_ = std::move(other.file_);
    offset_ = other.offset_;
    owner_ = other.owner_;
  }
  return *this;
}

KeyLock::~KeyLock() { release(); }

void KeyLock::release() noexcept {
  // Explicitly: a forked child has the same open file, and closing ours would leave the lock with
  // it. For the same reason such a child must not unlock what its parent still holds.
  if (file_ && owner_ == ::getpid()) set_lock(file_.get(), F_UNLCK, offset_);
  file_ = Descriptor();
}

std::filesystem::path node_local_lock_file() {
  const char* runtime = ::secure_getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && runtime[0] == '/' &&
      have_private_directory(open_directory(AT_FDCWD, runtime), "torchkiln")) {
    return std::filesystem::path(runtime) / "torchkiln" / "locks";
  }
  // Everybody may write to /dev/shm, so it fails open_directory's test; our directory in it counts.
  const Descriptor shared(::open("/dev/shm", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const std::string name = "torchkiln-" + std::to_string(::geteuid());
  if (have_private_directory(shared, name)) {
    return std::filesystem::path("/dev/shm") / name / "locks";
  }
  return {};
}

std::optional<KeyLock> wait_for_lock(const std::filesystem::path& lock_file, std::string_view key,
                                     std::chrono::milliseconds bound,
                                     const std::function<bool()>& ready, bool& became_ready) {
  const auto deadline = std::chrono::steady_clock::now() + bound;
  const off_t offset = offset_of(key);
  Descriptor file = open_lock_file(lock_file);
  auto pause = kFirstPause;
  while (true) {
    became_ready = ready();
    if (became_ready || !file) return std::nullopt;
    const int error = set_lock(file.get(), F_WRLCK, offset);
    if (error == 0) {
      KeyLock lock(std::move(file), offset);
      became_ready = ready();
      if (became_ready) return std::nullopt;
      return lock;
    }
    const auto now = std::chrono::steady_clock::now();
    if (!is_busy(error) || now >= deadline) return std::nullopt;
    std::this_thread::sleep_until(std::min(now + pause, deadline));
    pause = std::min(2 * pause, kLongestPause);
  }
}

}  // namespace torchkiln::cache
