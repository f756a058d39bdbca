// The closed world of kernel templates: texts embedded at build time and those that users add, the include closure of
// each, and its digest.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "jit/spec/embedded.h"

namespace torchkiln::jit {

struct SourceFile {
  std::string path;
  std::string_view text;  // lives as long as the sources
  std::string sha256;
  std::vector<std::string>
      names;  // in a closure: what #include lines call it; the path, unless a user's file says less
};

// A line with an #include: what follows the word.
struct IncludeLine {
  std::string_view what;  // "common/types.h", with its quotes, and the rest of the line
  int line = 0;
  bool plain = false;  // spelt as the embedding step asks for

  std::string_view name() const;  // without quotes; empty when there are none
};
std::vector<IncludeLine> include_lines(std::string_view text);

// Thread-safe. Files are only added.
class TemplateSources {
 public:
  explicit TemplateSources(std::span<const EmbeddedFile> files);

  // A user's file; throws Error(VALUE) for a wrong path, and for another text under a path that is in use.
  void add(const std::string& path, const std::string& text);
  // A kernel was declared from this user's file: it and what it includes stay as they are. Throws Error(VALUE) when it is
  // not there, or includes what is not.
  void use(const std::string& path);

  // The file and everything it can reach by #include, sorted by path; throws Error(VALUE) for an unknown path and
  // Error(INTERNAL) for an include of an embedded file that is not embedded.
  std::vector<SourceFile> closure(const std::string& path) const;
  // SHA-256 over path, length and digest of every file of the closure.
  std::string digest(const std::string& path) const;
  std::vector<std::string> paths() const;

  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  using Files = std::map<std::string, SourceFile, std::less<>>;

  std::vector<SourceFile> closure_locked(const std::string& path) const;
  const SourceFile* resolve(const SourceFile& from, const IncludeLine& include) const;
  std::string embedded_headers() const;

  mutable std::mutex mutex_;
  Files files_;
  std::deque<std::string>
      texts_;  // of users' files; replaced ones too, since a compile may still read them
  std::set<std::string> used_;
};

}  // namespace torchkiln::jit
