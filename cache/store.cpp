// The store: ties names, files, publishing, quarantine and inventory together.
// SPDX-License-Identifier: Apache-2.0
#include "cache/store.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <exception>
#include <tuple>
#include <utility>

#include "cache/inventory.h"
#include "cache/names.h"
#include "cache/publish.h"
#include "cache/quarantine.h"

namespace torchkiln::cache {
namespace {

// The format version of object.h goes with it: a new format is a new directory, which old libraries
// neither read nor delete.
constexpr const char* kVersion = "v1";
constexpr const char* kObjects = "objects";
constexpr const char* kQuarantine = "quarantine";
constexpr const char* kPruned = "pruned";  // an empty file; its modification time counts

// Walking the store costs, and its limit exists for careless CI.
constexpr std::uint64_t kPublishesPerPrune = 64;
constexpr std::chrono::hours kPruneInterval{24};

// Backup programs skip directories with this file (bford.info/cachedir).
constexpr const char* kTagName = "CACHEDIR.TAG";
constexpr const char* kTag =
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Compiled kernels of torchkiln. Deleting this directory costs recompilation only.\n";

void write_tag(int directory) {
  const Descriptor tag = create_file(directory, kTagName);
  if (tag) write_all(tag.get(), kTag);
}

// 4f0c12ab90de.nvrtc-13.0-...: enough of the key to find the file.
std::string short_name(const std::string& key, const std::string& name) {
  return key.substr(0, 12) + name.substr(name_prefix(key).size() - 1);
}

bool says(const nlohmann::json& header, const char* field, const std::string& expected) {
  const auto found = header.find(field);
  return found != header.end() && found->is_string() &&
         found->get_ref<const std::string&>() == expected;
}

std::optional<Object> checked_object(const std::string& bytes, const ObjectId& id,
                                     const Store::Validate& validate, std::string& why) {
  auto object = decode_object(bytes, why);
  if (!object) return std::nullopt;
  if (!says(object->header, "key", id.key)) {
    why = "its header has another key than its name";
  } else if (!says(object->header, "compiler", id.compiler)) {
    why = "its header has another compiler than its name";
  } else if (const auto refusal = validate ? validate(*object) : std::nullopt) {
    why = *refusal;
  } else {
    return object;
  }
  return std::nullopt;
}

bool is_absent(int error) { return error == ENOENT; }

// Folders such as /proc look writable to root, yet nobody can make a file there.
bool is_view_of_the_kernel(const std::filesystem::path& path) {
  constexpr std::array<std::uint64_t, 4> kViews = {PROC_SUPER_MAGIC, SYSFS_MAGIC,
                                                   CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC};
  struct statfs status{};
  if (::statfs(path.c_str(), &status) != 0) return false;
  return std::find(kViews.begin(), kViews.end(), static_cast<std::uint64_t>(status.f_type)) !=
         kViews.end();
}

// All other compilers' files of a key. Sorted, newest compiler version first, so that processes
// agree.
std::vector<std::string> other_names(int shard, const std::string& key,
                                     const std::string& preferred_name) {
  std::vector<std::string> names;
  const std::string prefix = name_prefix(key);
  for (std::string& name : names_in(shard)) {
    if (name.starts_with(prefix) && name != preferred_name &&
        parse_object_name(shard_of(key), name)) {
      names.push_back(std::move(name));
    }
  }
  std::sort(names.rbegin(), names.rend());
  return names;
}

}  // namespace

// One find, and the last error met on the way that was not simply a missing file.
struct Store::Lookup {
  const std::string& key;
  const std::string& preferred_compiler;
  const bool exact_compiler;
  const Validate& validate;
  int error = 0;
};

Store::Store(std::string configured_root, Warn warn) : warn_(std::move(warn)) {
  try {
    root_ = resolve_root(configured_root);
  } catch (const std::exception& error) {
    root_ = {{}, std::string("its directory could not be determined: ") + error.what()};
  }
  if (root_.path.empty()) {
    warn_once("root", "kernels are kept in memory only, because " + root_.refusal);
  }
}

bool Store::readable() const {
  return !root_.path.empty() &&
         (::access(root_.path.c_str(), R_OK | X_OK) == 0 || is_absent(errno));
}

bool Store::writable() const {
  if (root_.path.empty()) return false;
  // The deepest directory that exists decides: the others would be made in it.
  for (auto path = root_.path / kVersion / kObjects;; path = path.parent_path()) {
    if (::access(path.c_str(), F_OK) == 0) {
      return ::access(path.c_str(), W_OK | X_OK) == 0 && !is_view_of_the_kernel(path);
    }
    if (!is_absent(errno) || path == path.root_path()) return false;
  }
}

std::string Store::state() const {
  if (root_.path.empty()) return "memory only, because " + root_.refusal;
  const std::string where = root_.path.string();
  if (!readable()) return where + " cannot be read (" + error_text(errno) + ")";
  const bool exists = ::access(root_.path.c_str(), F_OK) == 0;
  if (!writable()) return where + (exists ? " is read-only" : " cannot be made");
  return where + (exists ? " is readable and writable" : " will be made at the first publish");
}

std::optional<Object> Store::find(const std::string& key, const std::string& preferred_compiler,
                                  bool exact_compiler, const Validate& validate) {
  try {
    Lookup lookup{key, preferred_compiler, exact_compiler, validate};
    auto object = look_up(lookup);
    if (lookup.error == ESTALE) {  // a network directory changed under us
      lookup.error = 0;
      object = look_up(lookup);
    }
    if (object) {
      count(kHits);
      return object;
    }
    if (lookup.error != 0) warn_of_error("read", lookup.error);
  } catch (const std::exception& error) {  // out of memory, or thrown by validate
    warn_once("find", std::string("looking up a kernel failed (") + error.what() + ")");
  }
  count(kMisses);
  return std::nullopt;
}

std::optional<Object> Store::look_up(Lookup& lookup) {
  const std::string& key = lookup.key;
  if (root_.path.empty() || !is_key(key)) return std::nullopt;
  const Descriptor shard = open_below({kObjects, shard_of(key)});
  if (!shard) {
    if (!is_absent(shard.error())) lookup.error = shard.error();
    return std::nullopt;
  }
  std::string preferred_name;
  if (is_compiler(lookup.preferred_compiler)) {
    preferred_name = object_name(key, lookup.preferred_compiler);
    if (auto object = load(lookup, shard.get(), preferred_name)) return object;
  }
  if (lookup.exact_compiler) return std::nullopt;
  for (const std::string& name : other_names(shard.get(), key, preferred_name)) {
    if (auto object = load(lookup, shard.get(), name)) return object;
  }
  return std::nullopt;
}

std::optional<Object> Store::load(Lookup& lookup, int shard, const std::string& name) {
  if (is_skipped(lookup.key, name)) return std::nullopt;
  const FileContents file = read_file(shard, name, kMaxObjectBytes);
  if (file.error != 0) {
    if (!is_absent(file.error)) lookup.error = file.error;
    return std::nullopt;
  }
  std::string why = file.refusal;
  if (why.empty()) {
    const auto id = parse_object_name(shard_of(lookup.key), name);
    auto object = checked_object(file.bytes, id.value(), lookup.validate, why);
    if (object) {
      count(kBytesRead, file.bytes.size());
      note_use(shard, name, file.status);
      return object;
    }
  }
  // A symbolic link was not opened, so there is nothing to compare with.
  set_aside(lookup.key, name, file.status.st_ino == 0 ? nullptr : &file.status, why);
  return std::nullopt;
}

bool Store::contains(const std::string& key, const std::string& only_compiler) {
  if (root_.path.empty() || !is_key(key)) return false;
  const Descriptor shard = open_below({kObjects, shard_of(key)});
  if (!shard) return false;
  const std::string only = only_compiler.empty() ? "" : object_name(key, only_compiler);
  const auto names = other_names(shard.get(), key, {});
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    return (only.empty() || name == only) && !is_skipped(key, name);
  });
}

Store::Published Store::publish(const std::string& key, const std::string& compiler,
                                const Object& object) {
  if (root_.path.empty()) return Published::kNo;
  try {
    int error = write_object(key, compiler, object);
    // Somebody removed the directories under us, or a server gave them new handles.
    if (error == ENOENT || error == ESTALE) error = write_object(key, compiler, object);
    if (error == 0) {
      count(kPublished);
      return Published::kYes;
    }
    if (error == EEXIST) {
      count(kAlreadyThere);
      return Published::kAlreadyThere;
    }
    warn_of_error("write to", error);
  } catch (const std::exception& error) {
    warn_once("publish", std::string("a kernel could not be stored (") + error.what() + ")");
  }
  count(kPublishFailures);
  return Published::kNo;
}

int Store::write_object(const std::string& key, const std::string& compiler, const Object& object) {
  if (!is_key(key) || !is_compiler(compiler)) {
    throw std::runtime_error("'" + key + "." + compiler + "' is not a key and a compiler");
  }
  nlohmann::json header = object.header;
  header["key"] = key;
  header["compiler"] = compiler;
  const std::string bytes = encode_object(header, object.payload);

  const Descriptor temporaries = make_below({kTemporaries});
  if (!temporaries) return temporaries.error();
  const Descriptor shard = make_below({kObjects, shard_of(key)});
  if (!shard) return shard.error();

  const int error = publish_file(temporaries.get(), shard.get(), object_name(key, compiler), bytes);
  if (!swept_.exchange(true)) {
    if (const Descriptor version = open_version(Missing::kMake)) write_tag(version.get());
    sweep_temporaries(temporaries.get());
  }
  if (error == 0) count(kBytesWritten, bytes.size());
  return error;
}

void Store::quarantine(const std::string& key, const std::string& compiler,
                       const std::string& reason) {
  if (root_.path.empty() || !is_key(key) || !is_compiler(compiler)) return;
  try {
    set_aside(key, object_name(key, compiler), nullptr, reason);
  } catch (const std::exception& error) {
    warn_once("quarantine", std::string("a kernel could not be set aside (") + error.what() + ")");
  }
}

void Store::set_aside(const std::string& key, const std::string& name, const struct stat* judged,
                      const std::string& reason) {
  const Descriptor shard = open_below({kObjects, shard_of(key)});
  const Descriptor version = open_version(Missing::kFail);
  const Descriptor quarantine =
      version ? make_directory(version.get(), kQuarantine) : Descriptor::failed(version.error());
  const int error =
      shard ? move_to_quarantine(shard.get(), shard_of(key), name, judged, quarantine.get())
            : shard.error();
  if (is_absent(error)) return;  // somebody else was quicker
  if (error != 0) {
    const std::scoped_lock lock(mutex_);
    skipped_.insert(shard_of(key) + name);
    skipped_count_ = skipped_.size();
  }
  count(kDamaged);
  warn_once("damaged", "object " + short_name(key, name) + " in " + root_.path.string() +
                           " cannot be used: " + reason + "; it was " +
                           (error == 0 ? "moved out of the way" : "left there and is skipped") +
                           " and is compiled again");
}

std::vector<Entry> Store::list() const {
  const Descriptor objects = open_below({kObjects});
  if (!objects) return {};
  std::vector<Entry> entries;
  for (StoredObject& object : stored_objects(objects.get())) {
    auto path = root_.path / kVersion / kObjects / object.shard / object.name;
    entries.push_back({std::move(object.id.key), std::move(object.id.compiler), object.bytes(),
                       object.used(), std::move(path)});
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.key, a.compiler) < std::tie(b.key, b.compiler);
  });
  return entries;
}

std::uint64_t Store::clear() {
  std::uint64_t freed = 0;
  if (const Descriptor objects = open_below({kObjects})) freed += remove_objects(objects.get());
  if (const Descriptor bad = open_below({kQuarantine})) freed += remove_files(bad.get());
  return freed;
}

std::uint64_t Store::prune(std::uint64_t limit_bytes) {
  const Descriptor version = open_version(Missing::kFail);
  const Descriptor objects = open_below({kObjects});
  if (!version || !objects) return 0;
  return remove_oldest(objects.get(), limit_bytes, stamp(version.get(), kPruned));
}

void Store::prune_if_due(std::uint64_t limit_bytes) try {
  const std::uint64_t published = counters_[kPublished];
  const bool many = published % kPublishesPerPrune == 0;
  if (published == 0 || (!many && (published != 1 || !pruned_long_ago()))) return;
  // One process at a time is enough, and none waits for it.
  const auto lock_file = node_local_lock_file();
  const auto lock = KeyLock::try_acquire(lock_file, "prune " + root_.path.string());
  if (lock || !KeyLock::available(lock_file)) prune(limit_bytes);
} catch (const std::exception&) {
  // Out of memory: not worth the failure of whoever published.
}

bool Store::pruned_long_ago() const {
  const Descriptor version = open_version(Missing::kFail);
  struct stat pruned{}, temporaries{};
  if (!version || ::fstatat(version.get(), kTemporaries, &temporaries, 0) != 0) return false;
  if (::fstatat(version.get(), kPruned, &pruned, AT_SYMLINK_NOFOLLOW) != 0) {
    stamp(version.get(), kPruned);  // new: the days count from here
    return false;
  }
  // A publish has just changed that directory.
  return modified(temporaries) - modified(pruned) > kPruneInterval;
}

StoreCounters Store::counters() const {
  return {counters_[kHits],      counters_[kMisses],       counters_[kDamaged],
          counters_[kPublished], counters_[kAlreadyThere], counters_[kPublishFailures],
          counters_[kBytesRead], counters_[kBytesWritten]};
}

// The directory that passed the walk of all its ancestors need not pass it at each look-up: should
// somebody exchange it, it is another one; should it be opened to others, open_directory refuses it.
Descriptor Store::open_trusted_root(Missing missing) const {
  const auto inode_of = [](const Descriptor& directory) {
    struct stat status{};
    return directory && ::fstat(directory.get(), &status) == 0 ? status.st_ino : 0;
  };
  if (const ino_t trusted = trusted_inode_) {
    Descriptor root = open_directory(AT_FDCWD, root_.path);
    if (inode_of(root) == trusted) return root;
  }
  Descriptor root = open_root(root_.path, missing);
  trusted_inode_ = inode_of(root);
  return root;
}

Descriptor Store::open_version(Missing missing) const {
  if (root_.path.empty()) return Descriptor::failed(ENOENT);
  const Descriptor root = open_trusted_root(missing);
  if (!root) return Descriptor::failed(root.error());
  return missing == Missing::kMake ? make_directory(root.get(), kVersion)
                                   : open_directory(root.get(), kVersion);
}

Descriptor Store::open_below(const std::vector<std::string>& names) const {
  Descriptor at = open_version(Missing::kFail);
  for (const std::string& name : names) {
    if (!at) break;
    at = open_directory(at.get(), name);
  }
  return at;
}

Descriptor Store::make_below(const std::vector<std::string>& names) const {
  Descriptor at = open_version(Missing::kMake);
  for (const std::string& name : names) {
    if (!at) break;
    at = make_directory(at.get(), name);
  }
  return at;
}

std::filesystem::path Store::path_below(const std::vector<std::string>& names) const {
  std::filesystem::path path = root_.path / kVersion;
  for (const std::string& name : names) path /= name;
  return path;
}

bool Store::is_skipped(const std::string& key, const std::string& name) const {
  if (skipped_count_ == 0) return false;
  const std::scoped_lock lock(mutex_);
  return skipped_.contains(shard_of(key) + name);
}

void Store::count(Counter counter, std::uint64_t amount) {
  counters_[counter].fetch_add(amount, std::memory_order_relaxed);
}

void Store::warn_once(const std::string& kind, const std::string& sentence) noexcept {
  try {
    {
      const std::scoped_lock lock(mutex_);
      if (!warned_.insert(kind).second) return;
    }
    if (warn_) warn_("cache: " + sentence);  // unlocked: it may call back
  } catch (...) {
    // A warning that cannot be given is not worth an operator's failure.
  }
}

void Store::warn_of_error(const std::string& action, int error) noexcept {
  try {
    std::string why = error == EPERM ? why_untrusted(root_.path) : "";
    if (error == EPERM && why.empty()) why = "something in it belongs to or is open to others";
    if (why.empty()) why = error_text(error);
    warn_once(action + std::to_string(error),
              "cannot " + action + " " + root_.path.string() + " (" + why +
                  "); kernels are compiled in memory; free or repair it, or set "
                  "TORCHKILN_CACHE_DIR to another directory");
  } catch (...) {
    // As above.
  }
}

}  // namespace torchkiln::cache
