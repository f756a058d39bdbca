// Little-endian fields of the cache's files.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace torchkiln::cache {

template <class Unsigned>
void append(std::string& bytes, Unsigned value) {
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) {
    bytes += static_cast<char>(static_cast<std::uint8_t>(value >> (8 * i)));
  }
}

template <class Unsigned>
Unsigned load(std::string_view bytes, std::size_t offset) {
  Unsigned value = 0;
  for (std::size_t i = sizeof(Unsigned); i-- > 0;) {
    value = static_cast<Unsigned>((value << 8) | static_cast<std::uint8_t>(bytes[offset + i]));
  }
  return value;
}

}  // namespace torchkiln::cache
