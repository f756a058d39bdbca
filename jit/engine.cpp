// The life of one launch.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/engine.h"

#include <pthread.h>

#include "jit/driver/nvrtc_finder.h"
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
          statistics_),
      driver_(std::move(parts.open_driver)),
      residents_(driver_, objects_, statistics_) {
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

void Engine::run(Kernel& kernel, const torchkiln_launch& launch) {
  const LaunchKey key = launch_key(kernel, launch);
  const LaunchRecord* record = kernel.records.find(key);
  if (record == nullptr) record = prepare(kernel, launch, key);
  const torchkiln_problem problem = {record->device, launch.statics, launch.sizes,
                                     kernel.declaration.context};
  torchkiln_geometry geometry{};
  kernel.declaration.geometry(&problem, record->tunables.data(), &geometry);
  if (geometry.grid[0] == 0 || geometry.grid[1] == 0 || geometry.grid[2] == 0) return;
  submit(*record, launch, geometry);
}

const LaunchRecord* Engine::prepare(Kernel& kernel, const torchkiln_launch& launch,
                                    const LaunchKey& key) {
  Statistics::add(statistics_.cold_launches);
  auto record = std::make_unique<LaunchRecord>();
  record->key = key;
  record->device = &driver_.device(launch.device);
  const torchkiln_problem problem = {record->device, launch.statics, launch.sizes,
                                     kernel.declaration.context};
  const auto tunables = choose_tunables(kernel, problem);
  std::copy(tunables.begin(), tunables.end(), record->tunables.begin());
  const auto specialization =
      specialize(kernel, std::span(launch.statics, kernel.n_statics), tunables);
  record->text = specialization.text();
  record->function = residents_.function(specialization, launch.device);
  return kernel.records.add(std::move(record));
}

void Engine::submit(const LaunchRecord& record, const torchkiln_launch& launch,
                    const torchkiln_geometry& g) {
  const CudaApi& cuda = driver_.api();
  // The driver copies the arguments before it returns and does not write to them.
  void* arguments[] = {const_cast<void*>(launch.args)};
  const auto try_launch = [&] {
    return cuda.cuLaunchKernel(record.function, g.grid[0], g.grid[1], g.grid[2], g.block[0],
                               g.block[1], g.block[2], g.dynamic_shared_bytes,
                               static_cast<CudaStream>(launch.stream), arguments, nullptr);
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
  objects_.before_fork();
  site_directories().mutex.lock();  // taken while the identity of the compiler is found
}
void Engine::after_fork_in_parent() {
  site_directories().mutex.unlock();
  objects_.after_fork_in_parent();
  kernels_mutex_.unlock();
}
void Engine::after_fork_in_child() {
  site_directories().mutex.unlock();
  objects_.after_fork_in_child();
  kernels_mutex_.unlock();
}

}  // namespace torchkiln::jit
