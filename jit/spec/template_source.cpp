// Include closures of the embedded templates.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/spec/template_source.h"

#include <set>

#include "cache/sha256.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

// Paths of the `#include "..."` lines. The embedding step has refused every other form.
std::vector<std::string> includes(std::string_view text) {
  std::vector<std::string> result;
  constexpr std::string_view kDirective = "#include \"";
  for (std::size_t at = text.find(kDirective); at != std::string_view::npos;
       at = text.find(kDirective, at)) {
    const bool starts_line = at == 0 || text[at - 1] == '\n';
    at += kDirective.size();
    const std::size_t end = text.find('"', at);
    if (starts_line && end != std::string_view::npos)
      result.emplace_back(text.substr(at, end - at));
  }
  return result;
}

}  // namespace

TemplateSources::TemplateSources(std::span<const EmbeddedFile> files) {
  for (const EmbeddedFile& file : files) {
    files_.emplace(file.path,
                   SourceFile{file.path, std::string_view(file.text, file.size), file.sha256});
  }
}

std::vector<SourceFile> TemplateSources::closure(const std::string& path) const {
  if (!files_.contains(path)) {
    throw Error(TORCHKILN_ERROR_VALUE, "template must be one of the embedded files; got " + path,
                {}, "template");
  }
  std::set<std::string> reached = {path};
  std::vector<std::string> open = {path};
  while (!open.empty()) {
    const auto file = files_.find(open.back());
    open.pop_back();
    if (file == files_.end())
      throw Error(TORCHKILN_ERROR_INTERNAL, path + " includes a file that is not embedded");
    for (std::string& include : includes(file->second.text)) {
      if (reached.insert(include).second) open.push_back(std::move(include));
    }
  }
  std::vector<SourceFile> result;
  for (const std::string& name : reached) result.push_back(files_.at(name));
  return result;
}

std::string TemplateSources::digest(const std::string& path) const {
  cache::Sha256 sha;
  for (const SourceFile& file : closure(path)) {
    sha.update(std::to_string(file.path.size()) + ":" + file.path + ":" + file.sha256);
  }
  const auto bytes = sha.digest();
  std::string hex;
  for (const std::uint8_t byte : bytes) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

std::vector<std::string> TemplateSources::paths() const {
  std::vector<std::string> result;
  for (const auto& [path, file] : files_) result.push_back(path);
  return result;
}

}  // namespace torchkiln::jit
