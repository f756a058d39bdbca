// The life of one launch.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/engine.h"

#include <pthread.h>

#include <set>

#include "jit/deploy/bundles.h"
#include "jit/deploy/missing.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/launch/submit.h"
#include "jit/launch/user_kernel.h"
#include "jit/log.h"

namespace torchkiln::jit {
namespace {

struct SiteDirectories {
  std::mutex mutex;
  std::vector<std::string> paths;
};

SiteDirectories& site_directories() {
  static SiteDirectories& instance = *new SiteDirectories;
  return instance;
}

// The real compiler: the first candidate on this machine.
CompilerSource real_compilers(const Settings& settings, const TemplateSources& sources) {
  return {.identity =
              [&settings] {
                const auto found = nvrtc_search(settings).find();
                return found.empty() ? std::string() : found.front().compiler_id();
              },
          .open =
              [&settings, &sources] {
                return std::make_shared<const Compiler>(open_nvrtc(nvrtc_search(settings)),
                                                        sources);
              }};
}

std::vector<std::string> installed_bundles_of_process() {
  const std::scoped_lock lock(site_directories().mutex);
  return installed_bundles(site_directories().paths);
}

// The context of a launch's device. The library's own operators have made it current before they ask for their kernel.
class OnDevice {
 public:
  OnDevice(Driver& driver, const Kernel& kernel, int device)
      : driver_(driver), before_(kernel.is_user ? driver.enter(device) : nullptr) {}
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { driver_.leave(before_); }

 private:
  Driver& driver_;
  CudaContext before_;
};

std::string launch_text(const LaunchRecord& record, const torchkiln_geometry& g) {
  const auto triple = [](const std::uint32_t* v) {
    return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
  };
  return record.text + " with grid " + triple(g.grid) + ", block " + triple(g.block) + ", " +
         std::to_string(g.dynamic_shared_bytes) + " bytes of dynamic shared memory";
}

}  // namespace

NvrtcSearch nvrtc_search(const Settings& settings) {
  SiteDirectories& site = site_directories();
  const std::scoped_lock lock(site.mutex);
  return NvrtcSearch::of_process(settings, site.paths);
}

void set_site_directories(std::vector<std::string> directories) {
  const std::scoped_lock lock(site_directories().mutex);
  site_directories().paths = std::move(directories);
}

Engine::Engine(Parts parts)
    : settings_(std::move(parts.settings)),
      sources_(parts.templates),
      objects_(
          settings_, sources_,
          parts.compilers.open ? std::move(parts.compilers) : real_compilers(settings_, sources_),
          statistics_, &installed_bundles_of_process),
      driver_(std::move(parts.open_driver)),
      residents_(driver_, objects_, statistics_),
      recorder_(settings_.record),
      tuner_({settings_, sources_, driver_, residents_, objects_, statistics_}) {
  for (const std::string& sentence : settings_.warnings) warn(sentence);
}

Engine& Engine::instance() {
  static Engine& engine = [&]() -> Engine& {
    auto& made = *new Engine({.settings = Settings::from_environment(),
                              .templates = embedded_files(),
                              .open_driver = &load_cuda_api,
                              .compilers = {}});
    pthread_atfork([] { instance().before_fork(); }, [] { instance().after_fork_in_parent(); },
                   [] { instance().after_fork_in_child(); });
    return made;
  }();
  return engine;
}

Kernel* Engine::declare(const torchkiln_declaration& declaration) {
  auto kernel = std::make_unique<Kernel>(declaration);
  if (kernel->is_user) {
    check_user_kernel(*kernel, sources_, kernels());
    sources_.use(declaration.path);
  }
  const std::scoped_lock lock(kernels_mutex_);
  kernels_.push_back(std::move(kernel));
  return kernels_.back().get();
}

std::vector<Kernel*> Engine::kernels() {
  const std::scoped_lock lock(kernels_mutex_);
  std::vector<Kernel*> result;
  for (const auto& kernel : kernels_) result.push_back(kernel.get());
  return result;
}

std::vector<const Kernel*> Engine::kernels_of(const std::string& operator_name) {
  std::vector<const Kernel*> result;
  std::set<std::string> known;
  for (const Kernel* kernel : kernels()) {
    const auto* names = kernel->declaration.operators;
    known.insert(names, names + kernel->declaration.n_operators);
    if (launches_for(*kernel, operator_name)) result.push_back(kernel);
  }
  if (!result.empty()) return result;
  std::string list;
  for (const std::string& name : known) list += (list.empty() ? "" : ", ") + name;
  throw Error(TORCHKILN_ERROR_VALUE, "ops must be among " + list + "; got " + operator_name, {},
              "ops");
}

void Engine::run(Kernel& kernel, const torchkiln_launch& launch) {
  const OnDevice on_device(driver_, kernel, launch.device);
  const LaunchRecord* record = record_for(kernel, launch);
  const torchkiln_problem problem = {record->device, record->statics.data(), launch.sizes,
                                     kernel.declaration.context};
  torchkiln_geometry geometry{};
  kernel.declaration.geometry(&problem, record->tunables.data(), &geometry);
  if (geometry.grid[0] == 0 || geometry.grid[1] == 0 || geometry.grid[2] == 0) return;
  submit(kernel, *record, launch, geometry);
}

// Sizes count by their buckets, but for what depends on them all: which default is for them, and whether what was tuned for
// the buckets can run them. Users' kernels are not asked: their functions may take Python's lock.
const LaunchRecord* Engine::record_for(Kernel& kernel, const torchkiln_launch& launch) {
  const auto ready = [&](const LaunchKey& key) {
    const LaunchRecord* known = kernel.records.find(key);
    return known != nullptr ? known : prepare(kernel, launch, key);
  };
  LaunchKey key = launch_key(kernel, launch);
  key.epoch = recordings_.load(std::memory_order_relaxed) + tuner_.epoch();  // both only grow
  if (kernel.is_user) return ready(key);
  torchkiln_problem problem = {&driver_.device(launch.device), launch.statics, launch.sizes,
                               kernel.declaration.context};
  if (kernel.declaration.n_defaults > 1) key.default_row = default_row(kernel, problem);
  const LaunchRecord* record = ready(key);
  problem.statics = record->statics.data();
  if (record->is_default || is_legal(kernel, problem, record->tunables)) return record;
  key.untuned = true;
  return ready(key);
}

const LaunchRecord* Engine::prepare(Kernel& kernel, const torchkiln_launch& launch,
                                    const LaunchKey& key) {
  Statistics::add(statistics_.cold_launches);
  auto record = std::make_unique<LaunchRecord>();
  record->key = key;
  record->device = &driver_.device(launch.device);
  const torchkiln_problem problem = {record->device, launch.statics, launch.sizes,
                                     kernel.declaration.context};
  Resolved resolved = resolve(kernel, problem, launch, key.untuned);
  std::copy(resolved.variant.statics.begin(), resolved.variant.statics.end(),
            record->statics.begin());
  std::copy(resolved.variant.tunables.begin(), resolved.variant.tunables.end(),
            record->tunables.begin());
  const auto standard = tunables_of_row(kernel, key.default_row);
  record->is_default = std::equal(standard.begin(), standard.end(), record->tunables.begin());
  record->text = resolved.specialization.text();
  record->function = resolved.function;
  if (kernel.is_user) record->limits = residents_.limits(resolved.function, launch.device);
  return kernel.records.add(std::move(record));
}

// The program that was asked for; where it is missing and cannot be compiled, another one with the same answer.
Engine::Resolved Engine::resolve(const Kernel& kernel, const torchkiln_problem& problem,
                                 const torchkiln_launch& launch, bool untuned) {
  const std::span statics(problem.statics, kernel.n_statics);
  const int device = launch.device;
  std::vector<std::int64_t> tunables;
  if (untuned) {
    const auto standard = choose_tunables(kernel, problem);
    tunables.assign(standard.begin(), standard.end());
  } else {
    tunables = tuner_.choose(kernel, problem, launch).tunables;
  }
  Resolved exact{{{statics.begin(), statics.end()}, {tunables.begin(), tunables.end()}},
                 specialize(kernel, statics, tunables)};
  recorder_.note(exact.specialization.text());
  std::optional<Error> no_compiler;
  if (objects_.mode() == JitMode::kForbid) {
    if (const auto function = residents_.find(exact.specialization, device)) {
      exact.function = *function;
      return exact;
    }
  } else {
    try {
      exact.function = residents_.function(exact.specialization, device);
      return exact;
    } catch (const Error& e) {
      // MISSING: sealed by another thread in the meantime.
      if (e.kind() != TORCHKILN_ERROR_COMPILER && e.kind() != TORCHKILN_ERROR_MISSING) throw;
      if (e.kind() == TORCHKILN_ERROR_COMPILER) no_compiler = e;
    }
  }
  if (auto substitute = resolve_by_substitute(kernel, problem, device, tunables)) {
    Statistics::add(statistics_.generic_variants);
    return std::move(*substitute);
  }
  Statistics::add(statistics_.missing);
  if (no_compiler) throw Error(*no_compiler);
  throw missing_kernel(objects_, kernel, exact.specialization, *problem.device);
}

std::optional<Engine::Resolved> Engine::resolve_by_substitute(
    const Kernel& kernel, const torchkiln_problem& problem, int device,
    std::span<const std::int64_t> chosen) {
  for (Variant& variant : substitutes(kernel, problem, chosen)) {
    auto specialization = specialize(kernel, variant.statics, variant.tunables);
    if (const auto function = residents_.find(specialization, device)) {
      return Resolved{std::move(variant), std::move(specialization), *function};
    }
  }
  return std::nullopt;
}

std::uint64_t Engine::start_recording(const std::filesystem::path& manifest) {
  const auto recording = recorder_.start(manifest);
  recordings_.fetch_add(1, std::memory_order_relaxed);  // what is warm already is met again
  return recording;
}

void Engine::submit(const Kernel& kernel, const LaunchRecord& record,
                    const torchkiln_launch& launch, const torchkiln_geometry& g) {
  if (kernel.is_user) check_limits(record.limits, g, record.text);
  const CudaApi& cuda = driver_.api();
  const auto try_launch = [&] {
    return submit_kernel(cuda, record.function, g, launch.stream, launch.args,
                         kernel.declaration.args_size);
  };
  CudaResult code = try_launch();
  if (code == kCudaInvalidContext) {  // a thread that never used CUDA
    driver_.attach(launch.device);
    code = try_launch();
  }
  if (code != kCudaSuccess) check(cuda, code, "cuLaunchKernel", launch_text(record, g));
  Statistics::add(statistics_.launches);
}

void Engine::capture_guard(int device, void* stream, const std::string& what,
                           const std::string& way_out) {
  driver_.attach(device);  // a thread that has launched on a stream of its own may still have none
  if (!driver_.is_capturing(stream)) return;
  throw Error(TORCHKILN_ERROR_CAPTURE,
              what + " must not happen while the stream is captured into a CUDA graph. " + way_out);
}

void Engine::synchronize(int device, void* stream, const std::string& what,
                         const std::string& way_out) {
  capture_guard(device, stream, what, way_out);
  check(driver_.api(), driver_.api().cuStreamSynchronize(static_cast<CudaStream>(stream)),
        "cuStreamSynchronize", what);
}

void Engine::before_fork() {
  kernels_mutex_.lock();
  sources_.before_fork();
  recorder_.before_fork();
  tuner_.before_fork();
  objects_.before_fork();
  site_directories().mutex.lock();  // taken while the identity of the compiler is found
}
void Engine::after_fork_in_parent() {
  site_directories().mutex.unlock();
  objects_.after_fork_in_parent();
  tuner_.after_fork();
  recorder_.after_fork();
  sources_.after_fork();
  kernels_mutex_.unlock();
}
void Engine::after_fork_in_child() {
  site_directories().mutex.unlock();
  objects_.after_fork_in_child();
  tuner_.after_fork();
  recorder_.after_fork();
  sources_.after_fork();
  kernels_mutex_.unlock();
  log_after_fork_in_child();
}

}  // namespace torchkiln::jit
