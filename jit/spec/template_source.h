// The closed world of kernel templates: texts embedded at build time, the include closure of each, and its digest.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "jit/spec/embedded.h"

namespace torchkiln::jit {

struct SourceFile {
  std::string path;
  std::string_view text;
  std::string sha256;
};

// Immutable after construction, so any thread may read it.
class TemplateSources {
 public:
  explicit TemplateSources(std::span<const EmbeddedFile> files);

  // The file and everything it can reach by #include, sorted by path; throws Error(VALUE) for an unknown path and
  // Error(INTERNAL) for an include that is not embedded.
  std::vector<SourceFile> closure(const std::string& path) const;
  // SHA-256 over path, length and digest of every file of the closure.
  std::string digest(const std::string& path) const;
  std::vector<std::string> paths() const;

 private:
  std::map<std::string, SourceFile, std::less<>> files_;
};

}  // namespace torchkiln::jit
