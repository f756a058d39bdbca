// Small text files beside the objects, each replaced whole: tuning records. The store knows nothing of what is in them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "cache/store.h"

namespace torchkiln::cache {

// <root>/v1/tuning/<folder>/<name>.jsonl. Thread-safe, and safe between processes: readers see the old text or the new
// one. Folder and name are at most 128 of A-Z a-z 0-9 . _ -, not starting with a dot.
class RecordFiles {
 public:
  // `store` must outlive it.
  explicit RecordFiles(const Store& store) : store_(store) {}

  // Empty when there is none, or none that can be trusted.
  std::string read(const std::string& folder, const std::string& name) const;

  // Replaces the text by `merged(present text)`, under a lock of this machine; nothing is written when that changes
  // nothing. 0, or the errno of what failed. Where two machines write at once, one text wins: callers lose work, never
  // truth.
  int merge(const std::string& folder, const std::string& name,
            const std::function<std::string(const std::string&)>& merged) const;

  struct File {
    std::string folder, name;
    std::filesystem::path path;  // for people
  };
  std::vector<File> list() const;  // by folder, then name

 private:
  int replace(const std::string& folder, const std::string& file, std::string_view text) const;

  const Store& store_;
};

}  // namespace torchkiln::cache
