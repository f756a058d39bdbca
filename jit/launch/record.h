// What a warm launch needs, found without a lock, an allocation or a string: the key is device, static parameters, the
// bucket of every size and the default for these sizes; the record is the loaded function and the chosen tunables.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "jit/driver/cuda_api.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

struct LaunchKey {
  std::int32_t device = 0;
  std::uint32_t epoch = 0;  // raised where every kernel must be resolved anew, to be recorded
  std::uint32_t default_row = 0;
  bool untuned = false;  // what was tuned for these buckets cannot run these sizes
  std::uint32_t n_statics = 0;
  std::array<std::int64_t, TORCHKILN_MAX_PARAMS> statics{};
  std::array<std::uint8_t, TORCHKILN_MAX_SIZES> buckets{};

  bool operator==(const LaunchKey& other) const;
  std::uint64_t hash() const;
};

// What a launch of a function may ask for.
struct LaunchLimits {
  std::uint32_t threads = 0;  // of a block
  std::uint32_t dynamic_shared_bytes = 0;
};

struct LaunchRecord {
  LaunchKey key;
  CudaFunction function = nullptr;
  const torchkiln_device* device = nullptr;
  // Of the program that runs, which is not the one asked for where that may not be compiled.
  std::array<std::int64_t, TORCHKILN_MAX_PARAMS> statics{};
  std::array<std::int64_t, TORCHKILN_MAX_PARAMS> tunables{};
  bool is_default = false;
  LaunchLimits limits;  // of users' kernels
  std::string text;     // for errors
  const LaunchRecord* next = nullptr;
};

// Records are only ever added, and live as long as the process: a reader never needs to keep one alive.
class RecordTable {
 public:
  const LaunchRecord* find(const LaunchKey& key) const;
  // Two threads may add the same key; the newer one shadows the older, which is harmless.
  const LaunchRecord* add(std::unique_ptr<LaunchRecord> record);

 private:
  static constexpr std::size_t kSlots = 64;
  std::array<std::atomic<const LaunchRecord*>, kSlots> slots_{};
};

}  // namespace torchkiln::jit
