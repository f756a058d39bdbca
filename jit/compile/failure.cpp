// Keeping failed compiles.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/failure.h"

#include <cctype>
#include <filesystem>
#include <fstream>

#include "cache/root.h"
#include "cache/sha256.h"

namespace torchkiln::jit {
namespace {

namespace fs = std::filesystem;

std::string file_name(const std::string& text) {
  std::string name;
  for (const char c : text) name += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  constexpr std::size_t kReadable = 80;
  return name.substr(0, kReadable) + "-" + cache::sha256_hex(text).substr(0, 12);
}

void write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file.exceptions(std::ios::failbit | std::ios::badbit);
  file << text;
}

void write_all(const fs::path& folder, const nlohmann::json& details) {
  write(folder / "log.txt", details.value("log", ""));
  write(folder / "program.cu", details.value("program", ""));
  std::string options;
  for (const auto& option : details.value("options", nlohmann::json::array())) {
    options += option.get<std::string>() + "\n";
  }
  write(folder / "options.txt", options);
  const auto files = details.value("files", nlohmann::json::object());
  for (const auto& [path, text] : files.items()) {
    write(folder / path, text.get<std::string>());
  }
}

}  // namespace

Error keep_failure(const Error& failure, const Settings& settings) {
  nlohmann::json details = failure.details();
  const cache::Root root = cache::resolve_root(settings.cache_dir);
  if (root.path.empty()) return failure;
  const fs::path folder =
      root.path / "v1" / "failures" /
      file_name(details.value("specialization", "kernel") + details.value("target", ""));
  try {
    write_all(folder, details);
    fs::permissions(root.path / "v1" / "failures", fs::perms::owner_all);
  } catch (const std::exception&) {
    return failure;  // the log is still in the details; a full disk must not hide it
  }
  details["source_path"] = folder.string();
  return Error(failure.kind(),
               std::string(failure.what()) + " Log and source kept in " + folder.string(), details,
               failure.argument());
}

}  // namespace torchkiln::jit
