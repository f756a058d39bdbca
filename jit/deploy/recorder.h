// Writes down which specialisations this process uses, into manifests that several processes may share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "jit/deploy/manifest.h"

namespace torchkiln::jit {

// Each new specialisation is merged into the file at once, before its kernel is compiled: a process that dies has lost
// nothing. The file is replaced whole under a lock of the machine, so it is a valid manifest at any moment. A process
// always merges all that it has, which mends what writers on two machines without a common lock take from each other.
// Thread-safe. No error reaches the caller: a manifest that cannot be written costs one warning.
class Recorder {
 public:
  // An empty path records nothing until start.
  explicit Recorder(const std::string& path);

  std::uint64_t start(const std::filesystem::path& path);
  // The number of specialisations that this process added or met; 0 for an unknown recording.
  std::size_t stop(std::uint64_t recording);

  void note(const std::string& specialization);

  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  struct Recording {
    std::filesystem::path path;
    Manifest met;
    bool warned = false;
  };

  bool must_warn(std::uint64_t recording);  // once

  std::mutex mutex_;
  std::uint64_t next_ = 1;
  std::map<std::uint64_t, Recording> recordings_;
};

// Adds to the manifest at `path`, which is made if missing; one that is damaged is kept beside it as <path>.damaged.
// Returns "" or why it could not be written.
std::string merge_into_manifest(const std::filesystem::path& path, const Manifest& more);

}  // namespace torchkiln::jit
