// Time waited, and the lines about it.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/progress.h"

#include <array>
#include <cstdio>
#include <utility>

namespace torchkiln::jit {
namespace {

constexpr std::chrono::seconds kSilent{1};
constexpr std::chrono::seconds kHeartbeat{5};

std::string seconds_text(Progress::Clock::duration time) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1f s", std::chrono::duration<double>(time).count());
  return text.data();
}

}  // namespace

Progress::Progress(std::function<void(const std::string&)> show,
                   std::function<Clock::time_point()> now)
    : show_(std::move(show)), now_(std::move(now)), next_line_(kSilent) {}

Progress::Compile::Compile(Progress& progress, std::string what)
    : progress_(progress), what_(std::move(what)) {
  progress_.begin();
}
Progress::Compile::~Compile() { progress_.end(what_); }
void Progress::Compile::tick() { progress_.tick(what_); }

void Progress::begin() {
  const std::scoped_lock lock(mutex_);
  if (running_++ == 0) since_ = now_();
}

void Progress::tick(const std::string& what) {
  std::string line;
  {
    const std::scoped_lock lock(mutex_);
    line = line_if_due(what);
  }
  if (!line.empty()) show_(line);  // unlocked: it may wait for another thread
}

void Progress::end(const std::string& what) {
  std::string line;
  {
    const std::scoped_lock lock(mutex_);
    ++done_;
    line = line_if_due(what);
    if (--running_ == 0) earlier_ += now_() - since_;
  }
  if (!line.empty()) show_(line);
}

Progress::Clock::duration Progress::waited() const {
  return earlier_ + (running_ == 0 ? Clock::duration{} : now_() - since_);
}

std::string Progress::line_if_due(const std::string& what) {
  const Clock::duration time = waited();
  if (time < next_line_) return "";
  next_line_ = time + kHeartbeat;
  return "compiling kernels for the cache: " + std::to_string(done_) + " done, " +
         seconds_text(time) + ", now " + what;
}

}  // namespace torchkiln::jit
