// Layers and single flight.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/objects.h"

#include <chrono>
#include <iostream>
#include <new>

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

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

}  // namespace

const char* layer_name(Layer layer) {
  switch (layer) {
    case Layer::kMemory:
      return "memory";
    case Layer::kDisk:
      return "disk";
    default:
      return "compiled";
  }
}

Objects::Objects(const Settings& settings, const TemplateSources& sources, CompilerSource compilers,
                 Statistics& statistics)
    : settings_(settings),
      sources_(sources),
      compilers_(std::move(compilers)),
      statistics_(statistics),
      options_(canonical_options(settings)),
      store_(settings.cache_dir, warn),
      pool_(settings.compile_jobs) {}

std::string Objects::key_of(const Specialization& specialization, const Target& target) const {
  return cache_key(specialization, target, sources_.digest(specialization.path), options_);
}

std::optional<Found> Objects::find(const Specialization& specialization, const Target& target) {
  return find_key(key_of(specialization, target), target);
}

std::optional<Found> Objects::find_key(const std::string& key, const Target& target) {
  {
    const std::scoped_lock lock(mutex_);
    if (const auto found = memory_.find(key); found != memory_.end()) {
      Statistics::add(statistics_.hits_memory);
      return Found{key, found->second, Layer::kMemory, 0};
    }
  }
  return find_on_disk(key, target);
}

std::optional<Found> Objects::find_on_disk(const std::string& key, const Target& target) {
  if (!store_.readable()) return std::nullopt;
  const auto start = Clock::now();
  const bool exact = settings_.compiler_policy == "exact";
  auto object = store_.find(key, compiler_identity(), exact,
                            [&](const cache::Object& o) { return validate_object(o, target); });
  if (!object) return std::nullopt;
  Statistics::add(statistics_.hits_disk);
  return remember(key, std::move(*object), Layer::kDisk, milliseconds_since(start));
}

// Reading two ELF notes takes up to a millisecond: once.
std::string Objects::compiler_identity() {
  const std::scoped_lock lock(identity_mutex_);
  if (!identity_) identity_ = compilers_.identity();
  return *identity_;
}

Found Objects::remember(const std::string& key, cache::Object object, Layer layer,
                        double milliseconds) {
  auto shared = std::make_shared<const cache::Object>(std::move(object));
  const std::scoped_lock lock(mutex_);
  memory_[key] = shared;
  return {key, std::move(shared), layer, milliseconds};
}

Found Objects::get(const Specialization& specialization, const Target& target, Priority priority) {
  const std::string key = key_of(specialization, target);
  if (auto found = find_key(key, target)) return *found;
  std::promise<Found> promise;
  std::shared_future<Found> future;
  bool mine = false;
  {
    const std::scoped_lock lock(mutex_);
    if (const auto failed = failures_.find(key); failed != failures_.end())
      throw Error(failed->second);
    if (const auto found = memory_.find(key); found != memory_.end()) {
      return {key, found->second, Layer::kMemory, 0};
    }
    const auto [place, inserted] = in_flight_.try_emplace(key);
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
    promise.set_value(make(specialization, target, key, priority));
  } catch (...) {
    promise.set_exception(std::current_exception());
  }
  {
    const std::scoped_lock lock(mutex_);
    in_flight_.erase(key);
  }
  return future.get();
}

// Under the machine-wide lock of the key when there is one, so that 64 processes make one compile. Nothing depends on
// it: without a lock, or after the bound, everybody compiles and the first to publish wins.
Found Objects::make(const Specialization& specialization, const Target& target,
                    const std::string& key, Priority priority) {
  Statistics::add(statistics_.misses);
  if (!store_.writable()) return compile(specialization, target, key, priority);
  const std::string only_compiler = settings_.compiler_policy == "exact" ? compiler_identity() : "";
  bool became_ready = false;
  const auto lock = cache::wait_for_lock(
      cache::node_local_lock_file(), key, kLockBound,
      [&] { return store_.contains(key, only_compiler); }, became_ready);
  if (auto found = find_on_disk(key, target)) return *found;
  return compile(specialization, target, key, priority);
}

Found Objects::compile(const Specialization& specialization, const Target& target,
                       const std::string& key, Priority priority) {
  const auto start = Clock::now();
  const auto used = compiler();
  cache::Object object;
  try {
    object =
        pool_.run(priority, [&] { return used->compile(specialization, target, key, options_); });
  } catch (const Error& e) {
    if (e.kind() != TORCHKILN_ERROR_COMPILE) throw;
    const Error kept = keep_failure(e, settings_);
    const std::scoped_lock lock(mutex_);
    failures_.insert_or_assign(key, kept);
    throw kept;
  }
  Statistics::add(statistics_.compiles);
  const double milliseconds = milliseconds_since(start);
  Statistics::add(statistics_.compile_microseconds, static_cast<std::uint64_t>(milliseconds * 1e3));
  store_.publish(key, used->id(), object);
  if (settings_.cache_max_bytes > 0) store_.prune_if_due(settings_.cache_max_bytes);
  return remember(key, std::move(object), Layer::kCompiled, milliseconds);
}

void Objects::refuse(const Found& found, const std::string& reason) {
  Statistics::add(statistics_.refused);
  store_.quarantine(found.key, found.object->header.value("compiler", ""), reason);
  const std::scoped_lock lock(mutex_);
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
  identity_mutex_.lock();
  mutex_.lock();
  store_.before_fork();
}

void Objects::after_fork_in_parent() {
  store_.after_fork();
  mutex_.unlock();
  identity_mutex_.unlock();
}

void Objects::after_fork_in_child() {
  in_flight_.clear();
  after_fork_in_parent();
}

}  // namespace torchkiln::jit
