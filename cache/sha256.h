// SHA-256 (FIPS 180-4): the keys of the store and the checksum of its objects.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/sha256_blocks.h"

namespace torchkiln::cache {

// Not thread-safe; one object digests one message after the other.
class Sha256 {
 public:
  Sha256& update(std::string_view bytes);
  // Ends the message; the next update starts a new one.
  std::array<std::uint8_t, 32> digest();

 private:
  // Fractional parts of the square roots of the first eight primes.
  static constexpr Sha256State kInitialState = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                                0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

  Sha256State state_ = kInitialState;
  std::array<char, kSha256BlockBytes> pending_{};
  std::uint64_t total_bytes_ = 0;
};

// 64 lower-case hexadecimal digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace torchkiln::cache
