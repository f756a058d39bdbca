// The sink and its lock.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/log.h"

#include <cstdio>
#include <mutex>
#include <new>
#include <shared_mutex>

namespace torchkiln::jit {
namespace {

struct Sink {
  std::shared_mutex mutex;  // shared while a sentence is on its way
  torchkiln_log_sink function = nullptr;
  void* context = nullptr;
};

// Never destroyed: a compile may outlive main().
Sink& sink() {
  static Sink& instance = *new Sink;
  return instance;
}

}  // namespace

void log(torchkiln_log_level level, const std::string& sentence) {
  const std::shared_lock lock(sink().mutex);
  if (sink().function != nullptr) {
    sink().function(sink().context, level, sentence.c_str());
  } else {
    std::fprintf(stderr, "torchkiln: %s\n", sentence.c_str());
  }
}

void set_log_sink(torchkiln_log_sink function, void* context) {
  const std::unique_lock lock(sink().mutex);
  sink().function = function;
  sink().context = context;
}

void log_after_fork_in_child() { new (&sink().mutex) std::shared_mutex; }

}  // namespace torchkiln::jit
