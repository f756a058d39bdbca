// Active checks of the cache folder.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/selftest.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>

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

void check_lock(Checks& checks) {
  const fs::path file = cache::node_local_lock_file();
  if (file.empty()) {
    checks.add("lock", true,
               "no node-local folder for locks: several processes may compile the same kernel");
    return;
  }
  const std::string key = cache::sha256_hex("selftest lock " + std::to_string(getpid()));
  const auto held = cache::KeyLock::try_acquire(file, key);
  const bool excludes = held && !cache::KeyLock::try_acquire(file, key);
  checks.add("lock", excludes,
             excludes ? "a held key excludes others" : "byte-range locks do not work here");
}

}  // namespace

json test_store(const Settings& settings) {
  Checks checks;
  const cache::Root root = cache::resolve_root(settings.cache_dir);
  checks.add("root", !root.path.empty(), root.path.empty() ? root.refusal : root.path.string());
  if (!root.path.empty()) check_round_trip(checks, settings, root.path);
  check_lock(checks);
  return checks.to_json();
}

}  // namespace torchkiln::jit
