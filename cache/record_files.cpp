// Lock, read, merge; temporary file, fsync, rename, fsync of the directory.
// SPDX-License-Identifier: Apache-2.0
#include "cache/record_files.h"

#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "cache/fault.h"
#include "cache/lock.h"
#include "cache/names.h"
#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

constexpr const char* kRecords = "tuning";
constexpr const char* kSuffix = ".jsonl";
constexpr std::size_t kMaxBytes = std::size_t{64} << 20;
// Merging takes milliseconds: whoever waits longer waits for a stopped process.
constexpr std::chrono::milliseconds kLockBound{5'000};

}  // namespace

std::string RecordFiles::read(const std::string& folder, const std::string& name) const {
  if (!is_compiler(folder) || !is_compiler(name)) return {};
  const Descriptor directory = store_.open_below({kRecords, folder});
  if (!directory) return {};
  FileContents file = read_file(directory.get(), name + kSuffix, kMaxBytes);
  return file.error == 0 && file.refusal.empty() ? std::move(file.bytes) : std::string();
}

int RecordFiles::merge(const std::string& folder, const std::string& name,
                       const std::function<std::string(const std::string&)>& merged) const {
  if (!is_compiler(folder) || !is_compiler(name)) return EINVAL;
  const std::string key = sha256_hex(store_.root().string() + "\n" + folder + "\n" + name);
  bool ignored = false;
  const auto lock =
      wait_for_lock(node_local_lock_file(), key, kLockBound, [] { return false; }, ignored);
  const std::string present = read(folder, name);
  const std::string text = merged(present);
  if (text == present) return 0;
  const int error = replace(folder, name + kSuffix, text);
  // Somebody removed the directories under us, or a server gave them new handles.
  return error == ENOENT || error == ESTALE ? replace(folder, name + kSuffix, text) : error;
}

int RecordFiles::replace(const std::string& folder, const std::string& file,
                         std::string_view text) const {
  const Descriptor temporaries = store_.make_below({kTemporaries});
  if (!temporaries) return temporaries.error();
  const Descriptor directory = store_.make_below({kRecords, folder});
  if (!directory) return directory.error();
  const std::string temporary = temporary_name();
  int error = 0;
  {
    const Descriptor made = create_file(temporaries.get(), temporary);
    if (!made) return made.error();
    error = write_all(made.get(), text);
    if (error == 0) error = fault_at("record_written");
    // EINVAL: the file system has no fsync. A reader takes no line that is cut.
    if (error == 0 && ::fsync(made.get()) != 0 && errno != EINVAL) error = errno;
  }
  if (error == 0 &&
      ::renameat(temporaries.get(), temporary.c_str(), directory.get(), file.c_str()) != 0) {
    error = errno;
  }
  if (error != 0) {
    ::unlinkat(temporaries.get(), temporary.c_str(), 0);
    return error;
  }
  fault_at("record_replaced");
  ::fsync(directory.get());
  return 0;
}

std::vector<RecordFiles::File> RecordFiles::list() const {
  std::vector<File> files;
  const Descriptor records = store_.open_below({kRecords});
  if (!records) return files;
  for (const std::string& folder : names_in(records.get())) {
    const Descriptor directory = open_directory(records.get(), folder);
    if (!directory) continue;
    for (const std::string& name : names_in(directory.get())) {
      const std::size_t stem = name.size() - std::min(name.size(), std::string(kSuffix).size());
      if (!name.ends_with(kSuffix)) continue;
      files.push_back({folder, name.substr(0, stem), store_.path_below({kRecords, folder, name})});
    }
  }
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) {
    return std::tie(a.folder, a.name) < std::tie(b.folder, b.name);
  });
  return files;
}

}  // namespace torchkiln::cache
