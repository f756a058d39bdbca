// From a specialisation to checked machine code: memory, then bundles, then the user's directory, then NVRTC; one compile
// per key in the process and in the machine. Knows no device.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/store.h"
#include "jit/compile/compiler.h"
#include "jit/compile/pool.h"
#include "jit/compile/progress.h"
#include "jit/deploy/bundles.h"
#include "jit/error.h"
#include "jit/settings.h"
#include "jit/spec/specialization.h"
#include "jit/spec/template_source.h"
#include "jit/statistics.h"

namespace torchkiln::jit {

enum class Layer { kMemory, kBundle, kDisk, kCompiled };
const char* layer_name(Layer layer);

// Whose objects will do: settings decide, or only what this process's own compiler made.
enum class Origin { kAny, kOwnCompiler };

struct Found {
  std::string key;
  std::shared_ptr<const cache::ObjectView>
      object;  // the payload of a bundle's object lies in the mapped file
  Layer layer = Layer::kMemory;
  double milliseconds = 0;
};

// Where compilers come from, so that tests can count and fake them.
struct CompilerSource {
  // Identity of the compiler that `open` would give, without opening it; empty when there is none.
  std::function<std::string()> identity;
  // Throws Error(COMPILER) when there is none.
  std::function<std::shared_ptr<const Compiler>()> open;
};

// Thread-safe. After fork() the child finds everything and compiles nothing.
class Objects {
 public:
  // `installed_bundles` names the bundles of installed packages; asked once, at the first look into bundles.
  Objects(const Settings& settings, const TemplateSources& sources, CompilerSource compilers,
          Statistics& statistics, Bundles::Source installed_bundles = {});

  // Never compiles.
  std::optional<Found> find(const Specialization& specialization, const Target& target,
                            Origin origin = Origin::kAny);
  // Compiles on a miss; throws Error(COMPILE) or Error(COMPILER). Priority::kInteractive, which launches have, heeds the
  // mode: Error(MISSING) where compiling is forbidden.
  Found get(const Specialization& specialization, const Target& target, Priority priority,
            Origin origin = Origin::kAny);
  // The driver refused this object: it is moved aside and will not be found again.
  void refuse(const Found& found, const std::string& reason);

  std::string key_of(const Specialization& specialization, const Target& target) const;
  JitMode mode() const { return mode_.load(std::memory_order_relaxed); }
  void set_mode(JitMode mode) { mode_.store(mode, std::memory_order_relaxed); }

  std::shared_ptr<const Compiler> compiler();  // opens it; throws Error(COMPILER)
  std::string compiler_identity();             // without opening it; empty when there is none
  cache::Store& store() { return store_; }
  Bundles& bundles() { return bundles_; }
  void stop_for_exit() { pool_.stop_for_exit(); }

  // Around fork(): no other thread may hold our mutexes at that moment, and their compiles do not exist in the child.
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

 private:
  struct Request {
    const Specialization& specialization;
    const Target& target;
    std::string key;
    Origin origin;
    Priority priority = Priority::kInteractive;
  };

  std::optional<Found> find(const Request& request);
  std::optional<Found> find_in_memory(const Request& request);
  std::optional<Found> find_in_bundles(const Request& request);
  std::optional<Found> find_on_disk(const Request& request);
  Found make(const Request& request);
  Found compile(const Request& request);
  void heed_mode(const Request& request) const;
  bool serves(const nlohmann::json& header, Origin origin);
  Found remember(const std::string& key, std::shared_ptr<const cache::ObjectView> object,
                 Layer layer, double milliseconds);

  const Settings& settings_;
  const TemplateSources& sources_;
  CompilerSource compilers_;
  Statistics& statistics_;
  std::vector<std::string> options_;
  std::atomic<JitMode> mode_;
  Bundles bundles_;
  cache::Store store_;
  std::mutex identity_mutex_;
  std::optional<std::string> identity_;
  CompilePool pool_;
  Progress progress_;

  std::mutex mutex_;  // guards what follows
  std::unordered_map<std::string, std::shared_ptr<const cache::ObjectView>> memory_;
  std::unordered_map<std::string, std::shared_future<Found>> in_flight_;
  std::unordered_map<std::string, Error>
      failures_;  // in this process only: a repaired driver or NVRTC starts clean
  std::set<std::string>
      refused_;  // key and compiler of objects in bundles, which cannot be moved aside
  std::shared_ptr<const Compiler> compiler_;
};

}  // namespace torchkiln::jit
