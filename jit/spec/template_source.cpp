// Include closures of the templates.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/spec/template_source.h"

#include <algorithm>
#include <cctype>
#include <filesystem>

#include "cache/sha256.h"
#include "jit/error.h"
#include "jit/spec/specialization.h"

namespace torchkiln::jit {
namespace {

// What follows #include on this line; nothing on other lines.
std::string_view include_of(std::string_view line) {
  const auto skip = [&line](std::size_t count) {
    line.remove_prefix(count);
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
  };
  constexpr std::string_view kInclude = "include";
  skip(0);
  if (!line.starts_with('#')) return {};
  skip(1);
  if (!line.starts_with(kInclude)) return {};
  skip(kInclude.size());
  return line;
}

Error wrong_template(const std::string& rule, const std::string& got) {
  return {TORCHKILN_ERROR_VALUE, "template: " + rule + "; got " + got, {}, "template"};
}

// user/acme/scale.cuh: folders and a file, of plain characters.
void check_user_path(const std::string& path) {
  const bool plain = std::all_of(path.begin(), path.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-' || c == '.' ||
           c == '/';
  });
  const std::string normal = std::filesystem::path(path).lexically_normal().string();
  if (plain && is_user_path(path) && normal == path && !path.ends_with('/')) return;
  throw wrong_template("path must be a file below user/, of letters, digits, _, -, . and /", path);
}

}  // namespace

std::string_view IncludeLine::name() const {
  if (!what.starts_with('"')) return {};
  const std::size_t end = what.find('"', 1);
  return end == what.npos ? std::string_view() : what.substr(1, end - 1);
}

std::vector<IncludeLine> include_lines(std::string_view text) {
  std::vector<IncludeLine> result;
  int line = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    ++line;
    const std::string_view whole = text.substr(at, end - at);
    if (const auto what = include_of(whole); !what.empty())
      result.push_back({what, line, whole.starts_with("#include \"")});
    at = end + 1;
  }
  return result;
}

TemplateSources::TemplateSources(std::span<const EmbeddedFile> files) {
  for (const EmbeddedFile& file : files) {
    files_.emplace(file.path,
                   SourceFile{file.path, std::string_view(file.text, file.size), file.sha256, {}});
  }
}

void TemplateSources::add(const std::string& path, const std::string& text) {
  check_user_path(path);
  const std::string sha256 = cache::sha256_hex(text);
  const std::scoped_lock lock(mutex_);
  const auto known = files_.find(path);
  if (known != files_.end() && known->second.sha256 == sha256) return;
  if (used_.contains(path)) {
    throw wrong_template(
        "the text of " + path + " must stay the same once a kernel is declared from it",
        "another one. Give the new kernel another name, or start a new process");
  }
  const std::string& kept = texts_.emplace_back(text);
  files_.insert_or_assign(path, SourceFile{path, kept, sha256, {}});
}

void TemplateSources::use(const std::string& path) {
  const std::scoped_lock lock(mutex_);
  for (const SourceFile& file : closure_locked(path)) used_.insert(file.path);
}

std::vector<SourceFile> TemplateSources::closure(const std::string& path) const {
  const std::scoped_lock lock(mutex_);
  return closure_locked(path);
}

// A user's file is found relative to the one that includes it, as C does; all others by their path. Null for an odd line
// of an embedded file, which does not compile.
const SourceFile* TemplateSources::resolve(const SourceFile& from,
                                           const IncludeLine& include) const {
  const std::string name(include.name());
  if (is_user_path(from.path) && !name.empty()) {
    const auto beside = (std::filesystem::path(from.path).parent_path() / name).lexically_normal();
    if (const auto file = files_.find(beside.string()); file != files_.end()) return &file->second;
  }
  if (const auto file = files_.find(name); file != files_.end()) return &file->second;
  if (!is_user_path(from.path) && !include.plain) return nullptr;
  if (!is_user_path(from.path))
    throw Error(TORCHKILN_ERROR_INTERNAL, from.path + " includes a file that is not embedded");
  throw Error(
      TORCHKILN_ERROR_VALUE,
      "headers: #include must name, in quotes, a header of the kernel or of torchkiln; got " +
          std::string(include.what) + " in " + from.path + "(" + std::to_string(include.line) +
          "). torchkiln has " + embedded_headers() +
          "; give others with the kernel. NVRTC's built-in functions need no header.",
      {}, "headers");
}

std::string TemplateSources::embedded_headers() const {
  std::string list;
  for (const auto& [path, file] : files_) {
    if (path.starts_with("common/") || path.starts_with("geometry/"))
      list += (list.empty() ? "" : ", ") + path;
  }
  return list.empty() ? "none" : list;
}

std::vector<SourceFile> TemplateSources::closure_locked(const std::string& path) const {
  const auto root = files_.find(path);
  if (root == files_.end() && is_user_path(path)) {
    throw wrong_template("kernels of users must be declared in this process",
                         path + ", which is not. Name the module that does it: --import MODULE");
  }
  if (root == files_.end()) {
    throw Error(TORCHKILN_ERROR_VALUE,
                "template must be one of the embedded files or an added one; got " + path, {},
                "template");
  }
  std::map<std::string, SourceFile> reached = {{path, root->second}};
  std::map<std::string, std::string> meanings = {{path, path}};  // of a name in #include lines
  std::vector<std::string> open = {path};
  while (!open.empty()) {
    const SourceFile from = reached.at(open.back());
    open.pop_back();
    for (const IncludeLine& include : include_lines(from.text)) {
      const SourceFile* file = resolve(from, include);
      if (file == nullptr) continue;
      const auto [meaning, fresh] = meanings.emplace(include.name(), file->path);
      if (meaning->second != file->path) {
        throw wrong_template(
            "\"" + meaning->first + "\" must mean one file in all files of " + path,
            meaning->second + " and " + file->path + ". Rename one of them");
      }
      if (reached.emplace(file->path, *file).second) open.push_back(file->path);
    }
  }
  for (const auto& [name, file] : meanings) reached.at(file).names.push_back(name);
  std::vector<SourceFile> result;
  for (auto& [name, file] : reached) result.push_back(std::move(file));
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
  const std::scoped_lock lock(mutex_);
  std::vector<std::string> result;
  for (const auto& [path, file] : files_) result.push_back(path);
  return result;
}

}  // namespace torchkiln::jit
