// Writing, mapping and searching bundles. The reader takes every byte for hostile.
// SPDX-License-Identifier: Apache-2.0
#include "cache/bundle.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>

#include "cache/bytes.h"
#include "cache/files.h"
#include "cache/names.h"
#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

constexpr std::string_view kMagic = "\x8ftkbnd\r\n";
constexpr std::uint32_t kFormatVersion = 1;
constexpr std::size_t kUnit = 64;  // bytes of prefix and row, and the alignment of objects
constexpr std::size_t kDigested = 32;
constexpr std::size_t kKeyBytes = 32;
constexpr std::size_t kRowChecked = 48;

std::string sha256(std::string_view bytes) {
  const auto digest = Sha256().update(bytes).digest();
  return {digest.begin(), digest.end()};
}

std::uint8_t digit(char c) { return static_cast<std::uint8_t>(c <= '9' ? c - '0' : c - 'a' + 10); }

std::string raw_key(std::string_view hex) {
  std::string raw(kKeyBytes, '\0');
  for (std::size_t i = 0; i < kKeyBytes; ++i) {
    raw[i] = static_cast<char>(digit(hex[2 * i]) << 4 | digit(hex[2 * i + 1]));
  }
  return raw;
}

std::string hex_key(std::string_view raw) {
  std::string hex;
  for (const char c : raw) {
    const auto byte = static_cast<std::uint8_t>(c);
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

std::string row_check(std::size_t number, std::string_view checked) {
  std::string bytes;
  append(bytes, static_cast<std::uint64_t>(number));
  bytes += checked;
  return sha256(bytes).substr(0, kUnit - kRowChecked);
}

std::size_t padded(std::size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

bool says(const nlohmann::json& header, const char* field, const std::string& expected) {
  const auto found = header.find(field);
  return found != header.end() && found->is_string() &&
         found->get_ref<const std::string&>() == expected;
}

std::string fault_in_prefix(std::string_view bytes) {
  if (bytes.size() < kUnit) return "it is shorter than its fixed fields";
  if (bytes.substr(0, kMagic.size()) != kMagic) return "it is no bundle";
  if (bytes.substr(kDigested, kUnit - kDigested) != sha256(bytes.substr(0, kDigested))) {
    return "its first bytes are damaged";
  }
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
  if (load<std::uint64_t>(bytes, 24) > bytes.size() / kUnit - 1) {
    return "it says that it holds more objects than fit into it";
  }
  return {};
}

}  // namespace

struct Bundle::Row {
  std::string_view key;  // 32 bytes
  std::uint64_t offset, bytes;
};

std::unique_ptr<Bundle> Bundle::open(const std::filesystem::path& path, uid_t trusted_owner,
                                     Warn warn, std::string& why) {
  std::unique_ptr<Bundle> bundle(new Bundle(path, std::move(warn)));
  why = bundle->map(trusted_owner);
  return why.empty() ? std::move(bundle) : nullptr;
}

std::string Bundle::map(uid_t trusted_owner) {
  // O_NONBLOCK: a named pipe must not hang us.
  const Descriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return error_text(file.error());
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) return error_text(errno);
  if (!S_ISREG(status.st_mode)) return "it is not a regular file";
  if (status.st_uid == trusted_owner) status.st_uid = 0;
  if (!only_we_can_write(status)) {
    return "others can change it: it must belong to you or root, writable by its owner only "
           "(chmod go-w)";
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size < kUnit) return "it is shorter than its fixed fields";
  void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapped == MAP_FAILED) return error_text(errno);
  bytes_ = {static_cast<const char*>(mapped), size};
  std::string fault = fault_in_prefix(bytes_);
  if (fault.empty()) count_ = load<std::uint64_t>(bytes_, 24);
  return fault;
}

Bundle::~Bundle() {
  if (!bytes_.empty()) ::munmap(const_cast<char*>(bytes_.data()), bytes_.size());
}

std::optional<Bundle::Row> Bundle::row(std::size_t number) const {
  const std::string_view row = bytes_.substr(kUnit * (1 + number), kUnit);
  if (row.substr(kRowChecked) != row_check(number, row.substr(0, kRowChecked))) return std::nullopt;
  const Row result{row.substr(0, kKeyBytes), load<std::uint64_t>(row, kKeyBytes),
                   load<std::uint64_t>(row, kKeyBytes + 8)};
  const bool inside = result.offset % kUnit == 0 && result.offset <= bytes_.size() &&
                      result.bytes <= bytes_.size() - result.offset;
  return inside ? std::optional(result) : std::nullopt;
}

std::optional<Bundle::Item> Bundle::item(const Row& row, std::string& why) const {
  const std::string_view bytes = bytes_.substr(row.offset, row.bytes);
  auto object = decode_object_view(bytes, why);
  if (!object) return std::nullopt;
  Item item{hex_key(row.key), bytes, std::move(*object)};
  if (says(item.object.header, "key", item.key)) return item;
  why = "its header has another key than its row";
  return std::nullopt;
}

std::optional<Bundle::Item> Bundle::item(std::size_t number, std::string& why) const {
  if (const auto found = row(number)) return item(*found, why);
  why = "row " + std::to_string(number) + " of its index is damaged";
  return std::nullopt;
}

std::vector<ObjectView> Bundle::find(const std::string& key, const Validate& validate) const try {
  std::vector<ObjectView> found;
  if (!is_key(key)) return found;
  const std::string wanted = raw_key(key);
  std::size_t first = 0;
  for (std::size_t last = count_; first < last;) {
    const std::size_t middle = first + (last - first) / 2;
    const auto probe = row(middle);
    if (!probe) {
      report("its index is damaged");
      return found;
    }
    (probe->key < wanted ? first : last) = probe->key < wanted ? middle + 1 : middle;
  }
  for (; first < count_; ++first) {
    const auto match = row(first);
    if (match && match->key != wanted) break;
    std::string why = "its index is damaged";
    auto candidate = match ? item(*match, why) : std::nullopt;
    const auto refusal = candidate && validate ? validate(candidate->object) : std::nullopt;
    if (candidate && !refusal) {
      found.push_back(std::move(candidate->object));
    } else {
      report("object " + key.substr(0, 12) + " cannot be used: " + refusal.value_or(why));
    }
  }
  return found;
} catch (const std::exception& error) {  // out of memory, or thrown by validate
  report(error.what());
  return {};
}

void Bundle::report(const std::string& why) const {
  if (!warn_ || reported_.exchange(true)) return;
  try {
    warn_("bundle " + path_.string() + ": " + why +
          "; what is damaged is skipped. 'torchkiln bundle verify' lists all of it; make the file "
          "again");
  } catch (...) {
    // A warning that cannot be given is not worth an operator's failure.
  }
}

std::string encode_bundle(const BundleObjects& objects) {
  std::size_t end = kUnit * (1 + objects.size());
  std::string rows;
  for (const auto& [id, bytes] : objects) {
    std::string row = raw_key(id.first);
    append(row, static_cast<std::uint64_t>(end));
    append(row, static_cast<std::uint64_t>(bytes.size()));
    row += row_check(rows.size() / kUnit, row);
    rows += row;
    end += padded(bytes.size());
  }
  std::string bundle;
  bundle.reserve(end);
  bundle += kMagic;
  append(bundle, kFormatVersion);
  append(bundle, std::uint32_t{0});
  append(bundle, static_cast<std::uint64_t>(end));
  append(bundle, static_cast<std::uint64_t>(objects.size()));
  bundle += sha256(bundle);
  bundle += rows;
  for (const auto& [id, bytes] : objects) {
    bundle += bytes;
    bundle.resize(padded(bundle.size()), '\0');
  }
  return bundle;
}

}  // namespace torchkiln::cache
