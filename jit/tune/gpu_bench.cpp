// Compiling ahead, graphs of many launches, events around them.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/gpu_bench.h"

#include <algorithm>
#include <cmath>

#include "jit/error.h"
#include "jit/launch/submit.h"
#include "jit/launch/user_kernel.h"
#include "jit/tune/compare.h"
#include "jit/tune/interrupt.h"

namespace torchkiln::jit {
namespace {

// A replay shorter than this is as long as the clock's own error.
constexpr double kReplayMilliseconds = 0.2;
constexpr int kMostLaunches = 256;
// For a first guess of the time of one launch.
constexpr int kProbeLaunches = 8;

}  // namespace

GpuBench::GpuBench(Driver& driver, Residents& residents, const Subject& subject,
                   std::vector<std::vector<std::int64_t>> points, std::size_t standard,
                   std::vector<std::size_t> wanted, unsigned jobs)
    : driver_(driver),
      residents_(residents),
      kernel_(subject.kernel),
      problem_(subject.problem),
      device_(subject.launch.device),
      points_(std::move(points)),
      standard_(standard),
      copies_(driver, subject.launch, subject.kernel.declaration.args_size),
      programs_(points_.size()),
      wanted_(std::move(wanted)) {
  const std::size_t threads = std::min<std::size_t>(jobs, wanted_.size());
  const auto work = [this] {
    while (true) {
      std::size_t point = 0;
      {
        const std::scoped_lock lock(mutex_);
        if (stop_ || taken_ == wanted_.size()) return;
        point = wanted_[taken_++];
      }
      compile(point);
    }
  };
  for (std::size_t i = 0; i < threads; ++i) compilers_.emplace_back(work);
}

GpuBench::~GpuBench() {
  {
    const std::scoped_lock lock(mutex_);
    stop_ = true;
  }
  compilers_.clear();  // joins: what is being compiled is kept in the cache
  const CudaApi& cuda = driver_.api();
  cuda.cuStreamSynchronize(copies_.stream());
  for (const auto& program : programs_) {
    if (program && program->graph != nullptr) cuda.cuGraphExecDestroy(program->graph);
  }
  for (CudaEvent event : events_) cuda.cuEventDestroy(event);
}

Specialization GpuBench::specialization(std::size_t point) const {
  return specialize(kernel_, {problem_.statics, kernel_.n_statics}, points_[point]);
}

void GpuBench::compile(std::size_t point) {
  Ready ready{.point = point, .failure = {}, .spill_bytes = 0};
  try {
    const Found found = residents_.object(specialization(point), device_, Priority::kPrewarm);
    ready.spill_bytes = found.object->header.value("spill_bytes", std::int64_t{0});
  } catch (const std::exception& error) {
    ready.failure = error.what();
  }
  const std::scoped_lock lock(mutex_);
  ready_.push(std::move(ready));
  more_.notify_one();
}

std::optional<Bench::Ready> GpuBench::next() {
  std::unique_lock lock(mutex_);
  if (given_ == wanted_.size()) return std::nullopt;
  more_.wait(lock, [&] { return !ready_.empty(); });
  ++given_;
  Ready ready = std::move(ready_.front());
  ready_.pop();
  return ready;
}

bool GpuBench::interrupted() { return jit::interrupted(); }

GpuBench::Program& GpuBench::program(std::size_t point) {
  auto& slot = programs_[point];
  if (!slot) {
    auto made = std::make_unique<Program>();
    const Specialization s = specialization(point);
    made->text = s.text();
    made->function = residents_.function(s, device_);
    kernel_.declaration.geometry(&problem_, points_[point].data(), &made->geometry);
    if (kernel_.is_user)
      check_limits(residents_.limits(made->function, device_), made->geometry, made->text);
    build_graph(*made);
    slot = std::move(made);
  }
  return *slot;
}

void GpuBench::launch(const Program& program, std::size_t set, CudaStream stream) {
  const std::string& args = copies_.args(set);
  check(driver_.api(),
        submit_kernel(driver_.api(), program.function, program.geometry, stream, args.data(),
                      args.size()),
        "cuLaunchKernel", program.text);
}

CudaEvent GpuBench::event(std::size_t number) {
  const CudaApi& cuda = driver_.api();
  while (events_.size() <= number) {
    CudaEvent made = nullptr;
    check(cuda, cuda.cuEventCreate(&made, kCudaEventDefault), "cuEventCreate", "tuning");
    events_.push_back(made);
  }
  return events_[number];
}

// How many launches fill a replay.
int GpuBench::launches_of(const Program& program) {
  const CudaApi& cuda = driver_.api();
  const auto timed = [&](int count) {
    for (int i = 0; i < count; ++i) copies_.reset(static_cast<std::size_t>(i));
    check(cuda, cuda.cuEventRecord(event(0), copies_.stream()), "cuEventRecord", program.text);
    for (int i = 0; i < count; ++i) launch(program, static_cast<std::size_t>(i), copies_.stream());
    check(cuda, cuda.cuEventRecord(event(1), copies_.stream()), "cuEventRecord", program.text);
    copies_.wait();
    float milliseconds = 0;
    check(cuda, cuda.cuEventElapsedTime(&milliseconds, event(0), event(1)), "cuEventElapsedTime",
          program.text);
    gpu_milliseconds_ += milliseconds;
    return static_cast<double>(milliseconds) / count;
  };
  const int sets = static_cast<int>(copies_.sets());
  const int most = copies_.consumes() ? sets : kMostLaunches;
  timed(1);  // the first launch of a program is slower than the others
  double once = timed(1);
  if (once < kReplayMilliseconds) once = timed(std::min(kProbeLaunches, sets));
  if (once <= 0) return 1;
  return static_cast<int>(std::clamp(std::ceil(kReplayMilliseconds / once), 1.0, 1.0 * most));
}

void GpuBench::build_graph(Program& program) {
  const CudaApi& cuda = driver_.api();
  program.launches = launches_of(program);
  const CudaStream stream = copies_.stream();
  check(cuda, cuda.cuStreamBeginCapture(stream, kCaptureRelaxed), "cuStreamBeginCapture",
        program.text);
  CudaGraph graph = nullptr;
  try {
    for (int i = 0; i < program.launches; ++i)
      launch(program, static_cast<std::size_t>(i) % copies_.sets(), stream);
  } catch (const Error&) {
    cuda.cuStreamEndCapture(stream, &graph);
    if (graph != nullptr) cuda.cuGraphDestroy(graph);
    throw;
  }
  check(cuda, cuda.cuStreamEndCapture(stream, &graph), "cuStreamEndCapture", program.text);
  const CudaResult made = cuda.cuGraphInstantiateWithFlags(&program.graph, graph, 0);
  cuda.cuGraphDestroy(graph);
  check(cuda, made, "cuGraphInstantiateWithFlags", program.text);
}

// Replays one graph after the other, without a gap: the first one is only there so that the GPU is busy while the rest
// is queued. Fills the time of each of the others.
double GpuBench::replay(const std::vector<Program*>& order, std::vector<double>& milliseconds) {
  const CudaApi& cuda = driver_.api();
  const CudaStream stream = copies_.stream();
  const auto record = [&](std::size_t i) {
    check(cuda, cuda.cuEventRecord(event(i), stream), "cuEventRecord", order[0]->text);
  };
  const std::size_t first = 2 * order.size();
  record(first);
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (copies_.consumes()) {
      for (int set = 0; set < order[i]->launches; ++set)
        copies_.reset(static_cast<std::size_t>(set));
    }
    record(2 * i);
    check(cuda, cuda.cuGraphLaunch(order[i]->graph, stream), "cuGraphLaunch", order[i]->text);
    record(2 * i + 1);
  }
  copies_.wait();
  const auto between = [&](std::size_t a, std::size_t b) {
    float elapsed = 0;
    check(cuda, cuda.cuEventElapsedTime(&elapsed, event(a), event(b)), "cuEventElapsedTime",
          order[0]->text);
    return static_cast<double>(elapsed);
  };
  for (std::size_t i = 1; i < order.size(); ++i) milliseconds.push_back(between(2 * i, 2 * i + 1));
  return between(first, 2 * order.size() - 1);
}

std::vector<Bench::Pair> GpuBench::measure(std::size_t point, int count) {
  Program& standard = program(standard_);
  Program& candidate = program(point);
  std::vector<Program*> order = {&standard};
  for (int i = 0; i < count; ++i) {
    order.push_back(&standard);
    order.push_back(&candidate);
  }
  std::vector<double> times;
  gpu_milliseconds_ += replay(order, times);
  std::vector<Pair> pairs;
  for (std::size_t i = 0; i + 1 < times.size(); i += 2)
    pairs.push_back({1e3 * times[i] / standard.launches, 1e3 * times[i + 1] / candidate.launches});
  return pairs;
}

std::vector<std::string> GpuBench::results_of(std::size_t point) {
  const Program& used = program(point);
  copies_.clear(0);
  launch(used, 0, copies_.stream());
  std::vector<std::string> results;
  for (const auto& result : copies_.results()) results.push_back(copies_.read(0, result));
  return results;
}

// Of the default; run twice, because atomics make some results differ from themselves.
const std::vector<std::string>& GpuBench::standard_results() {
  if (!standard_spread_.empty() || copies_.results().empty()) return standard_results_;
  standard_results_ = results_of(standard_);
  const auto again = results_of(standard_);
  for (std::size_t i = 0; i < again.size(); ++i) {
    const Distance d = compare(std::as_bytes(std::span(standard_results_[i])),
                               std::as_bytes(std::span(again[i])), copies_.results()[i].type);
    standard_spread_.push_back(d.different == 0 ? d.apart : -1);
  }
  return standard_results_;
}

std::string GpuBench::difference(std::size_t point) {
  constexpr double kSpreads = 4;  // two runs show less than the most that can happen
  const auto& expected = standard_results();
  const auto actual = results_of(point);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (standard_spread_[i] < 0) continue;
    const auto& result = copies_.results()[i];
    const Distance d = compare(std::as_bytes(std::span(expected[i])),
                               std::as_bytes(std::span(actual[i])), result.type);
    const double limit = relative_tolerance(result.type, kernel_.declaration.tolerance) * d.scale +
                         kSpreads * standard_spread_[i];
    if (d.different == 0 && d.apart <= limit) continue;
    const std::string where = "the result at byte " + std::to_string(result.offset) +
                              " of the arguments is not that of the default: ";
    if (d.different > 0) return where + std::to_string(d.different) + " elements differ";
    return where + "up to " + std::to_string(d.apart) + " apart, beyond " + std::to_string(limit);
  }
  return {};
}

}  // namespace torchkiln::jit
