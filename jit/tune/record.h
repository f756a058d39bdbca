// What is known about one key (kernel, static values, size buckets) on one kind of device: every trial, and the choice.
// One line of JSON in a file of records.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "jit/launch/kernel.h"

namespace torchkiln::jit {

// A point of the search space by name: records outlive the order and number of tunables.
using Point = std::map<std::string, std::int64_t>;

struct Trial {
  Point point;
  double ratio = 0;     // of the default's time in the same moments, a median; 0: not measured
  double noise = 0;     // standard error of the ratio
  int samples = 0;      // pairs behind them
  std::string failure;  // why it cannot be chosen
  std::int64_t spill_bytes = 0;
  bool operator==(const Trial&) const = default;
};

// What a choice depends on: with another value of one of these, a record is another one.
struct TuningKey {
  std::string kernel;                          // detection/roi_align.cuh:direct
  std::string digest;                          // of the template and all that it includes
  std::map<std::string, std::string> statics;  // as in the program: float, 7, true
  std::map<std::string, int>
      buckets;  // of the sizes, as powers of two; 0 where size does not count

  auto operator<=>(const TuningKey&) const = default;
};

// What a choice may depend on: with other values it is used, and measured again where tuning is asked for.
struct TuningEnvironment {
  std::string compiler;  // 13.0
  int driver = 0;        // 13000
  std::string library;   // 0.1.0
  auto operator<=>(const TuningEnvironment&) const = default;
};
// The fields in which two environments differ so that times may. What is empty now is unknown, and no difference; of the
// driver only the major version counts.
struct EnvironmentChange {
  std::string field, then, now;
};
std::vector<EnvironmentChange> changes(const TuningEnvironment& then, const TuningEnvironment& now);

struct TuningRecord {
  TuningKey key = {};
  TuningEnvironment environment = {};
  std::map<std::string, std::int64_t> sizes = {};  // those that were measured
  Point best = {}, standard = {};                  // the choice; the default at that time
  std::string program = {};                        // of the choice, as manifests name it
  double default_us = 0;                           // time of one launch
  bool verified = false;  // the results of `best` were compared with those of `standard`
  bool complete = false;  // the search came to its end
  std::vector<Trial> trials = {};

  int samples() const;
  const Trial* find(const Point& point) const;
  double gain() const;  // 0.2: the choice takes 20 % less time than the default
  double noise() const;

  nlohmann::json to_json() const;
  static std::optional<TuningRecord> from_json(
      const nlohmann::json& json);  // nothing: it is not one
};

TuningKey tuning_key(const Kernel& kernel, const std::string& digest,
                     std::span<const std::int64_t> statics, std::span<const std::int64_t> sizes);
std::vector<std::string> tunable_names(const Kernel& kernel);
Point named(const Kernel& kernel, std::span<const std::int64_t> tunables);
// Values in declaration order; nothing where a tunable is missing, unknown or has no such value now.
std::optional<std::vector<std::int64_t>> unnamed(const Kernel& kernel, const Point& point);

// One record out of two about the same key: the trials of both, and the choice of the one that knows more.
TuningRecord merge(const TuningRecord& a, const TuningRecord& b);

// How far apart two keys are: the sum over sizes of the distance in powers of two; nothing where anything but the sizes
// differs, or a size by more than a factor of four.
std::optional<int> distance(const TuningKey& a, const TuningKey& b);

}  // namespace torchkiln::jit
