// The C interface over the engine. Exceptions stop here and become the thread's error record.
//
// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "jit/control.h"
#include "jit/engine.h"
#include "jit/error.h"
#include "jit/log.h"
#include "jit/tune/interrupt.h"
#include "torchkiln/torchkiln.h"

namespace {

using torchkiln::jit::Engine;
using torchkiln::jit::Error;

struct ThreadRecord {
  std::string argument, message, details = "{}";
  torchkiln_error view{};
};

thread_local ThreadRecord record;

std::int32_t set_record(std::int32_t kind, std::string argument, std::string message,
                        std::string details) {
  record.argument = std::move(argument);
  record.message = std::move(message);
  record.details = std::move(details);
  record.view = {kind, record.argument.c_str(), record.message.c_str(), record.details.c_str()};
  return kind;
}

// Calls f; returns 0, or the kind of the error that it left in the record.
template <class F>
std::int32_t guarded(const F& f) noexcept {
  try {
    f();
    return TORCHKILN_ERROR_NONE;
  } catch (const Error& e) {
    return set_record(e.kind(), e.argument(), e.what(), e.details().dump());
  } catch (const std::exception& e) {
    return set_record(TORCHKILN_ERROR_INTERNAL, "",
                      std::string("internal error: ") + e.what() +
                          ". Please report this with the output of 'torchkiln doctor'",
                      "{}");
  }
}

char* copy_text(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

}  // namespace

const torchkiln_error* torchkiln_last_error() {
  if (record.view.message == nullptr) set_record(TORCHKILN_ERROR_NONE, "", "", "{}");
  return &record.view;
}

void torchkiln_set_error(std::int32_t kind, const char* argument, const char* message) {
  set_record(kind, argument, message, "{}");
}

std::int32_t torchkiln_add_template(const char* path, const char* text) {
  return guarded([&] { Engine::instance().add_template(path, text); });
}

std::int32_t torchkiln_declare(const torchkiln_declaration* declaration, torchkiln_kernel** out) {
  return guarded([&] { *out = Engine::instance().declare(*declaration); });
}

std::int32_t torchkiln_run(torchkiln_kernel* kernel, const torchkiln_launch* launch) {
  return guarded([&] { Engine::instance().run(*kernel, *launch); });
}

std::int32_t torchkiln_capture_guard(std::int32_t device, void* stream, const char* what,
                                     const char* way_out) {
  return guarded([&] { Engine::instance().capture_guard(device, stream, what, way_out); });
}

std::int32_t torchkiln_synchronize(std::int32_t device, void* stream, const char* what,
                                   const char* way_out) {
  return guarded([&] { Engine::instance().synchronize(device, stream, what, way_out); });
}

const torchkiln_device* torchkiln_device_facts(std::int32_t device) {
  const torchkiln_device* facts = nullptr;
  guarded([&] { facts = &Engine::instance().driver().device(device); });
  return facts;
}

std::uint32_t torchkiln_statistics(torchkiln_counter* out, std::uint32_t capacity) {
  std::uint32_t count = 0;
  guarded([&] {
    for (const auto& row : Engine::instance().statistics().rows()) {
      if (count < capacity) out[count] = {row.name, row.value};
      ++count;
    }
  });
  return count;
}

void torchkiln_set_log_sink(torchkiln_log_sink sink, void* context) {
  guarded([&] { torchkiln::jit::set_log_sink(sink, context); });
}

void torchkiln_set_interrupt(torchkiln_interrupted interrupted, void* context) {
  guarded([&] { torchkiln::jit::set_interrupt(interrupted, context); });
}

std::int32_t torchkiln_control(const char* command, const char* request, char** reply) {
  return guarded([&] {
    const auto json = nlohmann::json::parse(request);
    *reply = copy_text(torchkiln::jit::control(Engine::instance(), command, json).dump());
  });
}

void torchkiln_free(char* reply) { std::free(reply); }

const char* torchkiln_version() { return TORCHKILN_VERSION; }
