// Recording, and merging under the lock.
// SPDX-License-Identifier: Apache-2.0
#include "jit/deploy/recorder.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>
#include <vector>

#include "cache/files.h"
#include "cache/lock.h"
#include "cache/replace_file.h"
#include "cache/sha256.h"
#include "jit/error.h"
#include "jit/log.h"

namespace torchkiln::jit {
namespace {

namespace fs = std::filesystem;

// Merging takes a millisecond; who waits longer waits for a stopped process.
constexpr std::chrono::milliseconds kLockBound{5'000};

bool holds(const Manifest& manifest, const Manifest& more) {
  return std::includes(manifest.begin(), manifest.end(), more.begin(), more.end());
}

// The manifest, empty when there is none; a damaged one is moved out of the way. What only cannot be read, as for want
// of descriptors, stays where it is.
Manifest read_or_set_aside(const fs::path& path) {
  const auto text = read_manifest_text(path);
  if (!text) return {};
  try {
    return parse_manifest(*text, path.string());
  } catch (const Error& error) {
    fs::path aside = path;
    aside += ".damaged";
    fs::rename(path, aside);
    warn(std::string(error.what()) + " The file is kept as " + aside.string() + ".");
    return {};
  }
}

}  // namespace

std::string merge_into_manifest(const fs::path& path, const Manifest& more) try {
  try {
    const auto present = read_manifest(path);
    if (present && holds(*present, more)) return {};
  } catch (const Error&) {
    // Looked at again below, where nobody else moves it aside at the same time.
  }
  bool became_ready = false;
  const auto lock = cache::wait_for_lock(
      cache::node_local_lock_file(), cache::sha256_hex(path.string()), kLockBound,
      [] { return false; }, became_ready);
  Manifest merged = read_or_set_aside(path);
  if (fs::exists(path) && holds(merged, more)) return {};
  merged.insert(more.begin(), more.end());
  int error = cache::replace_file(path, manifest_text(merged));
  // Another container with our host name and process numbers of its own took our file for litter.
  if (error == ENOENT && fs::exists(path.parent_path())) {
    error = cache::replace_file(path, manifest_text(merged));
  }
  return error == 0 ? "" : cache::error_text(error);
} catch (const std::exception& error) {
  return error.what();
}

Recorder::Recorder(const std::string& path) {
  if (!path.empty()) start(path);
}

std::uint64_t Recorder::start(const fs::path& path) {
  const std::scoped_lock lock(mutex_);
  recordings_[next_].path = fs::absolute(path);
  return next_++;
}

std::size_t Recorder::stop(std::uint64_t recording) {
  const std::scoped_lock lock(mutex_);
  const auto found = recordings_.find(recording);
  if (found == recordings_.end()) return 0;
  const std::size_t met = found->second.met.size();
  recordings_.erase(found);
  return met;
}

void Recorder::note(const std::string& specialization) {
  std::vector<std::pair<std::uint64_t, Recording>> grown;
  {
    const std::scoped_lock lock(mutex_);
    for (auto& [id, recording] : recordings_) {
      if (recording.met.insert(specialization).second) grown.emplace_back(id, recording);
    }
  }
  // Without the mutex: files may be slow, and warnings may call back.
  for (const auto& [id, recording] : grown) {
    const std::string why = merge_into_manifest(recording.path, recording.met);
    if (!why.empty() && must_warn(id)) {
      warn("recording into " + recording.path.string() + " does not work (" + why +
           "). Choose a file that can be written.");
    }
  }
}

bool Recorder::must_warn(std::uint64_t recording) {
  const std::scoped_lock lock(mutex_);
  const auto found = recordings_.find(recording);
  return found != recordings_.end() && !std::exchange(found->second.warned, true);
}

}  // namespace torchkiln::jit
