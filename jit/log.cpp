// Warnings.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/log.h"

#include <cstdio>
#include <mutex>
#include <utility>

namespace torchkiln::jit {
namespace {

struct Sink {
  std::mutex mutex;
  std::function<void(const std::string&)> function;
};

// Never destroyed: a compile may outlive main().
Sink& sink() {
  static Sink& instance = *new Sink;
  return instance;
}

}  // namespace

void warn(const std::string& sentence) {
  std::function<void(const std::string&)> function;
  {
    const std::scoped_lock lock(sink().mutex);
    function = sink().function;
  }
  if (function) {
    function(sentence);
  } else {
    std::fprintf(stderr, "torchkiln: %s\n", sentence.c_str());
  }
}

void set_warning_sink(std::function<void(const std::string&)> function) {
  const std::scoped_lock lock(sink().mutex);
  sink().function = std::move(function);
}

}  // namespace torchkiln::jit
