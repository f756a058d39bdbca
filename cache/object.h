// The one-file object: a checked prefix, a JSON header for people and programs, and a payload.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace torchkiln::cache {

// Little endian. The digest covers every byte but its own, so one flipped bit anywhere is found.
//
//    0  magic, 8 bytes
//    8  u32 format version
//   12  u32 bytes of the header
//   16  u64 bytes of the whole object
//   24  SHA-256 of bytes 0 to 23 and 56 to the end
//   56  header: JSON, padded with spaces until the payload starts at a multiple of 64
//   ..  payload
inline constexpr std::size_t kMaxHeaderBytes = std::size_t{4} << 20;  // a long compiler log fits
inline constexpr std::size_t kMaxObjectBytes = std::size_t{1} << 30;
inline constexpr int kMaxHeaderDepth = 16;

struct Object {
  nlohmann::json header;  // a JSON object
  std::string payload;
};

// The same with the payload left where it lies, for objects inside a mapped file.
struct ObjectView {
  nlohmann::json header;
  std::string_view payload;
};

// Throws std::runtime_error for a header that no reader would accept.
std::string encode_object(const Object& object);
std::string encode_object(const nlohmann::json& header, std::string_view payload);

// Never throw and never read past the end; `why` says what is wrong when nothing is returned.
std::optional<Object> decode_object(std::string_view bytes, std::string& why);
std::optional<ObjectView> decode_object_view(std::string_view bytes, std::string& why);

}  // namespace torchkiln::cache
