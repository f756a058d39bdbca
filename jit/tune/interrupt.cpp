// One function for the process.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/interrupt.h"

#include <mutex>

namespace torchkiln::jit {
namespace {

struct Question {
  std::mutex mutex;
  Interrupted ask = nullptr;
  void* context = nullptr;
};

Question& question() {
  static Question& instance = *new Question;
  return instance;
}

}  // namespace

void set_interrupt(Interrupted interrupted, void* context) {
  const std::scoped_lock lock(question().mutex);
  question().ask = interrupted;
  question().context = context;
}

bool interrupted() {
  Interrupted ask = nullptr;
  void* context = nullptr;
  {
    const std::scoped_lock lock(question().mutex);
    ask = question().ask;
    context = question().context;
  }
  return ask != nullptr && ask(context) != 0;  // unlocked: it may take Python's lock
}

}  // namespace torchkiln::jit
