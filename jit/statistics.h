// Counters of the engine. Relaxed atomics: they are facts for people, not synchronisation.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <nlohmann/json.hpp>

namespace torchkiln::jit {

// The one list of counters: C, C++ and Python read them under these names.
#define TORCHKILN_COUNTERS(COUNTER)                                                          \
  COUNTER(launches)                                                                          \
  COUNTER(cold_launches) /* had to look for their kernel */                                  \
  COUNTER(compiles)                                                                          \
  COUNTER(compile_microseconds)                                                              \
  COUNTER(hits_memory)                                                                       \
  COUNTER(hits_bundle)                                                                       \
  COUNTER(hits_disk)                                                                         \
  COUNTER(misses)                                                                            \
  COUNTER(loads) /* objects handed to the driver */                                          \
  COUNTER(load_microseconds)                                                                 \
  COUNTER(refused) /* objects that the driver refused */                                     \
  COUNTER(nvrtc_opened)                                                                      \
  COUNTER(generic_variants) /* cold launches served by a variant that was not asked for */   \
  COUNTER(missing)          /* cold launches that failed because nothing could serve them */ \
  COUNTER(tunings)          /* keys that were measured */                                    \
  COUNTER(tuning_gpu_microseconds)

struct Statistics {
  using Counter = std::atomic<std::uint64_t>;

#define TORCHKILN_DECLARE(name) Counter name{0};
  TORCHKILN_COUNTERS(TORCHKILN_DECLARE)
#undef TORCHKILN_DECLARE

  static void add(Counter& counter, std::uint64_t amount = 1) {
    counter.fetch_add(amount, std::memory_order_relaxed);
  }

  struct Row {
    const char* name;
    std::uint64_t value;
  };
  auto rows() const {
#define TORCHKILN_ROW(name) Row{#name, name.load(std::memory_order_relaxed)},
    return std::to_array<Row>({TORCHKILN_COUNTERS(TORCHKILN_ROW)});
#undef TORCHKILN_ROW
  }
  nlohmann::json to_json() const {
    nlohmann::json json = nlohmann::json::object();
    for (const Row& row : rows()) json[row.name] = row.value;
    return json;
  }
};

}  // namespace torchkiln::jit
