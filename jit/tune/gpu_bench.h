// The Bench of a real launch: candidates compile in the pool while others are measured on copies of the launch's buffers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <vector>

#include "jit/launch/kernel.h"
#include "jit/launch/resident.h"
#include "jit/tune/launch_copies.h"
#include "jit/tune/search.h"

namespace torchkiln::jit {

class GpuBench : public Bench {
 public:
  struct Subject {
    const Kernel& kernel;
    const torchkiln_problem& problem;
    const torchkiln_launch& launch;
  };

  // Compiles and measures `wanted` of the `points`; the others where they are asked for. Throws Error where there is no
  // memory for one copy of the buffers.
  GpuBench(Driver& driver, Residents& residents, const Subject& subject,
           std::vector<std::vector<std::int64_t>> points, std::size_t standard,
           std::vector<std::size_t> wanted, unsigned jobs);
  ~GpuBench() override;

  std::optional<Ready> next() override;
  std::vector<Pair> measure(std::size_t point, int count) override;
  std::string difference(std::size_t point) override;
  double gpu_milliseconds() const override { return gpu_milliseconds_; }
  bool interrupted() override;

 private:
  struct Program {
    CudaFunction function = nullptr;
    torchkiln_geometry geometry{};
    CudaGraphExec graph = nullptr;
    int launches = 0;  // in the graph
    std::string text;
  };

  void compile(std::size_t point);
  Specialization specialization(std::size_t point) const;
  Program& program(std::size_t point);
  void launch(const Program& program, std::size_t set, CudaStream stream);
  int launches_of(const Program& program);
  void build_graph(Program& program);
  double replay(const std::vector<Program*>& order, std::vector<double>& milliseconds);
  const std::vector<std::string>& standard_results();
  std::vector<std::string> results_of(std::size_t point);
  CudaEvent event(std::size_t number);

  Driver& driver_;
  Residents& residents_;
  const Kernel& kernel_;
  const torchkiln_problem& problem_;
  const int device_;
  std::vector<std::vector<std::int64_t>> points_;
  const std::size_t standard_;
  LaunchCopies copies_;
  std::vector<std::unique_ptr<Program>> programs_;
  std::vector<CudaEvent> events_;
  std::vector<std::string> standard_results_;
  std::vector<double>
      standard_spread_;  // between two runs of the default, per written buffer; negative: do not compare
  double gpu_milliseconds_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable more_;
  std::queue<Ready> ready_;
  std::vector<std::size_t> wanted_;
  std::size_t taken_ = 0, given_ = 0;
  bool stop_ = false;
  std::vector<std::jthread> compilers_;  // last: they use all of the above
};

}  // namespace torchkiln::jit
