// The ladder as data.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/ladder.h"

#include <algorithm>
#include <array>
#include <functional>
#include <set>

#include "jit/driver/nvrtc_api.h"

namespace torchkiln::jit {
namespace {

// Chips that share a major number with others but not their binaries: the Tegra line (Xavier,
// Orin, Thor under both its numbers), and numbers for which nobody has published a promise.
constexpr std::array kOwnLine = {53, 62, 72, 87, 88, 101, 107, 110};

// Known numbers, for looking into a cache when no compiler tells its own list.
constexpr std::array kKnown = {50, 52, 53, 60, 61,  62,  70,  72,  75,  80,  86,
                               87, 88, 89, 90, 100, 101, 103, 107, 110, 120, 121};

bool has_own_line(int architecture) {
  return std::find(kOwnLine.begin(), kOwnLine.end(), architecture) != kOwnLine.end();
}

struct Question {
  int device;
  bool specific;
  int min_architecture;
  std::span<const int> compiler;
  int nvrtc;
  int driver;

  bool compiles(int architecture) const {
    return std::find(compiler.begin(), compiler.end(), architecture) != compiler.end();
  }
  std::string compiler_text() const {
    return nvrtc == 0 ? "no NVRTC" : "NVRTC " + version_text(nvrtc);
  }
};

class Builder {
 public:
  explicit Builder(const Question& question) : q_(question) {}

  void exact() {
    const Target target{.architecture = q_.device, .specific = q_.specific, .ptx = false};
    offer(target, "exact machine code", q_.compiles(q_.device), "");
  }

  // Highest minor first: the closest relative.
  void relatives() {
    if (q_.specific)
      return skip("machine code of the same major: sm_XYa runs only on its own chip");
    std::set<int, std::greater<>> all(kKnown.begin(), kKnown.end());
    all.insert(q_.compiler.begin(), q_.compiler.end());
    bool any = false;
    for (const int architecture : all) {
      const bool runs = architecture != q_.device && architecture >= q_.min_architecture &&
                        binary_compatible(architecture, q_.device);
      if (!runs) continue;
      any = true;
      offer({.architecture = architecture, .specific = false, .ptx = false},
            "machine code of the same major", q_.compiles(architecture), "");
    }
    if (!any) skip("machine code of the same major: there is no older chip of this line");
  }

  void ptx() {
    if (q_.specific) return skip("PTX: compute_XYa runs only on its own chip");
    int newest = 0;
    for (const int architecture : q_.compiler) {
      const bool fits = architecture <= q_.device && architecture >= q_.min_architecture;
      if (fits) newest = std::max(newest, architecture);
    }
    if (newest == 0)
      return skip("PTX: " + q_.compiler_text() + " has no virtual architecture for it");
    std::string refusal;
    if (q_.driver < q_.nvrtc) {
      refusal = "the driver knows CUDA " + version_text(q_.driver) + ", older than the compiler";
    }
    offer({.architecture = newest, .specific = false, .ptx = true}, "PTX for the driver's compiler",
          true, refusal);
  }

  void skip(const std::string& text) { trace_ += "; " + text; }

  Ladder finish(const std::string& subject) {
    ladder_.explanation = subject + ": " + (trace_.empty() ? "" : trace_.substr(2)) + ".";
    if (ladder_.rungs.empty()) {
      ladder_.explanation +=
          " Install a newer NVRTC (pip install torchkiln[compiler]), or ship a bundle made for "
          "this "
          "device.";
    }
    return std::move(ladder_);
  }

 private:
  void offer(const Target& target, const std::string& kind, bool known,
             const std::string& refusal) {
    const std::string name = kind + " (" + target.text() + ")";
    if (!refusal.empty()) return skip(name + ": " + refusal);
    ladder_.loadable.push_back({target, name});
    if (known) {
      ladder_.rungs.push_back({target, name + " by " + q_.compiler_text()});
      skip(name + ": can be compiled");
    } else {
      skip(name + ": unknown to " + q_.compiler_text());
    }
  }

  const Question& q_;
  Ladder ladder_;
  std::string trace_;
};

}  // namespace

bool binary_compatible(int code, int device) {
  if (code == device) return true;
  return code / 10 == device / 10 && code < device && !has_own_line(code) && !has_own_line(device);
}

Ladder ladder(const torchkiln_device& device, bool architecture_specific, int min_architecture,
              std::span<const int> compiler_architectures, int nvrtc_version, int driver_version) {
  const Question question{device.major * 10 + device.minor, architecture_specific, min_architecture,
                          compiler_architectures,           nvrtc_version,         driver_version};
  const std::string subject = "device of sm_" + std::to_string(question.device);
  Builder builder(question);
  if (question.device < min_architecture) {
    return {{},
            {},
            subject + ": the kernel needs sm_" + std::to_string(min_architecture) +
                " or later. Use the CPU version, or a newer GPU."};
  }
  builder.exact();
  builder.relatives();
  builder.ptx();
  return builder.finish(subject);
}

}  // namespace torchkiln::jit
