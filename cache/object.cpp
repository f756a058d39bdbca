// Encoding and checking of objects. The reader takes every byte for hostile: a cubin is code.
// SPDX-License-Identifier: Apache-2.0
#include "cache/object.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>

#include "cache/bytes.h"
#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

// A byte above 127 and a line end on both sides show transfers in text mode (as in PNG).
constexpr std::string_view kMagic = "\x8ftkiln\r\n";
constexpr std::uint32_t kFormatVersion = 1;
constexpr std::size_t kDigestOffset = 24;
constexpr std::size_t kDigestBytes = 32;
constexpr std::size_t kPrefixBytes = kDigestOffset + kDigestBytes;
// Objects are handed to the driver as they lie in a mapped file; ELF wants its own start aligned.
constexpr std::size_t kPayloadAlignment = 64;

std::string digest_of_the_rest(std::string_view bytes) {
  Sha256 sha;
  sha.update(bytes.substr(0, kDigestOffset)).update(bytes.substr(kPrefixBytes));
  const auto digest = sha.digest();
  return {digest.begin(), digest.end()};
}

std::string padded_header(const nlohmann::json& header) {
  // Compiler logs may hold any bytes: replace what is not UTF-8 instead of throwing.
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const std::size_t past = (kPrefixBytes + text.size()) % kPayloadAlignment;
  if (past != 0) text.append(kPayloadAlignment - past, ' ');
  return text;
}

// Empty when the fixed fields agree with one another and with the number of bytes at hand.
std::string fault_in_prefix(std::string_view bytes) {
  if (bytes.size() < kPrefixBytes) return "it is shorter than its fixed fields";
  if (bytes.substr(0, kMagic.size()) != kMagic) return "it does not start with the magic bytes";
  const auto version = load<std::uint32_t>(bytes, 8);
  if (version != kFormatVersion) {
    return "its format version is " + std::to_string(version) + ", this reader knows " +
           std::to_string(kFormatVersion);
  }
  const auto total = load<std::uint64_t>(bytes, 16);
  if (total != bytes.size()) {
    return "its length is " + std::to_string(bytes.size()) + " bytes, it says " +
           std::to_string(total);
  }
  const auto header_bytes = load<std::uint32_t>(bytes, 12);
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - kPrefixBytes) {
    return "its header is longer than allowed";
  }
  if (bytes.substr(kDigestOffset, kDigestBytes) != digest_of_the_rest(bytes)) {
    return "its SHA-256 differs";
  }
  return {};
}

// Brackets outside of strings. Asked before the text is parsed, so that depth costs no memory.
int depth_of(std::string_view json) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '{' || c == '[')) {
      deepest = std::max(deepest, ++depth);
    } else if (!in_string && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return deepest;
}

std::optional<nlohmann::json> parse_header(std::string_view text, std::string& why) {
  if (depth_of(text) > kMaxHeaderDepth) {
    why = "its header is nested too deeply";
    return std::nullopt;
  }
  auto header = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (header.is_object()) return header;
  why = "its header is not a JSON object";
  return std::nullopt;
}

}  // namespace

std::string encode_object(const Object& object) {
  return encode_object(object.header, object.payload);
}

std::string encode_object(const nlohmann::json& header, std::string_view payload) {
  if (!header.is_object()) throw std::runtime_error("an object's header must be a JSON object");
  const std::string text = padded_header(header);
  const std::size_t total = kPrefixBytes + text.size() + payload.size();
  if (text.size() > kMaxHeaderBytes || total > kMaxObjectBytes) {
    throw std::runtime_error("an object of " + std::to_string(total) +
                             " bytes is too large to store");
  }
  std::string bytes;
  bytes.reserve(total);
  bytes += kMagic;
  append(bytes, kFormatVersion);
  append(bytes, static_cast<std::uint32_t>(text.size()));
  append(bytes, static_cast<std::uint64_t>(total));
  bytes.append(kDigestBytes, '\0');
  bytes += text;
  bytes += payload;
  bytes.replace(kDigestOffset, kDigestBytes, digest_of_the_rest(bytes));
  return bytes;
}

std::optional<ObjectView> decode_object_view(std::string_view bytes, std::string& why) try {
  why = fault_in_prefix(bytes);
  if (!why.empty()) return std::nullopt;
  const std::size_t header_bytes = load<std::uint32_t>(bytes, 12);
  auto header = parse_header(bytes.substr(kPrefixBytes, header_bytes), why);
  if (!header) return std::nullopt;
  return ObjectView{std::move(*header), bytes.substr(kPrefixBytes + header_bytes)};
} catch (const std::exception& error) {  // out of memory
  why = error.what();
  return std::nullopt;
}

std::optional<Object> decode_object(std::string_view bytes, std::string& why) try {
  auto view = decode_object_view(bytes, why);
  if (!view) return std::nullopt;
  return Object{std::move(view->header), std::string(view->payload)};
} catch (const std::exception& error) {  // out of memory
  why = error.what();
  return std::nullopt;
}

}  // namespace torchkiln::cache
