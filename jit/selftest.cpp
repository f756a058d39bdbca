// Active checks of the cache folder.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/selftest.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>

#include "cache/files.h"
#include "cache/lock.h"
#include "cache/root.h"
#include "cache/sha256.h"
#include "cache/store.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

class Checks {
 public:
  void add(const std::string& name, bool ok, const std::string& fact) {
    list_.push_back({{"name", name}, {"ok", ok}, {"fact", fact}});
  }
  json to_json() const { return {{"checks", list_}}; }

 private:
  json list_ = json::array();
};

void damage(const fs::path& file) {
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekp(-1, std::ios::end);
  stream.put('!');
}

// The store may move an entry that this test damaged aside; it must not stay there.
void remove_traces(const fs::path& root, const std::string& key) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(root / "v1" / "quarantine", ignored)) {
    if (entry.path().filename().string().find(key.substr(2)) != std::string::npos)
      fs::remove(entry.path(), ignored);
  }
}

// The file operations that publishing needs, one by one, so that the one that fails has a name.
void check_operations(Checks& checks, const fs::path& root) {
  const cache::Descriptor folder = cache::open_root(root, cache::Missing::kMake);
  if (!folder)
    return checks.add("file operations", false, "open: " + cache::error_text(folder.error()));
  const std::string name = ".selftest-" + std::to_string(getpid());
  const std::string link = name + "-link", moved = name + "-moved";
  const cache::Descriptor file = cache::create_file(folder.get(), name);
  const auto failed = [](int result) { return result == 0 ? 0 : errno; };
  const std::pair<const char*, std::function<int()>> steps[] = {
      {"create", [&] { return file ? 0 : file.error(); }},
      {"write", [&] { return cache::write_all(file.get(), std::string(64 << 10, 'x')); }},
      {"fsync", [&] { return failed(::fsync(file.get())); }},
      {"link",
       [&] { return failed(::linkat(folder.get(), name.c_str(), folder.get(), link.c_str(), 0)); }},
      {"rename",
       [&] { return failed(::renameat(folder.get(), link.c_str(), folder.get(), moved.c_str())); }},
      {"fsync of the folder", [&] { return failed(::fsync(folder.get())); }},
  };
  std::string done, trouble;
  for (const auto& [step, run] : steps) {
    if (const int error = run(); error != 0) {
      trouble = std::string(step) + ": " + cache::error_text(error);
      break;
    }
    done += (done.empty() ? "" : ", ") + std::string(step);
  }
  for (const std::string& made : {name, link, moved}) ::unlinkat(folder.get(), made.c_str(), 0);
  checks.add("file operations", trouble.empty(), trouble.empty() ? done : trouble);
}

void check_round_trip(Checks& checks, const Settings& settings, const fs::path& root) {
  cache::Store store(settings.cache_dir, [](const std::string&) {});
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string key =
      cache::sha256_hex("selftest " + std::to_string(getpid()) + " " + std::to_string(now));
  const auto accept = [](const cache::Object&) { return std::nullopt; };
  const cache::Object object{json::object(), "payload of the self test"};

  const bool published = store.publish(key, "selftest", object) == cache::Store::Published::kYes;
  checks.add("publish", published, published ? "written, synced and linked" : store.state());
  if (!published) return;
  const auto found = store.find(key, "selftest", true, accept);
  checks.add("find", found && found->payload == object.payload, "read back with all checks");

  for (const cache::Entry& entry : store.list()) {
    if (entry.key == key) damage(entry.path);
  }
  checks.add("damage", !store.find(key, "selftest", true, accept), "a changed byte is noticed");
  const bool healed = store.publish(key, "selftest", object) == cache::Store::Published::kYes &&
                      store.find(key, "selftest", true, accept).has_value();
  checks.add("heal", healed, "the entry was replaced");
  for (const cache::Entry& entry : store.list()) {
    if (entry.key == key) fs::remove(entry.path);
  }
  remove_traces(root, key);
}

// Whether another process can take a key that this one holds.
bool child_is_kept_out(const fs::path& file, const std::string& key) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(cache::KeyLock::try_acquire(file, key) ? 1 : 0);
  int status = 1;
  while (child > 0 && ::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void check_lock(Checks& checks) {
  const fs::path file = cache::node_local_lock_file();
  if (file.empty()) {
    checks.add("lock", true,
               "no node-local folder for locks: several processes may compile the same kernel");
    return;
  }
  const std::string key = cache::sha256_hex("selftest lock " + std::to_string(getpid()));
  const auto held = cache::KeyLock::try_acquire(file, key);
  const bool excludes =
      held && !cache::KeyLock::try_acquire(file, key) && child_is_kept_out(file, key);
  checks.add("lock", excludes,
             excludes ? "a held key keeps other threads and processes out"
                      : "byte-range locks do not work in " + file.parent_path().string());
}

}  // namespace

json test_store(const Settings& settings) {
  Checks checks;
  const cache::Root root = cache::resolve_root(settings.cache_dir);
  checks.add("root", !root.path.empty(), root.path.empty() ? root.refusal : root.path.string());
  if (!root.path.empty()) check_operations(checks, root.path);
  if (!root.path.empty()) check_round_trip(checks, settings, root.path);
  check_lock(checks);
  return checks.to_json();
}

}  // namespace torchkiln::jit
