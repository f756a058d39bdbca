// Random damage to any file of ours: what disks, copies and people do to bytes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>

namespace torchkiln::cache::support {

using Random = std::mt19937_64;

// Rounds of a test with random trials: `quick` unless TORCHKILN_ATTACK_ROUNDS asks for more.
inline int attack_rounds(int quick) {
  const char* wanted = std::getenv("TORCHKILN_ATTACK_ROUNDS");
  return std::max(quick, wanted == nullptr ? 0 : std::atoi(wanted));
}

class Damage {
 public:
  explicit Damage(std::uint64_t seed) : random_(seed) {}

  // Below `bound`, which is at least 1.
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }

  // Never returns `bytes` itself. `other` is a sound file of the same kind. What was done is in
  // `kind`, for the message of a failing test.
  std::string of(const std::string& bytes, const std::string& other, std::string& kind) {
    std::string bad = bytes;
    while (bad == bytes) bad = once(bytes, other, kind);
    return bad;
  }

 private:
  std::string once(std::string bytes, const std::string& other, std::string& kind) {
    switch (below(8)) {
      case 0:
        return flipped(std::move(bytes), 1 + below(8), kind = "flipped bits");
      case 1:
        kind = "truncated";
        return bytes.substr(0, below(bytes.size() + 1));
      case 2:
        kind = "appended bytes";
        return bytes + noise(1 + below(4096));
      case 3:
        kind = "swapped with another file";
        return other;
      case 4:
        kind = "zeroed a block";
        return overwritten(std::move(bytes), std::string(1 + below(4096), '\0'));
      case 5:
        kind = "overwrote with noise";
        return overwritten(std::move(bytes), noise(1 + below(64)));
      case 6:
        kind = "doubled";
        return bytes + bytes;
      default:
        kind = "joined two halves";
        return bytes.substr(0, below(bytes.size() + 1)) + other.substr(below(other.size() + 1));
    }
  }

  std::string flipped(std::string bytes, std::size_t count, const std::string&) {
    for (std::size_t i = 0; i < count && !bytes.empty(); ++i) {
      // Half of them in the fixed fields and the header, where parsers are.
      const std::size_t reach =
          below(2) == 0 ? std::min<std::size_t>(bytes.size(), 256) : bytes.size();
      char& byte = bytes[below(reach)];
      byte = static_cast<char>(byte ^ (1 << below(8)));
    }
    return bytes;
  }

  std::string noise(std::size_t count) {
    std::string bytes(count, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random_());
    return bytes;
  }

  std::string overwritten(std::string bytes, const std::string& patch) {
    if (bytes.empty()) return patch;
    const std::size_t at = below(bytes.size());
    bytes.replace(at, std::min(patch.size(), bytes.size() - at), patch, 0,
                  std::min(patch.size(), bytes.size() - at));
    return bytes;
  }

  Random random_;
};

}  // namespace torchkiln::cache::support
