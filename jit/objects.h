// From a specialisation to checked machine code: memory, then the user's directory, then NVRTC; one compile per key in
// the process and in the machine. Knows no device.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/store.h"
#include "jit/compile/compiler.h"
#include "jit/compile/pool.h"
#include "jit/error.h"
#include "jit/settings.h"
#include "jit/spec/specialization.h"
#include "jit/spec/template_source.h"
#include "jit/statistics.h"

namespace torchkiln::jit {

enum class Layer { kMemory, kDisk, kCompiled };
const char* layer_name(Layer layer);

struct Found {
  std::string key;
  std::shared_ptr<const cache::Object> object;
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
  Objects(const Settings& settings, const TemplateSources& sources, CompilerSource compilers,
          Statistics& statistics);

  // Never compiles.
  std::optional<Found> find(const Specialization& specialization, const Target& target);
  // Compiles on a miss; throws Error(COMPILE) or Error(COMPILER).
  Found get(const Specialization& specialization, const Target& target, Priority priority);
  // The driver refused this object: it is moved aside and will not be found again.
  void refuse(const Found& found, const std::string& reason);

  std::shared_ptr<const Compiler> compiler();  // opens it; throws Error(COMPILER)
  cache::Store& store() { return store_; }
  void stop_for_exit() { pool_.stop_for_exit(); }

  // Around fork(): no other thread may hold our mutex at that moment, and their compiles do not exist in the child.
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

 private:
  std::string key_of(const Specialization& specialization, const Target& target) const;
  std::optional<Found> find_key(const std::string& key, const Target& target);
  std::optional<Found> find_on_disk(const std::string& key, const Target& target);
  Found make(const Specialization& specialization, const Target& target, const std::string& key,
             Priority priority);
  Found compile(const Specialization& specialization, const Target& target, const std::string& key,
                Priority priority);
  std::string compiler_identity();
  Found remember(const std::string& key, cache::Object object, Layer layer, double milliseconds);

  const Settings& settings_;
  const TemplateSources& sources_;
  CompilerSource compilers_;
  Statistics& statistics_;
  std::vector<std::string> options_;
  cache::Store store_;
  std::mutex identity_mutex_;
  std::optional<std::string> identity_;
  CompilePool pool_;

  std::mutex mutex_;  // guards what follows
  std::unordered_map<std::string, std::shared_ptr<const cache::Object>> memory_;
  std::unordered_map<std::string, std::shared_future<Found>> in_flight_;
  std::unordered_map<std::string, Error>
      failures_;  // in this process only: a repaired driver or NVRTC starts clean
  std::shared_ptr<const Compiler> compiler_;
};

}  // namespace torchkiln::jit
