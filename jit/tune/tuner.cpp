// Modes, budgets, records and the search put together.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/tuner.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "jit/compile/pool.h"
#include "jit/deploy/manifest.h"
#include "jit/log.h"
#include "jit/tune/gpu_bench.h"

namespace torchkiln::jit {

// One key to be measured.
struct Tuner::Task {
  const Kernel& kernel;
  const torchkiln_problem& problem;
  const torchkiln_launch& launch;
  const DeviceIdentity& device;
  TuningKey key;
  std::vector<std::vector<std::int64_t>> points = {};
  std::size_t standard = 0;  // its number
};

namespace {

using Clock = std::chrono::steady_clock;

std::string percent(double share) {
  const int tenths = static_cast<int>(share * 1000 + 0.5);
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " %";
}

// 13.0 out of nvrtc-13.0-<build>.
std::string version_of(const std::string& compiler) {
  const std::size_t begin = compiler.find('-');
  if (begin == compiler.npos) return compiler;
  return compiler.substr(begin + 1, compiler.find('-', begin + 1) - begin - 1);
}

std::string why_recorded(const Match& match, const TuningEnvironment& now) {
  const TuningRecord& r = match.record;
  std::string text =
      match.distance == 0
          ? "recorded for these sizes"
          : "recorded for near sizes (" + std::to_string(match.distance) + " powers of two apart)";
  text += r.gain() > 0 ? ", " + percent(r.gain()) + " less time than the default"
                       : ", nothing beat the default";
  if (!r.complete) text += "; the search did not come to its end";
  for (const auto& [field, then, here] : changes(r.environment, now))
    text += "; measured with " + field + " " + then + ", now " + here;
  return text;
}

}  // namespace

const char* quality_name(Quality quality) {
  switch (quality) {
    case Quality::kExact:
      return "exact";
    case Quality::kNear:
      return "near";
    default:
      return "default";
  }
}

Tuner::Tuner(const Parts& parts)
    : parts_(parts),
      records_(parts.objects.store(), parts.objects.bundles()),
      mode_(parse_tune_mode(parts.settings.tune)),
      budget_ms_(parts.settings.tune_budget_ms),
      total_ms_(parts.settings.tune_total_ms) {}

TuningState Tuner::state() const { return {mode_, budget_ms_, total_ms_}; }

void Tuner::set_state(const TuningState& state) {
  mode_ = state.mode;
  budget_ms_ = state.budget_ms;
  total_ms_ = state.total_ms;
  records_changed();
}

double Tuner::total_left() const { return total_ms_ - spent_ms_; }

const DeviceIdentity& Tuner::identity(int device) {
  auto& slot = identities_.at(static_cast<std::size_t>(device));
  if (const auto* known = slot.load(std::memory_order_acquire)) return *known;
  driver_version_ = parts_.driver.version();
  auto made = std::make_unique<const DeviceIdentity>(query_identity(parts_.driver.api(), device));
  const DeviceIdentity* expected = nullptr;
  // Lives as long as the process.
  if (slot.compare_exchange_strong(expected, made.get())) return *made.release();
  return *expected;
}

TuningEnvironment Tuner::environment() const {
  TuningEnvironment now{version_of(parts_.objects.compiler_identity()), 0, TORCHKILN_VERSION};
  try {
    now.driver = parts_.driver.version();
  } catch (const Error&) {  // unknown
  }
  return now;
}

std::optional<Choice> Tuner::recorded(const DeviceIdentity& device, const Kernel& kernel,
                                      const TuningKey& key, const torchkiln_problem& problem) {
  auto match = records_.find(device, kernel, key, problem);
  if (!match) return std::nullopt;
  const TuningEnvironment now{
      .compiler = {}, .driver = driver_version_, .library = TORCHKILN_VERSION};
  return Choice{std::move(match->tunables), match->distance == 0 ? Quality::kExact : Quality::kNear,
                why_recorded(*match, now)};
}

Choice Tuner::look_up(const DeviceIdentity& device, const Kernel& kernel,
                      const torchkiln_problem& problem) {
  if (mode_ != TuneMode::kOff && kernel.n_tunables > 0) {
    const TuningKey key = tuning_key(kernel, parts_.sources.digest(kernel.declaration.path),
                                     {problem.statics, kernel.n_statics},
                                     {problem.sizes, kernel.declaration.n_sizes});
    if (auto choice = recorded(device, kernel, key, problem)) return *choice;
  }
  const auto standard = choose_tunables(kernel, problem);
  return {{standard.begin(), standard.end()},
          Quality::kDefault,
          kernel.declaration.n_defaults == 1 ? "the only default"
                                             : "the default for these sizes on this device"};
}

std::optional<DeviceIdentity> Tuner::recorded_device(int architecture) {
  for (const Placed& placed : records_.all()) {
    if (placed.device.architecture == architecture) return placed.device;
  }
  return std::nullopt;
}

Choice Tuner::choose(const Kernel& kernel, const torchkiln_problem& problem,
                     const torchkiln_launch& launch) {
  // Where there is nothing to choose, nobody needs to know the device's name.
  if (mode_ == TuneMode::kOff || kernel.n_tunables == 0) return look_up({}, kernel, problem);
  const DeviceIdentity& device = identity(launch.device);
  // Candidates are compiled, and mostly for nothing.
  const bool may_compile = parts_.objects.mode() != JitMode::kForbid;
  if (mode_ != TuneMode::kTune || !may_compile) return look_up(device, kernel, problem);
  const auto digest = parts_.sources.digest(kernel.declaration.path);
  Task task{kernel, problem, launch, device,
            tuning_key(kernel, digest, {problem.statics, kernel.n_statics},
                       {problem.sizes, kernel.declaration.n_sizes})};
  task.points = legal_points(kernel, problem);
  const auto standard = choose_tunables(kernel, problem);
  const auto found = std::find(task.points.begin(), task.points.end(),
                               std::vector<std::int64_t>(standard.begin(), standard.end()));
  task.standard = static_cast<std::size_t>(found - task.points.begin());
  if (found == task.points.end()) task.points.emplace_back(standard.begin(), standard.end());
  return tune(task);
}

// Whether its times were measured in this environment.
bool Tuner::holds(const TuningRecord& record) const {
  return changes(record.environment, environment()).empty();
}

// Nothing is left to be measured: every point is known, by this compiler and driver.
bool Tuner::is_settled(const Task& task, const std::optional<TuningRecord>& present) const {
  if (!present || !present->complete || !holds(*present)) return false;
  return std::all_of(task.points.begin(), task.points.end(), [&](const auto& point) {
    return present->find(named(task.kernel, point)) != nullptr;
  });
}

// Launches that launch nothing tell nothing.
bool Tuner::is_empty(const Task& task) {
  torchkiln_geometry g{};
  task.kernel.declaration.geometry(&task.problem, task.points[task.standard].data(), &g);
  return g.grid[0] == 0 || g.grid[1] == 0 || g.grid[2] == 0;
}

Choice Tuner::tune(const Task& task) {
  const std::scoped_lock one_at_a_time(measuring_);
  auto present = records_.exact(task.device, task.key);
  if (!is_settled(task, present) && total_left() > 0 && budget_ms_ > 0 && !is_empty(task)) {
    refuse_in_capture(task);
    TuningReport report = run(task, present);
    spent_ms_ = spent_ms_ + report.gpu_ms;
    Statistics::add(parts_.statistics.tunings);
    Statistics::add(parts_.statistics.tuning_gpu_microseconds,
                    static_cast<std::uint64_t>(1e3 * report.gpu_ms));
    const std::scoped_lock lock(mutex_);
    reports_.push_back(std::move(report));
  }
  return look_up(task.device, task.kernel, task.problem);
}

void Tuner::refuse_in_capture(const Task& task) {
  parts_.driver.attach(task.launch.device);
  if (!parts_.driver.is_capturing(task.launch.stream)) return;
  throw Error(TORCHKILN_ERROR_CAPTURE,
              "tuning " + task.key.kernel +
                  " must not happen while the stream is captured into a CUDA graph. Call the "
                  "operator once with these sizes before the capture, or leave autotune() first.");
}

// What is known of each point by this compiler and driver; the rest is to be measured.
std::vector<Measured> Tuner::known_points(const Task& task,
                                          const std::optional<TuningRecord>& present) const {
  std::vector<Measured> known(task.points.size());
  if (!present || !holds(*present)) return known;
  // Ratios are relative to the default, which another version may have changed.
  if (present->standard != named(task.kernel, task.points[task.standard])) return known;
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (const Trial* t = present->find(named(task.kernel, task.points[i])))
      known[i] = {t->ratio, t->noise, t->samples, t->failure, t->spill_bytes};
  }
  return known;
}

TuningReport Tuner::report_of(const Task& task, const SearchResult& result) const {
  TuningReport report;
  report.record = record_of(task, result);
  report.points = static_cast<int>(task.points.size());
  report.measured = result.measured;
  report.stopped = result.stopped;
  return report;
}

TuningReport Tuner::run(const Task& task, const std::optional<TuningRecord>& present) {
  const auto start = Clock::now();
  SearchResult unmeasured{.points = std::vector<Measured>(task.points.size()),
                          .best = task.standard};
  unmeasured.points[task.standard] = {.ratio = 1, .samples = 1};
  TuningReport report;
  try {
    report = task.points.size() == 1 ? report_of(task, unmeasured) : measure(task, present);
  } catch (const Error& error) {
    // Tuning is never worth an operator's failure.
    warn(task.key.kernel + " is not tuned: " + error.what());
    unmeasured.stopped = error.what();
    return report_of(task, unmeasured);
  }
  report.wall_ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  if (const int error = records_.save(task.device, report.record))
    warn("tuning records cannot be written (" + cache::error_text(error) +
         "); they are used until the process ends");
  return report;
}

// Of a large space the budget sees a part only: first the neighbours of the default, which differ in one tunable, then
// points from all over it, the same ones every time.
void Tuner::put_in_order(const Task& task, std::vector<std::size_t>& wanted) {
  const auto& standard = task.points[task.standard];
  const auto is_neighbour = [&](std::size_t i) {
    int different = 0;
    for (std::size_t t = 0; t < standard.size(); ++t) different += task.points[i][t] != standard[t];
    return different == 1;
  };
  std::mt19937 random;  // NOLINT: its seed is always the same, on purpose
  std::shuffle(wanted.begin(), wanted.end(), random);
  std::stable_partition(wanted.begin(), wanted.end(), is_neighbour);
}

TuningReport Tuner::measure(const Task& task, const std::optional<TuningRecord>& present) {
  std::vector<Measured> known = known_points(task, present);
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (i != task.standard && known[i].samples == 0 && known[i].failure.empty())
      wanted.push_back(i);
  }
  const int reused = static_cast<int>(task.points.size() - wanted.size()) - 1;
  put_in_order(task, wanted);
  const unsigned jobs =
      parts_.settings.compile_jobs != 0 ? parts_.settings.compile_jobs : default_compile_jobs();
  GpuBench bench(parts_.driver, parts_.residents, {task.kernel, task.problem, task.launch},
                 task.points, task.standard, std::move(wanted), jobs);
  TuningReport report = report_of(task, search(bench, task.standard, std::move(known),
                                               std::min<double>(budget_ms_, total_left())));
  report.reused = reused;
  report.gpu_ms = bench.gpu_milliseconds();
  return report;
}

TuningRecord Tuner::record_of(const Task& task, const SearchResult& result) const {
  TuningRecord record{.key = task.key, .environment = environment()};
  for (std::uint32_t i = 0; i < task.kernel.declaration.n_sizes; ++i)
    record.sizes[task.kernel.declaration.sizes[i].name] = task.problem.sizes[i];
  record.best = named(task.kernel, task.points[result.best]);
  record.standard = named(task.kernel, task.points[task.standard]);
  record.program = specialize(task.kernel, {task.problem.statics, task.kernel.n_statics},
                              task.points[result.best])
                       .text();
  record.default_us = result.standard_us;
  record.verified = result.verified;
  record.complete = result.stopped.empty();
  for (std::size_t i = 0; i < task.points.size(); ++i) {
    const Measured& m = result.points[i];
    if (m.samples > 0 || !m.failure.empty())
      record.trials.push_back({named(task.kernel, task.points[i]), m.ratio, m.noise, m.samples,
                               m.failure, m.spill_bytes});
  }
  return record;
}

std::vector<TuningReport> Tuner::reports_since(std::size_t first) {
  const std::scoped_lock lock(mutex_);
  if (first >= reports_.size()) return {};
  return {reports_.begin() + static_cast<std::ptrdiff_t>(first), reports_.end()};
}

void Tuner::before_fork() {
  mutex_.lock();
  records_.before_fork();
}

void Tuner::after_fork() {
  records_.after_fork();
  mutex_.unlock();
}

std::vector<Specialization> winners(Tuner& tuner, std::span<Kernel* const> kernels,
                                    int architecture) {
  std::vector<Specialization> result;
  for (const auto& [device, record] : tuner.records().all()) {
    if (device.architecture != architecture) continue;
    try {
      Specialization s = parse_specialization(record.program, kernels);
      if (std::find(result.begin(), result.end(), s) == result.end())
        result.push_back(std::move(s));
    } catch (const Error&) {
      // Of a kernel that nobody asked for, or that has other parameters now.
    }
  }
  return result;
}

}  // namespace torchkiln::jit
