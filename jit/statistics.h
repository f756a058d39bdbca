// Counters of the engine. Relaxed atomics: they are facts for people, not synchronisation.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <nlohmann/json.hpp>

namespace torchkiln::jit {

struct Statistics {
  using Counter = std::atomic<std::uint64_t>;

  Counter launches{0};
  Counter cold_launches{0};  // launches that had to look for their kernel
  Counter compiles{0};
  Counter compile_microseconds{0};
  Counter hits_memory{0};
  Counter hits_bundle{0};
  Counter hits_disk{0};
  Counter misses{0};
  Counter loads{0};  // objects handed to the driver
  Counter load_microseconds{0};
  Counter refused{0};  // objects that the driver refused
  Counter nvrtc_opened{0};
  Counter generic_variants{0};  // cold launches served by a variant that was not asked for
  Counter missing{0};           // cold launches that failed because nothing could serve them

  static void add(Counter& counter, std::uint64_t amount = 1) {
    counter.fetch_add(amount, std::memory_order_relaxed);
  }
  nlohmann::json to_json() const {
    return {{"launches", launches.load()},
            {"cold_launches", cold_launches.load()},
            {"compiles", compiles.load()},
            {"compile_milliseconds", static_cast<double>(compile_microseconds.load()) / 1e3},
            {"hits",
             {{"memory", hits_memory.load()},
              {"bundle", hits_bundle.load()},
              {"disk", hits_disk.load()}}},
            {"misses", misses.load()},
            {"loads", loads.load()},
            {"load_milliseconds", static_cast<double>(load_microseconds.load()) / 1e3},
            {"refused", refused.load()},
            {"nvrtc_opened", nvrtc_opened.load()},
            {"generic_variants", generic_variants.load()},
            {"missing", missing.load()}};
  }
};

}  // namespace torchkiln::jit
