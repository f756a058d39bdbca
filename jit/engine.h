// The engine: one per process. Puts settings, templates, objects, driver and launches together.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "jit/deploy/recorder.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/launch/driver.h"
#include "jit/launch/kernel.h"
#include "jit/launch/resident.h"
#include "jit/objects.h"
#include "jit/settings.h"
#include "jit/spec/template_source.h"
#include "jit/statistics.h"
#include "jit/tune/tuner.h"

namespace torchkiln::jit {

class Engine {
 public:
  struct Parts {
    Settings settings;
    std::span<const EmbeddedFile> templates;
    std::function<CudaApi()> open_driver;
    CompilerSource compilers;
  };

  explicit Engine(Parts parts);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Made at first use from the environment, never destroyed: compile threads may outlive main().
  static Engine& instance();

  Kernel* declare(const torchkiln_declaration& declaration);
  void add_template(const std::string& path, const std::string& text) { sources_.add(path, text); }
  void run(Kernel& kernel, const torchkiln_launch& launch);
  // Throws Error(CAPTURE) when `stream` is being captured.
  void capture_guard(int device, void* stream, const std::string& what, const std::string& way_out);
  void synchronize(int device, void* stream, const std::string& what, const std::string& way_out);

  // Adds every kernel that is launched from now on, warm ones too, to the manifest; returns the recording's number.
  std::uint64_t start_recording(const std::filesystem::path& manifest);

  std::vector<Kernel*> kernels();
  // Those that an operator launches; throws Error(VALUE) with the known names when there are none.
  std::vector<const Kernel*> kernels_of(const std::string& operator_name);
  const Settings& settings() const { return settings_; }
  Statistics& statistics() { return statistics_; }
  const TemplateSources& sources() const { return sources_; }
  Objects& objects() { return objects_; }
  Driver& driver() { return driver_; }
  Recorder& recorder() { return recorder_; }
  Tuner& tuner() { return tuner_; }

  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

 private:
  struct Resolved {
    Variant variant;
    Specialization specialization;
    CudaFunction function = nullptr;
  };

  const LaunchRecord* record_for(Kernel& kernel, const torchkiln_launch& launch);
  const LaunchRecord* prepare(Kernel& kernel, const torchkiln_launch& launch, const LaunchKey& key);
  Resolved resolve(const Kernel& kernel, const torchkiln_problem& problem,
                   const torchkiln_launch& launch, bool untuned);
  std::optional<Resolved> resolve_by_substitute(const Kernel& kernel,
                                                const torchkiln_problem& problem, int device,
                                                std::span<const std::int64_t> chosen);
  void submit(const Kernel& kernel, const LaunchRecord& record, const torchkiln_launch& launch,
              const torchkiln_geometry& geometry);

  Settings settings_;
  TemplateSources sources_;
  Statistics statistics_;
  Objects objects_;
  Driver driver_;
  Residents residents_;
  Recorder recorder_;
  Tuner tuner_;
  std::atomic<std::uint32_t> recordings_{0};
  std::mutex kernels_mutex_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
};

// Site-packages folders to look for NVRTC wheels in, given once by the Python front.
void set_site_directories(std::vector<std::string> directories);
NvrtcSearch nvrtc_search(const Settings& settings);

}  // namespace torchkiln::jit
