// File names below the root: from key and compiler to a name and back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace torchkiln::cache {

// A key is 64 lower-case hexadecimal digits.
bool is_key(std::string_view key);
// A compiler's identity: at most 128 of A-Z a-z 0-9 . _ + -, not starting with a dot.
bool is_compiler(std::string_view compiler);

// objects/<shard>/<62 hex>.<compiler>.kernel, where the shard is the key's first two digits.
std::string shard_of(std::string_view key);
// All names of one key start with this, whatever the compiler.
std::string name_prefix(std::string_view key);
std::string object_name(std::string_view key, std::string_view compiler);

struct ObjectId {
  std::string key;
  std::string compiler;
};
std::optional<ObjectId> parse_object_name(std::string_view shard, std::string_view name);

// <host>-<pid>-<random>: the sweeper of this host can tell whether the writer still lives.
std::string temporary_name();
bool writer_is_gone(std::string_view temporary_name);

}  // namespace torchkiln::cache
