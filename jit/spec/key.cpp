// The cache key.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/spec/key.h"

#include "cache/sha256.h"

namespace torchkiln::jit {
namespace {

// Tag and length in front of every field, so that ("ab", "c") and ("a", "bc"), or 1 and "1", never meet.
class FieldHash {
 public:
  void add(char tag, const std::string& value) {
    bytes_ += tag;
    bytes_ += std::to_string(value.size());
    bytes_ += ':';
    bytes_ += value;
  }
  void add(std::int64_t value) { add('i', std::to_string(value)); }
  std::string hex() const { return cache::sha256_hex(bytes_); }

 private:
  std::string bytes_;
};

}  // namespace

std::string cache_key(const Specialization& specialization, const Target& target,
                      const std::string& template_digest, const std::vector<std::string>& options) {
  FieldHash hash;
  hash.add(kKeySchema);
  hash.add('s', specialization.path);
  hash.add('d', template_digest);
  hash.add('s', specialization.entry);
  hash.add(static_cast<std::int64_t>(specialization.arguments.size()));
  for (const TemplateArgument& argument : specialization.arguments) {
    hash.add('s', argument.name);
    hash.add(argument.kind);
    hash.add(argument.value);
  }
  hash.add(specialization.args_size);
  // The program asserts them: code under this key takes exactly these.
  for (const KernelParameter& parameter : specialization.parameters) {
    hash.add(parameter.passing);
    hash.add(parameter.type);
  }
  hash.add('t', target.text());
  hash.add(static_cast<std::int64_t>(options.size()));
  for (const std::string& option : options) hash.add('o', option);
  return hash.hex();
}

}  // namespace torchkiln::jit
