// Layers and single flight.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/objects.h"

#include <algorithm>
#include <chrono>

#include "cache/lock.h"
#include "jit/compile/failure.h"
#include "jit/compile/options.h"
#include "jit/log.h"
#include "jit/spec/key.h"

namespace torchkiln::jit {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than any healthy compile: after it, compiling twice beats waiting for a stopped process.
constexpr std::chrono::milliseconds kLockBound{30'000};

// How often a waiting thread looks whether its wait is worth a line.
constexpr std::chrono::milliseconds kProgressTick{100};

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::string compiler_of(const nlohmann::json& header) { return header.value("compiler", ""); }

std::string refusal_id(const std::string& key, const nlohmann::json& header) {
  return key + "." + compiler_of(header);
}

// An object that owns its payload.
std::shared_ptr<const cache::ObjectView> own(cache::Object object) {
  struct Owned {
    std::string payload;
    cache::ObjectView view;
  };
  auto owned = std::make_shared<Owned>();
  owned->payload = std::move(object.payload);
  owned->view = {std::move(object.header), owned->payload};
  return {owned, &owned->view};
}

}  // namespace

const char* layer_name(Layer layer) {
  switch (layer) {
    case Layer::kMemory:
      return "memory";
    case Layer::kBundle:
      return "bundle";
    case Layer::kDisk:
      return "disk";
    default:
      return "compiled";
  }
}

Objects::Objects(const Settings& settings, const TemplateSources& sources, CompilerSource compilers,
                 Statistics& statistics, Bundles::Source installed_bundles)
    : settings_(settings),
      sources_(sources),
      compilers_(std::move(compilers)),
      statistics_(statistics),
      options_(canonical_options(settings)),
      mode_(parse_jit_mode(settings.jit)),
      bundles_(settings.bundles, std::move(installed_bundles)),
      store_(settings.cache_dir, warn),
      pool_(settings.compile_jobs),
      progress_([](const std::string& line) { log(TORCHKILN_LOG_INFO, line); }) {}

std::string Objects::key_of(const Specialization& specialization, const Target& target) const {
  return cache_key(specialization, target, sources_.digest(specialization.path), options_);
}

std::optional<Found> Objects::find(const Specialization& specialization, const Target& target,
                                   Origin origin) {
  return find({specialization, target, key_of(specialization, target), origin});
}

std::optional<Found> Objects::find(const Request& request) {
  if (auto found = find_in_memory(request)) return found;
  if (auto found = find_in_bundles(request)) return found;
  return find_on_disk(request);
}

bool Objects::serves(const nlohmann::json& header, Origin origin) {
  const bool any = origin == Origin::kAny && settings_.compiler_policy != "exact";
  return any || compiler_of(header) == compiler_identity();
}

std::optional<Found> Objects::find_in_memory(const Request& request) {
  std::shared_ptr<const cache::ObjectView> object;
  {
    const std::scoped_lock lock(mutex_);
    if (const auto found = memory_.find(request.key); found != memory_.end()) {
      object = found->second;
    }
  }
  if (!object || !serves(object->header, request.origin)) return std::nullopt;
  Statistics::add(statistics_.hits_memory);
  return Found{request.key, std::move(object), Layer::kMemory, 0};
}

std::optional<Found> Objects::find_in_bundles(const Request& request) {
  const auto start = Clock::now();
  auto objects = bundles_.find(request.key, [&](const cache::ObjectView& o) {
    return validate_code(o.header, o.payload, request.target);
  });
  {
    const std::scoped_lock lock(mutex_);
    std::erase_if(objects, [&](const cache::ObjectView& o) {
      return refused_.contains(refusal_id(request.key, o.header));
    });
  }
  std::erase_if(objects, [&](const auto& o) { return !serves(o.header, request.origin); });
  if (objects.empty()) return std::nullopt;
  // Who our compiler is costs a search for it: asked only where there is a choice.
  auto best = objects.begin();
  if (objects.size() > 1) {
    const auto ours = std::find_if(objects.begin(), objects.end(), [&](const auto& o) {
      return compiler_of(o.header) == compiler_identity();
    });
    if (ours != objects.end()) best = ours;
  }
  Statistics::add(statistics_.hits_bundle);
  return remember(request.key, std::make_shared<const cache::ObjectView>(std::move(*best)),
                  Layer::kBundle, milliseconds_since(start));
}

std::optional<Found> Objects::find_on_disk(const Request& request) {
  if (!store_.readable()) return std::nullopt;
  const auto start = Clock::now();
  const bool exact = request.origin == Origin::kOwnCompiler || settings_.compiler_policy == "exact";
  auto object = store_.find(request.key, compiler_identity(), exact, [&](const cache::Object& o) {
    return validate_code(o.header, o.payload, request.target);
  });
  if (!object) return std::nullopt;
  Statistics::add(statistics_.hits_disk);
  return remember(request.key, own(std::move(*object)), Layer::kDisk, milliseconds_since(start));
}

// Reading two ELF notes takes up to a millisecond: once.
std::string Objects::compiler_identity() {
  const std::scoped_lock lock(identity_mutex_);
  if (!identity_) identity_ = compilers_.identity();
  return *identity_;
}

Found Objects::remember(const std::string& key, std::shared_ptr<const cache::ObjectView> object,
                        Layer layer, double milliseconds) {
  const std::scoped_lock lock(mutex_);
  memory_[key] = object;
  return {key, std::move(object), layer, milliseconds};
}

Found Objects::get(const Specialization& specialization, const Target& target, Priority priority,
                   Origin origin) {
  const Request request{specialization, target, key_of(specialization, target), origin, priority};
  if (auto found = find(request)) return *found;
  std::promise<Found> promise;
  std::shared_future<Found> future;
  bool mine = false;
  {
    const std::scoped_lock lock(mutex_);
    if (const auto failed = failures_.find(request.key); failed != failures_.end())
      throw Error(failed->second);
    const auto [place, inserted] = in_flight_.try_emplace(request.key);
    if (inserted) place->second = promise.get_future().share();
    future = place->second;
    mine = inserted;
  }
  if (!mine) {
    Found found = future.get();
    found.layer = Layer::kMemory;  // somebody else's work
    return found;
  }
  try {
    // Whoever had it in flight may have finished since we looked.
    auto found = find_in_memory(request);
    promise.set_value(found ? std::move(*found) : make(request));
  } catch (...) {
    promise.set_exception(std::current_exception());
  }
  {
    const std::scoped_lock lock(mutex_);
    in_flight_.erase(request.key);
  }
  return future.get();
}

void Objects::heed_mode(const Request& request) const {
  const JitMode mode = this->mode();
  if (request.priority != Priority::kInteractive || mode == JitMode::kAllow) return;
  const std::string text = request.specialization.text() + "@" + request.target.text();
  if (mode == JitMode::kForbid) {
    throw Error(TORCHKILN_ERROR_MISSING,
                text + " is in no bundle and not in the cache, and compiling is forbidden.");
  }
  warn(text + " is compiled although it should have been there already (mode warn)");
}

// Under the machine-wide lock of the key when there is one, so that 64 processes make one compile. Nothing depends on
// it: without a lock, or after the bound, everybody compiles and the first to publish wins.
Found Objects::make(const Request& request) {
  heed_mode(request);
  Statistics::add(statistics_.misses);
  if (!store_.writable()) return compile(request);
  const bool exact = request.origin == Origin::kOwnCompiler || settings_.compiler_policy == "exact";
  const std::string only_compiler = exact ? compiler_identity() : "";
  bool became_ready = false;
  const auto lock = cache::wait_for_lock(
      cache::node_local_lock_file(), request.key, kLockBound,
      [&] { return store_.contains(request.key, only_compiler); }, became_ready);
  if (auto found = find_on_disk(request)) return *found;
  return compile(request);
}

Found Objects::compile(const Request& request) {
  const auto start = Clock::now();
  const auto used = compiler();
  cache::Object object;
  try {
    const auto compiled = pool_.submit(request.priority, [&] {
      return used->compile(request.specialization, request.target, request.key, options_);
    });
    if (request.priority == Priority::kInteractive) {
      Progress::Compile waiting(progress_,
                                request.specialization.text() + "@" + request.target.text());
      while (compiled.wait_for(kProgressTick) == std::future_status::timeout) waiting.tick();
    }
    object = compiled.get();
  } catch (const Error& e) {
    if (e.kind() != TORCHKILN_ERROR_COMPILE) throw;
    const Error kept = keep_failure(e, settings_);
    const std::scoped_lock lock(mutex_);
    failures_.insert_or_assign(request.key, kept);
    throw kept;
  }
  Statistics::add(statistics_.compiles);
  const double milliseconds = milliseconds_since(start);
  Statistics::add(statistics_.compile_microseconds, static_cast<std::uint64_t>(milliseconds * 1e3));
  store_.publish(request.key, used->id(), object);
  if (settings_.cache_max_bytes > 0) store_.prune_if_due(settings_.cache_max_bytes);
  return remember(request.key, own(std::move(object)), Layer::kCompiled, milliseconds);
}

void Objects::refuse(const Found& found, const std::string& reason) {
  Statistics::add(statistics_.refused);
  store_.quarantine(found.key, compiler_of(found.object->header), reason);
  const std::scoped_lock lock(mutex_);
  refused_.insert(refusal_id(found.key, found.object->header));
  memory_.erase(found.key);
}

std::shared_ptr<const Compiler> Objects::compiler() {
  {
    const std::scoped_lock lock(mutex_);
    if (compiler_) return compiler_;
  }
  // May take 100 ms: not under the mutex. In the pool: at exit the process must not take down the
  // libraries while one of them is being opened.
  auto opened = pool_.run(Priority::kInteractive, [&] { return compilers_.open(); });
  const std::scoped_lock lock(mutex_);
  if (!compiler_) {
    compiler_ = std::move(opened);
    Statistics::add(statistics_.nvrtc_opened);
  }
  return compiler_;
}

void Objects::before_fork() {
  bundles_.before_fork();
  identity_mutex_.lock();
  mutex_.lock();
  store_.before_fork();
}

void Objects::after_fork_in_parent() {
  store_.after_fork();
  mutex_.unlock();
  identity_mutex_.unlock();
  bundles_.after_fork();
}

void Objects::after_fork_in_child() {
  in_flight_.clear();
  after_fork_in_parent();
}

}  // namespace torchkiln::jit
