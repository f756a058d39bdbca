// Many objects in one read-only file: relocatable, sorted, the same bytes for the same objects. It is mapped, searched
// by bisection, and a payload is used where it lies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/object.h"

namespace torchkiln::cache {

// Little endian, every part at a multiple of 64 bytes.
//
//    0  magic, 8 bytes
//    8  u32 format version, u32 zero
//   16  u64 bytes of the whole file
//   24  u64 number of objects
//   32  SHA-256 of bytes 0 to 31
//   64  one row of 64 bytes for each object, by key, then compiler:
//          0  key, 32 bytes
//         32  u64 offset of the object, u64 its bytes
//         48  first 16 bytes of SHA-256 over the row's number (u64) and its bytes 0 to 47
//   ..  objects as in object.h
//
// Each row that bisection visits proves itself, so opening costs the same for any size, and damage is a miss.
class Bundle {
 public:
  // Gets one sentence about the first damage that is met; more would only repeat it.
  using Warn = std::function<void(const std::string&)>;
  // Returns the reason for refusing an object, nothing when it is fine.
  using Validate = std::function<std::optional<std::string>(const ObjectView&)>;

  // Null and `why` when the file is missing, damaged, or others than its owner could change it. The owner must be root,
  // this user, or `trusted_owner` (who owns the library could change the library).
  static std::unique_ptr<Bundle> open(const std::filesystem::path& path, uid_t trusted_owner,
                                      Warn warn, std::string& why);
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;
  ~Bundle();

  // Every object of the key that passes its own checks and `validate`, usually one; payloads live as long as the bundle.
  // Never throws.
  std::vector<ObjectView> find(const std::string& key, const Validate& validate) const;

  const std::filesystem::path& path() const { return path_; }
  std::size_t size() const { return count_; }  // objects
  std::size_t bytes() const { return bytes_.size(); }

  struct Item {
    std::string key;
    std::string_view bytes;  // of the object
    ObjectView object;
  };
  // The object of a row, checked whole; nothing and `why` when it is damaged.
  std::optional<Item> item(std::size_t row, std::string& why) const;

 private:
  struct Row;

  Bundle(std::filesystem::path path, Warn warn) : path_(std::move(path)), warn_(std::move(warn)) {}
  std::string map(uid_t trusted_owner);  // what is wrong, or ""
  std::optional<Row> row(std::size_t number) const;
  std::optional<Item> item(const Row& row, std::string& why) const;
  void report(const std::string& why) const;

  std::filesystem::path path_;
  Warn warn_;
  std::string_view bytes_;  // the mapping
  std::size_t count_ = 0;
  mutable std::atomic<bool> reported_{false};
};

// Key and compiler -> bytes of the object (encode_object).
using BundleObjects = std::map<std::pair<std::string, std::string>, std::string>;

std::string encode_bundle(const BundleObjects& objects);

}  // namespace torchkiln::cache
