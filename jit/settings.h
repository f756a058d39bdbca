// Every TORCHKILN_* environment variable, read once into one struct. The table here is the only list of them: doctor,
// the docs and the check for misspelt names use it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

namespace torchkiln::jit {

// What a launch may do for a kernel that neither a bundle nor the cache has: compile it, compile it and say so, or not
// compile it. Prewarming is asked for and therefore always allowed.
enum class JitMode { kAllow, kWarn, kForbid };
const char* jit_mode_name(JitMode mode);
JitMode parse_jit_mode(const std::string& name);  // throws Error(VALUE)

// Who chooses the tunables of a launch: the defaults; what is recorded, else the defaults; or, where nothing is
// recorded, a measurement.
enum class TuneMode { kOff, kLookup, kTune };
const char* tune_mode_name(TuneMode mode);
TuneMode parse_tune_mode(const std::string& name);  // throws Error(VALUE)

struct Settings {
  std::string cache_dir;
  std::uint64_t cache_max_bytes = std::uint64_t{1} << 30;
  std::string compiler_policy = "any";  // any | exact
  unsigned compile_jobs = 0;            // 0: by cores and memory
  std::string nvrtc_path;
  std::string jit = "allow";         // allow | warn | forbid; what the process starts with
  std::string tune = "lookup";       // off | lookup | tune; what the process starts with
  unsigned tune_budget_ms = 300;     // of GPU time, for one key
  unsigned tune_total_ms = 60'000;   // for the process
  std::vector<std::string> bundles;  // absolute paths of files, or of folders of *.bundle
  std::string record;                // manifest to add to, absolute
  bool lineinfo = false;
  bool debug_values = false;

  // Bad values are replaced by the default, with one sentence each in `warnings`. All paths are ignored in a
  // set-user-id program.
  static Settings from_environment();
  nlohmann::json to_json() const;

  std::vector<std::string> warnings;
};

struct SettingInfo {
  const char* name;
  const char* meaning;
};
std::span<const SettingInfo> setting_infos();

}  // namespace torchkiln::jit
