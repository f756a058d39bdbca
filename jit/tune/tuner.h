// Chooses the tunables of a launch: a recorded choice, the default, or what it measures there and then.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "jit/launch/resident.h"
#include "jit/settings.h"
#include "jit/spec/template_source.h"
#include "jit/tune/records.h"
#include "jit/tune/search.h"

namespace torchkiln::jit {

// Where a choice comes from.
enum class Quality { kDefault, kNear, kExact };
const char* quality_name(Quality quality);

struct Choice {
  std::vector<std::int64_t> tunables;
  Quality quality = Quality::kDefault;
  std::string why;  // one sentence, for people
};

struct TuningState {
  TuneMode mode = TuneMode::kLookup;
  double budget_ms = 300;    // of GPU time for one key
  double total_ms = 60'000;  // for the process
};

// What one tuning did; for reports.
struct TuningReport {
  TuningRecord record;
  int points = 0, measured = 0, reused = 0;
  double gpu_ms = 0, wall_ms = 0;
  std::string stopped;  // "", "budget", "interrupted", or why nothing was measured
};

// Thread-safe; one key is measured at a time.
class Tuner {
 public:
  struct Parts {
    const Settings& settings;
    const TemplateSources& sources;
    Driver& driver;
    Residents& residents;
    Objects& objects;
    Statistics& statistics;
  };
  explicit Tuner(const Parts& parts);

  // For a launch on its device. Measures where the mode asks for it and nothing is recorded; then Error(CAPTURE) while the
  // launch's stream is captured.
  Choice choose(const Kernel& kernel, const torchkiln_problem& problem,
                const torchkiln_launch& launch);
  // The same for a device, here or not, without measuring.
  Choice look_up(const DeviceIdentity& device, const Kernel& kernel,
                 const torchkiln_problem& problem);
  // Any recorded device of this architecture, for where the device is not here.
  std::optional<DeviceIdentity> recorded_device(int architecture);

  TuningState state() const;
  void set_state(const TuningState& state);
  // Whatever was resolved before this number changed may be resolved anew.
  std::uint32_t epoch() const { return epoch_.load(std::memory_order_relaxed); }

  Records& records() { return records_; }
  void records_changed() { epoch_.fetch_add(1, std::memory_order_relaxed); }
  const DeviceIdentity& identity(int device);
  // What is measured with here; empty where there is no compiler, 0 where there is no driver.
  TuningEnvironment environment() const;

  std::vector<TuningReport> reports_since(std::size_t first);

  void before_fork();
  void after_fork();

 private:
  struct Task;

  std::optional<Choice> recorded(const DeviceIdentity& device, const Kernel& kernel,
                                 const TuningKey& key, const torchkiln_problem& problem);
  bool is_settled(const Task& task, const std::optional<TuningRecord>& present) const;
  static bool is_empty(const Task& task);
  Choice tune(const Task& task);
  TuningReport run(const Task& task, const std::optional<TuningRecord>& present);
  static void put_in_order(const Task& task, std::vector<std::size_t>& wanted);
  TuningReport measure(const Task& task, const std::optional<TuningRecord>& present);
  TuningReport report_of(const Task& task, const SearchResult& result) const;
  std::vector<Measured> known_points(const Task& task,
                                     const std::optional<TuningRecord>& present) const;
  TuningRecord record_of(const Task& task, const SearchResult& result) const;
  void refuse_in_capture(const Task& task);
  bool holds(const TuningRecord& record) const;
  double total_left() const;

  Parts parts_;
  Records records_;
  std::atomic<TuneMode> mode_;
  std::atomic<double> budget_ms_, total_ms_, spent_ms_{0};
  std::atomic<std::uint32_t> epoch_{0};
  std::atomic<int> driver_version_{0};  // 0: no device was asked for yet
  std::array<std::atomic<const DeviceIdentity*>, 64> identities_{};
  std::mutex measuring_;
  std::mutex mutex_;  // guards what follows
  std::vector<TuningReport> reports_;
};

// Recorded choices for these kernels on GPUs of an architecture, as programs: what `warm` and bundles add.
std::vector<Specialization> winners(Tuner& tuner, std::span<Kernel* const> kernels,
                                    int architecture);

}  // namespace torchkiln::jit
