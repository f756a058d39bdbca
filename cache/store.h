// The content-addressed store in a user's directory. It knows files, not kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cache/files.h"
#include "cache/lock.h"
#include "cache/object.h"
#include "cache/root.h"

namespace torchkiln::cache {

// Where files are written before they get their names; swept of what killed writers left.
inline constexpr const char* kTemporaries = "tmp";

struct Entry {
  std::string key;
  std::string compiler;
  std::uint64_t bytes;                         // on disk
  std::chrono::system_clock::time_point used;  // exact to six hours
  std::filesystem::path path;
};

struct StoreCounters {
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t damaged = 0;  // files moved to quarantine or, where that is impossible, skipped
  std::uint64_t published = 0;
  std::uint64_t already_there = 0;  // somebody else published first
  std::uint64_t publish_failures = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
};

// No error of the store fails its caller: it degrades to a miss, with one warning. Thread-safe, and
// usable in a forked child, given before_fork and after_fork.
class Store {
 public:
  // Gets one sentence. Each kind of trouble is reported once per store.
  using Warn = std::function<void(const std::string&)>;
  // Returns the reason for refusing an object, nothing when it is fine.
  using Validate = std::function<std::optional<std::string>(const Object&)>;

  // `configured_root` as in resolve_root. Never throws; makes nothing before the first publish.
  Store(std::string configured_root, Warn warn);

  bool readable() const;
  bool writable() const;
  std::string state() const;  // one sentence for people

  // The object of `preferred_compiler` (may be empty) or, unless `exact_compiler`, any other one
  // with this key. File name, header["key"], header["compiler"], length and digest are checked,
  // then `validate`. A file that fails is moved to quarantine, or remembered and skipped where the
  // root is read-only.
  std::optional<Object> find(const std::string& key, const std::string& preferred_compiler,
                             bool exact_compiler, const Validate& validate);

  // Whether a file is there, unchecked; of any compiler when none is named.
  bool contains(const std::string& key, const std::string& only_compiler = {});

  enum class Published { kYes, kAlreadyThere, kNo };
  // Writes header["key"] and header["compiler"] itself. Never throws; in every case the caller goes
  // on with its own bytes and does not read back what was written.
  Published publish(const std::string& key, const std::string& compiler, const Object& object);

  // For what only the driver can find out.
  void quarantine(const std::string& key, const std::string& compiler, const std::string& reason);

  std::vector<Entry> list() const;  // by key, then compiler
  std::uint64_t clear();  // removes all objects and the quarantine; returns the bytes freed
  // Least recently used objects first, down to 80 % of the limit; none used in the last hour.
  std::uint64_t prune(std::uint64_t limit_bytes);
  // For after a publish: prunes now and then (each 64 publishes of this process, and where nobody
  // did for a day), unless another process is at it.
  void prune_if_due(std::uint64_t limit_bytes);

  // Around fork(), so that no other thread holds our mutex at that moment.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

  StoreCounters counters() const;

  // For what is stored beside the objects: a folder below the one of this format version, trusted like it.
  const std::filesystem::path& root() const { return root_.path; }
  Descriptor open_below(const std::vector<std::string>& names) const;
  Descriptor make_below(const std::vector<std::string>& names) const;
  std::filesystem::path path_below(const std::vector<std::string>& names) const;  // for people

 private:
  enum Counter {
    kHits,
    kMisses,
    kDamaged,
    kPublished,
    kAlreadyThere,
    kPublishFailures,
    kBytesRead,
    kBytesWritten,
    kCounters
  };
  struct Lookup;

  Descriptor open_trusted_root(Missing missing) const;
  Descriptor open_version(Missing missing) const;  // <root>/v1
  std::optional<Object> look_up(Lookup& lookup);
  std::optional<Object> load(Lookup& lookup, int shard, const std::string& name);
  int write_object(const std::string& key, const std::string& compiler, const Object& object);
  void set_aside(const std::string& key, const std::string& name, const struct stat* judged,
                 const std::string& reason);
  bool pruned_long_ago() const;
  bool is_skipped(const std::string& key, const std::string& name) const;
  void count(Counter counter, std::uint64_t amount = 1);
  void warn_once(const std::string& kind, const std::string& sentence) noexcept;
  void warn_of_error(const std::string& action, int error) noexcept;

  Root root_;
  Warn warn_;
  std::array<std::atomic<std::uint64_t>, kCounters> counters_{};
  std::atomic<bool> swept_ = false;
  mutable std::atomic<ino_t> trusted_inode_ = 0;  // of the root

  mutable std::mutex mutex_;  // guards the two sets
  std::set<std::string> warned_;
  std::set<std::string> skipped_;               // bad files that could not be moved
  std::atomic<std::size_t> skipped_count_ = 0;  // 0 spares find the mutex
};

}  // namespace torchkiln::cache
