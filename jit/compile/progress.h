// Tells people why they wait: nothing while compiles have taken less than a second, then a line that counts.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace torchkiln::jit {

// Thread-safe. Counts the time in which at least one compile ran that somebody waits for.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  // `show` takes a whole sentence. A test brings its own clock.
  explicit Progress(
      std::function<void(const std::string&)> show,
      std::function<Clock::time_point()> now = [] { return Clock::now(); });

  // From begin() to the end of this guard a compile runs; tick() now and then while it does.
  class Compile {
   public:
    Compile(Progress& progress, std::string what);
    Compile(const Compile&) = delete;
    Compile& operator=(const Compile&) = delete;
    ~Compile();
    void tick();

   private:
    Progress& progress_;
    std::string what_;
  };

 private:
  void begin();
  void end(const std::string& what);
  void tick(const std::string& what);
  std::string line_if_due(const std::string& what);  // under the mutex
  Clock::duration waited() const;

  std::function<void(const std::string&)> show_;
  std::function<Clock::time_point()> now_;
  std::mutex mutex_;
  std::uint64_t done_ = 0;
  unsigned running_ = 0;
  Clock::time_point since_;    // when running_ left zero
  Clock::duration earlier_{};  // time waited before that
  Clock::duration next_line_;  // of time waited
};

}  // namespace torchkiln::jit
