// Names are checked by alphabet and length before they meet a path: none can leave its directory.
// SPDX-License-Identifier: Apache-2.0
#include "cache/names.h"

#include <signal.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>

namespace torchkiln::cache {
namespace {

constexpr std::size_t kKeyDigits = 64;
constexpr std::size_t kShardDigits = 2;
constexpr std::size_t kMaxCompilerBytes = 128;  // with the rest of any of our names below NAME_MAX
constexpr std::string_view kSuffix = ".kernel";

bool is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

bool is_safe(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' ||
         c == '_' || c == '+' || c == '-';
}

// Without '-', which separates the parts of a temporary name.
std::string host_name() {
  std::array<char, 65> buffer{};
  ::gethostname(buffer.data(), buffer.size() - 1);
  std::string name = buffer.data();
  for (char& c : name) c = is_safe(c) && c != '-' ? c : '_';
  return name.empty() ? "unknown" : name;
}

std::uint64_t random_number() {
  std::uint64_t value = 0;
  if (::getrandom(&value, sizeof value, GRND_NONBLOCK) != static_cast<ssize_t>(sizeof value)) {
    // Early at boot. Names only have to differ within one process id; O_EXCL guards the rest.
    value = static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  return value;
}

}  // namespace

bool is_key(std::string_view key) {
  return key.size() == kKeyDigits && std::all_of(key.begin(), key.end(), is_hex);
}

bool is_compiler(std::string_view compiler) {
  return !compiler.empty() && compiler.size() <= kMaxCompilerBytes && compiler[0] != '.' &&
         std::all_of(compiler.begin(), compiler.end(), is_safe);
}

std::string shard_of(std::string_view key) { return std::string(key.substr(0, kShardDigits)); }

std::string name_prefix(std::string_view key) {
  return std::string(key.substr(kShardDigits)) + '.';
}

std::string object_name(std::string_view key, std::string_view compiler) {
  return name_prefix(key).append(compiler).append(kSuffix);
}

std::optional<ObjectId> parse_object_name(std::string_view shard, std::string_view name) {
  const std::size_t digits = kKeyDigits - kShardDigits;
  if (name.size() <= digits + 1 + kSuffix.size() || name[digits] != '.' ||
      !name.ends_with(kSuffix)) {
    return std::nullopt;
  }
  ObjectId id{std::string(shard).append(name.substr(0, digits)),
              std::string(name.substr(digits + 1))};
  id.compiler.resize(id.compiler.size() - kSuffix.size());
  if (!is_key(id.key) || !is_compiler(id.compiler)) return std::nullopt;
  return id;
}

std::string temporary_name() {
  return host_name() + '-' + std::to_string(::getpid()) + '-' + std::to_string(random_number());
}

bool writer_is_gone(std::string_view temporary_name) {
  const std::string our_host = host_name() + '-';
  if (!temporary_name.starts_with(our_host)) return false;
  const std::string_view rest = temporary_name.substr(our_host.size());
  pid_t pid = 0;
  const auto parsed = std::from_chars(rest.data(), rest.data() + rest.size(), pid);
  if (parsed.ec != std::errc() || pid <= 0) return false;
  return ::kill(pid, 0) != 0 && errno == ESRCH;
}

}  // namespace torchkiln::cache
