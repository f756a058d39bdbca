// The table of flags and the NVRTC versions that know them: an unknown flag fails the compile.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/options.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr int kEveryVersion = 12000;

struct Flag {
  std::string_view text;
  int since;
  bool needs_ptxas = false;  // of no use for PTX
  bool embedded = false;     // not for files of users
};

// Flags that change no instruction; so they are not in the key.
constexpr std::array kFixedFlags = {
    // Unannotated functions are __device__: the shared .h files carry no CUDA words.
    Flag{"-default-device", kEveryVersion},
    // Closed world: no header of the working directory.
    Flag{"--no-source-include", kEveryVersion},
    // The default raises RLIMIT_STACK of the whole process for the time of a compile.
    Flag{"--modify-stack-limit=false", kEveryVersion},
    // Registers, shared memory and spills come from this log.
    Flag{"--ptxas-options=-v", kEveryVersion, true},
    // The cache is ours: a second one below it would make compile times lie.
    Flag{"--no-cache", 12090},
    // Without NVRTC's declarations of textures, launches and the runtime's types, which users may want: a quarter of the
    // time of an empty kernel.
    Flag{"--minimal", 12060, false, true},
};
constexpr int kRandomSeedSince = 12090;

struct Canonical {
  std::string_view name;
  std::string_view flag;
};
constexpr std::array kCanonical = {
    Canonical{"std=c++17", "--std=c++17"},
    Canonical{"lineinfo", "-lineinfo"},
};

std::string flag_of(const std::string& name) {
  const auto* row = std::find_if(kCanonical.begin(), kCanonical.end(),
                                 [&](const Canonical& option) { return option.name == name; });
  if (row == kCanonical.end()) {
    throw Error(TORCHKILN_ERROR_INTERNAL,
                "internal error: compile option must be in the table of jit/compile/options.cpp; "
                "got " +
                    name + ".");
  }
  return std::string(row->flag);
}

}  // namespace

std::vector<std::string> canonical_options(const Settings& settings) {
  std::vector<std::string> options = {"std=c++17"};
  if (settings.lineinfo) options.emplace_back("lineinfo");
  return options;
}

std::vector<std::string> nvrtc_options(const std::vector<std::string>& canonical,
                                       const Target& target, bool embedded, int version,
                                       const std::string& key) {
  std::vector<std::string> options = {"--gpu-architecture=" + target.text()};
  for (const std::string& name : canonical) options.push_back(flag_of(name));
  for (const Flag& flag : kFixedFlags) {
    const bool fits = !(flag.needs_ptxas && target.ptx) && (embedded || !flag.embedded);
    if (version >= flag.since && fits) options.emplace_back(flag.text);
  }
  constexpr std::size_t kSeedDigits = 16;
  if (version >= kRandomSeedSince) {
    options.push_back("--frandom-seed=" + key.substr(0, kSeedDigits));
  }
  return options;
}

}  // namespace torchkiln::jit
