// Locks between the processes of one machine, one per key. They only save work.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string_view>

#include "cache/files.h"

namespace torchkiln::cache {

// One byte of one node-local lock file (an OFD byte-range lock): unrelated keys never wait for one
// another, there is no file per key to create or leak, and the death of the holder releases it.
// Also excludes two threads of one process. Move-only.
class KeyLock {
 public:
  // Nothing when somebody else holds the key or no lock can be had; `available` tells which.
  static std::optional<KeyLock> try_acquire(const std::filesystem::path& lock_file,
                                            std::string_view key_hex);
  // False when the file cannot be opened or its file system has no such locks.
  static bool available(const std::filesystem::path& lock_file);

  KeyLock(KeyLock&&) noexcept = default;
  KeyLock& operator=(KeyLock&& other) noexcept;
  ~KeyLock();

 private:
  friend std::optional<KeyLock> wait_for_lock(const std::filesystem::path&, std::string_view,
                                              std::chrono::milliseconds,
                                              const std::function<bool()>&, bool&);

  KeyLock(Descriptor file, off_t offset);
  void release() noexcept;

  Descriptor file_;
  off_t offset_;
  pid_t owner_;
};

// $XDG_RUNTIME_DIR/torchkiln/locks, else /dev/shm/torchkiln-<uid>/locks, in a directory of ours
// (0700) that is made when missing. Empty when neither can be trusted: then there are no locks.
std::filesystem::path node_local_lock_file();

// Single flight between processes. Polls (2 to 50 ms apart) and asks `ready` before each attempt
// and once more after success, because the former holder may have finished in between. Returns the
// lock, or nothing when `ready` said true (then became_ready is set), the bound passed or no lock
// can be had. Whoever gets nothing and is not ready does the work without a lock.
std::optional<KeyLock> wait_for_lock(const std::filesystem::path& lock_file, std::string_view key,
                                     std::chrono::milliseconds bound,
                                     const std::function<bool()>& ready, bool& became_ready);

}  // namespace torchkiln::cache
