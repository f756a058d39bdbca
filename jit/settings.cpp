// Reading the environment.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/settings.h"

#include <array>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <sstream>
#include <system_error>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr std::array kInfos = {
    SettingInfo{"TORCHKILN_CACHE_DIR", "folder of the kernel cache; absolute"},
    SettingInfo{"TORCHKILN_CACHE_MAX",
                "size limit of the cache in bytes; 0 for none; default 1 GiB"},
    SettingInfo{"TORCHKILN_COMPILER_POLICY",
                "any (default): another NVRTC's object serves; exact: only this one's"},
    SettingInfo{"TORCHKILN_COMPILE_JOBS", "compile threads; default by cores and memory"},
    SettingInfo{"TORCHKILN_NVRTC_PATH", "libnvrtc to use: a file, or the folder that holds it"},
    SettingInfo{
        "TORCHKILN_JIT",
        "allow (default): launches compile what is missing; warn: and say so; forbid: never"},
    SettingInfo{
        "TORCHKILN_BUNDLES",
        "bundles to serve kernels from: absolute paths of files or folders, with : between"},
    SettingInfo{"TORCHKILN_TUNE",
                "lookup (default): launches use recorded choices; tune: and measure what is not "
                "recorded; off: defaults only"},
    SettingInfo{"TORCHKILN_TUNE_BUDGET_MS", "GPU time for tuning one key; default 300"},
    SettingInfo{"TORCHKILN_TUNE_TOTAL_MS", "GPU time for tuning in one process; default 60000"},
    SettingInfo{"TORCHKILN_RECORD", "manifest that used kernels are added to"},
    SettingInfo{"TORCHKILN_LINEINFO", "1: compile with line information for profilers"},
    SettingInfo{"TORCHKILN_DEBUG_VALUES", "1: check indices in GPU data too; synchronises"},
};

// secure_getenv: a set-user-id program must not be steered by its caller's environment.
std::optional<std::string> read(const char* name) {
  const char* value = secure_getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

class Reader {
 public:
  explicit Reader(std::vector<std::string>& warnings) : warnings_(warnings) {}

  void text(const char* name, std::string& to) const {
    if (auto value = read(name)) to = *value;
  }

  template <class Number>
  void number(const char* name, Number& to) const {
    const auto value = read(name);
    if (!value) return;
    Number parsed{};
    const auto [end, error] = std::from_chars(value->data(), value->data() + value->size(), parsed);
    if (error == std::errc() && end == value->data() + value->size()) {
      to = parsed;
    } else {
      warn(name, "be a whole number", *value);
    }
  }

  void flag(const char* name, bool& to) const {
    const auto value = read(name);
    if (!value) return;
    if (*value == "1" || *value == "0") {
      to = *value == "1";
    } else {
      warn(name, "be 0 or 1", *value);
    }
  }

  void choice(const char* name, std::string& to, std::initializer_list<const char*> choices) const {
    const auto value = read(name);
    if (!value) return;
    std::string list;
    for (const char* c : choices) {
      if (*value == c) {
        to = *value;
        return;
      }
      list += (list.empty() ? "" : ", ") + std::string(c);
    }
    warn(name, "be one of " + list, *value);
  }

  void paths(const char* name, std::vector<std::string>& to) const {
    std::istringstream list(read(name).value_or(""));
    for (std::string path; std::getline(list, path, ':');) {
      if (path.empty()) continue;
      if (path.front() == '/') {
        to.push_back(path);
      } else {  // nothing is searched in the working directory
        warn(name, "hold absolute paths", path, "It is left out.");
      }
    }
  }

 private:
  void warn(const char* name, const std::string& rule, const std::string& got,
            const char* consequence = "The default is used.") const {
    warnings_.push_back(std::string(name) + " must " + rule + "; got " + got + ". " + consequence);
  }

  std::vector<std::string>& warnings_;
};

}  // namespace

Settings Settings::from_environment() {
  Settings s;
  const Reader reader(s.warnings);
  reader.text("TORCHKILN_CACHE_DIR", s.cache_dir);
  reader.number("TORCHKILN_CACHE_MAX", s.cache_max_bytes);
  reader.choice("TORCHKILN_COMPILER_POLICY", s.compiler_policy, {"any", "exact"});
  reader.number("TORCHKILN_COMPILE_JOBS", s.compile_jobs);
  reader.text("TORCHKILN_NVRTC_PATH", s.nvrtc_path);
  reader.choice("TORCHKILN_JIT", s.jit, {"allow", "warn", "forbid"});
  reader.choice("TORCHKILN_TUNE", s.tune, {"off", "lookup", "tune"});
  reader.number("TORCHKILN_TUNE_BUDGET_MS", s.tune_budget_ms);
  reader.number("TORCHKILN_TUNE_TOTAL_MS", s.tune_total_ms);
  reader.paths("TORCHKILN_BUNDLES", s.bundles);
  reader.text("TORCHKILN_RECORD", s.record);
  // The program may change its directory later.
  std::error_code ignored;
  if (!s.record.empty()) s.record = std::filesystem::absolute(s.record, ignored).string();
  reader.flag("TORCHKILN_LINEINFO", s.lineinfo);
  reader.flag("TORCHKILN_DEBUG_VALUES", s.debug_values);
  return s;
}

nlohmann::json Settings::to_json() const {
  return {{"cache_dir", cache_dir},
          {"cache_max_bytes", cache_max_bytes},
          {"compiler_policy", compiler_policy},
          {"compile_jobs", compile_jobs},
          {"nvrtc_path", nvrtc_path},
          {"jit", jit},
          {"tune", tune},
          {"tune_budget_ms", tune_budget_ms},
          {"tune_total_ms", tune_total_ms},
          {"bundles", bundles},
          {"record", record},
          {"lineinfo", lineinfo},
          {"debug_values", debug_values},
          {"warnings", warnings}};
}

const char* jit_mode_name(JitMode mode) {
  switch (mode) {
    case JitMode::kAllow:
      return "allow";
    case JitMode::kWarn:
      return "warn";
    default:
      return "forbid";
  }
}

JitMode parse_jit_mode(const std::string& name) {
  for (const JitMode mode : {JitMode::kAllow, JitMode::kWarn, JitMode::kForbid}) {
    if (name == jit_mode_name(mode)) return mode;
  }
  throw Error(TORCHKILN_ERROR_VALUE, "mode must be allow, warn or forbid; got " + name, {}, "mode");
}

const char* tune_mode_name(TuneMode mode) {
  switch (mode) {
    case TuneMode::kOff:
      return "off";
    case TuneMode::kLookup:
      return "lookup";
    default:
      return "tune";
  }
}

TuneMode parse_tune_mode(const std::string& name) {
  for (const TuneMode mode : {TuneMode::kOff, TuneMode::kLookup, TuneMode::kTune}) {
    if (name == tune_mode_name(mode)) return mode;
  }
  throw Error(TORCHKILN_ERROR_VALUE, "mode must be off, lookup or tune; got " + name, {}, "mode");
}

std::span<const SettingInfo> setting_infos() { return kInfos; }

}  // namespace torchkiln::jit
